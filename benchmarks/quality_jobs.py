"""Methods of `bench_quality` measured side by side, a process each, and their files joined as they grow."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_POLL = 2.0  # seconds between two joins


def run(methods: Sequence[str], jobs: int, arguments: Sequence[str], join: Any) -> None:
    """Measure methods, at most `jobs` at a time.

    Args:
        methods: What each process measures.
        jobs: Processes at a time.
        arguments: Of this program, of which a process gets all, with its own method and file.
        join: Called with the contents of all files whenever there may be more in them.

    Raises:
        SystemExit: processes failed; what the others measured is joined.
    """
    with tempfile.TemporaryDirectory(prefix="mobiquant-quality-") as directory:
        waiting, running, failed = list(methods), {}, []
        files = {method: Path(directory) / f"{method}.json" for method in methods}
        while waiting or running:
            while waiting and len(running) < jobs:
                method = waiting.pop(0)
                running[method] = _start(method, arguments, files[method])
            time.sleep(_POLL)
            ended = [method for method, process in running.items() if process.poll() is not None]
            failed += [method for method in ended if running.pop(method).returncode]
            join([json.loads(file.read_text(encoding="utf-8")) for file in files.values() if file.exists()])
    if failed:
        sys.exit(f"{', '.join(failed)} failed; what they print is above. The other methods' rows are written.")


def _start(method: str, arguments: Sequence[str], out: Path) -> subprocess.Popen[bytes]:
    # Later options win: each process has one job, one method, and a file of its own.
    own = ["--jobs", "1", "--no-unquantized", "--methods", method, "--out", str(out)]
    return subprocess.Popen([sys.executable, *arguments, *own])
