"""scripts/sanitize.py: two rounds of all parts, and a record of what the sanitizer found."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sanitize() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sanitize", ROOT / "scripts" / "sanitize.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tools(sanitize: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python that notes and runs nothing, and a sanitizer that finds what it is told."""
    for name, text in {
        "python": 'echo "$1 $2 $PYTORCH_NO_CUDA_MEMORY_CACHING" >> "$0.said"; test "$2" != "$PLAIN_FAILS"',
        "compute-sanitizer": (
            'if [ "$1" = --version ]; then echo "Version 2025.3.1.0"; exit 0; fi\n'
            'for last; do :; done; shift 2; "$@"\n'
            'case "$last" in "$CRASHES") exit 7;; "$FOUND_IN") echo "== ERROR SUMMARY: 2 errors"; exit 1;; esac\n'
            'echo "== ERROR SUMMARY: 0 errors"'
        ),
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(sanitize.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sanitize.record, "environment", lambda device: {"device": device})
    return tmp_path


def test_all_parts_are_run_twice_and_recorded(sanitize: ModuleType, tools: Path) -> None:
    out = tools / "new" / "sanitize.json"
    assert sanitize.main(["--out", str(out)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    parts = list(sanitize.run_variants.PARTS)
    assert [(row["part"], row["errors"]) for row in found["rows"]] == [(part, 0) for part in parts]
    assert (found["device"], found["tool"]) == ("cuda", "compute-sanitizer 2025.3.1.0")
    ran = (tools / "python.said").read_text(encoding="utf-8").splitlines()
    script = ROOT / "scripts" / "run_variants.py"
    assert sorted(ran) == sorted([f"{script} {part} 1" for part in parts] * 2)


@pytest.mark.parametrize(("name", "errors"), [("FOUND_IN", 2), ("CRASHES", None)])
def test_what_is_found_is_recorded_and_shown(
    sanitize: ModuleType,
    tools: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    errors: int | None,
) -> None:
    monkeypatch.setenv(name, "fused")
    out = tools / "found.json"
    assert sanitize.main(["--parts", "resident", "fused", "--out", str(out)]) == 1
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [(row["part"], row["errors"]) for row in rows] == [("resident", 0), ("fused", errors)]
    said = capsys.readouterr().err
    assert said.startswith(f"fused: exit {7 if errors is None else 1}, errors {errors}")
    assert "resident" not in said


def test_a_part_that_is_wrong_without_it_ends_the_run(
    sanitize: ModuleType, tools: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PLAIN_FAILS", "fused")
    assert sanitize.main(["--parts", "fused", "--out", str(tools / "x.json")]) == 1
    assert "fused: exit 1, errors None" in capsys.readouterr().err
    assert not (tools / "x.json").exists()


@pytest.mark.parametrize("lacks", ["compute-sanitizer is not found", "torch finds no CUDA device"])
def test_what_is_missing_is_said(
    sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lacks: str
) -> None:
    monkeypatch.setattr(sanitize.shutil, "which", lambda tool: None if "found" in lacks else "/bin/true")
    monkeypatch.setattr(sanitize.torch.cuda, "is_available", lambda: "found" in lacks)
    assert sanitize.main([]) == 2
    assert capsys.readouterr().err.startswith(f"sanitize: {lacks}")
