"""Check what ruff does not: sizes, file names, and strings that belong to one machine only.

Prints one line a finding and exits 1 if there is any. Layering is checked by `tests/meta/test_style.py`, which also
runs what is here.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 400, 60, 120
VAGUE_NAMES = {"utils.py", "util.py", "helpers.py", "common.py", "misc.py"}
# Someone's home or workspace, and hosts of package registries: clients are configured, projects are not.
LOCAL = re.compile(r"(?<![\w.$}])/(?:work|root|home)/\w|\b(?:pypi|files\.pythonhosted|registry\.npmjs)\.org\b")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".sh", ".cfg", ""}


def tracked_files() -> list[Path]:
    """Return the files that git tracks or would add."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]


def check_sizes(name: str, source: str) -> Iterator[str]:
    """Yield files and functions that outgrew the limits; jitted kernels may be twice as long."""
    lines = source.count("\n")
    if lines > FILE_LINES:
        yield f"{name}: {lines} lines; at most {FILE_LINES}"
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        limit = KERNEL_LINES if any("jit" in ast.unparse(d) for d in node.decorator_list) else FUNCTION_LINES
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > limit:
            yield f"{name}:{node.lineno}: {node.name} has {length} lines; at most {limit}"


def check_names(name: str, source: str) -> Iterator[str]:
    """Yield file names that say nothing and modules that do not say what they are."""
    if Path(name).name in VAGUE_NAMES:
        yield f"{name}: name the file after what is in it"
    if source.strip() and ast.get_docstring(ast.parse(source)) is None:
        yield f"{name}: no module docstring"


def check_wording(name: str, source: str) -> Iterator[str]:
    """Yield paths of one machine and registry hosts."""
    for number, line in enumerate(source.splitlines(), 1):
        if found := LOCAL.search(line):
            yield f"{name}:{number}: {found.group()!r} belongs to one machine, not to the project"


def findings() -> list[str]:
    """Return everything wrong in the project's files."""
    found: list[str] = []
    for path in tracked_files():
        if path.suffix not in TEXT_SUFFIXES:
            continue
        name, source = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        found += check_wording(name, source)
        if path.suffix == ".py":
            for check in (check_sizes, check_names):
                found += check(name, source)
    return found


def main() -> int:
    """Print the findings."""
    found = findings()
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
