"""Run test suites, each in a process of its own, and close with one line over all of them.

The interpreter suite sets TRITON_INTERPRET, under which Triton cannot compile for a device, so it cannot share a
process with the others.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
WORKERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Suite:
    """One pytest run: its folders, further arguments and environment."""

    paths: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


# One thread a worker: two workers with two threads each are slower than either alone on a two-core machine.
PARALLEL = ("-n", str(WORKERS), "--dist", "worksteal")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
SUITES = {
    "main": Suite(("tests/unit", "tests/golden", "tests/e2e", "tests/meta"), PARALLEL, ONE_THREAD),
    "golden": Suite(("tests/golden",)),
    "interpret": Suite(("tests/interpret",), PARALLEL, {**ONE_THREAD, "TRITON_INTERPRET": "1"}),
    "ptx": Suite(("tests/ptx",), PARALLEL, ONE_THREAD),
    "gpu": Suite(("tests/gpu",)),
}


def run(name: str, report: Path, extra: list[str]) -> int:
    """Run one suite and return pytest's exit code."""
    suite = SUITES[name]
    command = [sys.executable, "-m", "pytest", "-q", *suite.paths, *suite.arguments, f"--junitxml={report}", *extra]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **suite.environment}, check=False).returncode


def count(report: Path) -> tuple[int, int, int]:
    """Return passed, failed and skipped tests of a JUnit report; errors count as failures."""
    if not report.exists():
        return 0, 1, 0
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    totals = [{key: int(s.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")} for s in suites]
    failed = sum(t["failures"] + t["errors"] for t in totals)
    skipped = sum(t["skipped"] for t in totals)
    return sum(t["tests"] for t in totals) - failed - skipped, failed, skipped


def main(arguments: list[str]) -> int:
    """Run the named suites (all but gpu without a name); further arguments go to pytest."""
    names = [a for a in arguments if a in SUITES] or ["main", "interpret", "ptx"]
    extra = [a for a in arguments if a not in SUITES]
    started, codes, totals = time.monotonic(), [], (0, 0, 0)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(f"== {name}", flush=True)
            report = Path(folder) / f"{name}.xml"
            codes.append(run(name, report, extra))
            totals = tuple(a + b for a, b in zip(totals, count(report), strict=True))
    print(f"{totals[0]} passed, {totals[1]} failed, {totals[2]} skipped in {time.monotonic() - started:.0f} s")
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
