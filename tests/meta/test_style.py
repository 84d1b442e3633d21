"""What the project promises about itself: layers, names, sizes, coverage of errors and skip reasons by tests."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from mobiquant_compiler import errors
from mobiquant_compiler.passes import PASSES
from mobiquant_compiler.report import SkipReason

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "mobiquant_compiler"
TESTS = ROOT / "tests"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TEST_FILES = sorted(TESTS.rglob("test_*.py"))

# From the bottom up; a module may import its own layer and those below. The middle packages stand side by side.
CORE = ("errors", "spec", "config", "report", "packing", "slices", "grid", "reference", "cpu", "ops", "linear")
MIDDLE = ("passes", "codegen", "runtime")
TOP = ("cli", "__main__")


def layer(name: str) -> int:
    """Return how high a top-level part of the package stands."""
    return 0 if name in CORE or name.startswith("__v") else 1 if name in MIDDLE else 3 if name in TOP else 2


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and target of every import of our package in a file, lazy ones included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_downwards(path):
    here = path.relative_to(PACKAGE).with_suffix("").parts[0]
    wrong = []
    for line, target in imports(path):
        if here == "passes" and target.split(".")[0] == "triton":
            wrong.append(f"{line}: passes import no triton")
        if here == "codegen" and target.startswith("torch.fx"):
            wrong.append(f"{line}: codegen sees no graph")
        if not target.startswith("mobiquant_compiler.") or here == "__init__":
            continue
        there = target.split(".")[1]
        if layer(there) > layer(here) or (layer(here) == layer(there) == 1 and here != there):
            wrong.append(f"{line}: {here} imports {there}")
    assert not wrong


def test_core_modules_are_all_there():
    assert not [name for name in CORE if not (PACKAGE / f"{name}.py").exists()]


def test_registry_files_and_classes_have_one_name():
    files = {f.stem for f in (PACKAGE / "passes").glob("*.py")}
    for key, target in PASSES.items():
        assert key.replace("-", "_") in files
        assert target == f"mobiquant_compiler.passes.{key.replace('-', '_')}:{key.title().replace('-', '')}"
    not_passes = {"__init__", "base", "manager", "registry", "edit", "verify"}
    assert files - {key.replace("-", "_") for key in PASSES} == not_passes


@pytest.fixture(scope="module")
def all_tests() -> str:
    """The text of every test, this file left out."""
    return "\n".join(f.read_text(encoding="utf-8") for f in TEST_FILES if f != Path(__file__))


def raised_classes() -> list[str]:
    """Return the error classes that have a message of their own."""
    found = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.MobiQuantError)]
    return [c.__name__ for c in found if "message" in vars(c) and c is not errors.MobiQuantError]


@pytest.mark.parametrize("name", raised_classes())
def test_every_error_is_raised_and_tested(name, all_tests):
    assert re.search(rf"\b{name}\b", all_tests), f"no test mentions {name}"
    sources = "\n".join(f.read_text(encoding="utf-8") for f in SOURCES if f.name != "errors.py")
    assert re.search(rf"\b{name}\(", sources), f"nothing raises {name}"


@pytest.mark.parametrize("reason", list(SkipReason), ids=lambda r: r.name)
def test_every_skip_reason_is_given_and_tested(reason, all_tests):
    assert f"SkipReason.{reason.name}" in all_tests
    sources = "\n".join(f.read_text(encoding="utf-8") for f in SOURCES if f.name != "report.py")
    assert f"SkipReason.{reason.name}" in sources, "nothing skips for this reason"


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda p: p.relative_to(TESTS).as_posix())
def test_no_test_lacks_its_prefix(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    called = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
        n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)
    }
    lost = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith(("test_", "pytest_"))
        and node.name not in called
        and not any("fixture" in ast.unparse(d) for d in node.decorator_list)
    ]
    assert not lost, "neither a test, a fixture nor used"
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert len(names) == len(set(names)), "a second function of one name hides the first"
    for cls in (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name.startswith("Test")):
        assert all(
            f.name.startswith(("test_", "_", "setup", "teardown")) or f.decorator_list
            for f in cls.body
            if isinstance(f, ast.FunctionDef)
        )


def test_data_files_go_into_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    shipped = {
        found
        for package, patterns in listed.items()
        for pattern in patterns
        for found in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    data = {f for f in PACKAGE.rglob("*") if f.is_file() and f.suffix != ".py" and "__pycache__" not in f.parts}
    assert not data - shipped


def test_the_environment_is_read_in_one_place():
    readers = {
        path.relative_to(PACKAGE).as_posix()
        for path in SOURCES
        if re.search(r"\bos\.(environ|getenv)\b", path.read_text(encoding="utf-8"))
    }
    assert readers == {"config.py"}


def test_the_style_script_finds_nothing():
    spec = importlib.util.spec_from_file_location("check_style", ROOT / "scripts" / "check_style.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.findings() == []


def test_importing_the_package_touches_no_device_and_no_triton():
    script = """
import sys
import torch
import mobiquant_compiler, mobiquant_compiler.backend
assert not torch.cuda.is_initialized()
loaded = [name for name in sys.modules if name.split(".")[0] in ("triton", "transformers", "typer", "rich")]
assert not loaded, loaded[:5]
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "fine", done.stderr
