"""Whatever a kernel's text and behaviour depend on moves its key."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mobiquant_compiler.codegen import cache, specialise
from mobiquant_compiler.spec import Family
from tests.chosen_specs import spec_of


def read_by(path: Path) -> set[Path]:
    """Return the files of `codegen` that a file imports, and those that they import."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mobiquant_compiler"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            files = {
                Path(str(path).partition("mobiquant_compiler")[0], *name.split(".")).with_suffix(".py")
                for name in names
            }
            found |= {file for file in files if file.is_file()}
    return found.union(*(read_by(file) for file in found)) if found else found


@pytest.mark.parametrize("family", list(Family))
def test_the_cache_key_moves_with_every_file_that_a_kernel_runs(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(family)
    key = cache.cache_key(spec)
    template = specialise.template_path(family)
    files = read_by(template) | {template}
    assert len(files) > 1 or family is Family.GATHER_TOKENS, "templates share functions"
    source = specialise._source
    for file in files:
        monkeypatch.setattr(specialise, "_source", lambda path, file=file: source(path) + "#" * (path == file))
        assert key != cache.cache_key(spec), f"{file.name} could change under a kernel that is kept"
