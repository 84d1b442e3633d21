"""Run every part of run_variants.py once plainly and once under compute-sanitizer, and record what it found.

    python scripts/sanitize.py                        # benchmarks/results/<gpu>/sanitize.json
    python scripts/sanitize.py --parts fused resident --out found.json

The first round compiles, so that the one that is watched finds all kernels in the caches. A part that differs from the
reference, or in which the sanitizer finds an error, is shown with what it said, and the end is 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import record
import result_files
import run_variants
import torch

ROOT = Path(__file__).resolve().parent.parent
TOOL = "compute-sanitizer"
AT_A_TIME = 16  # most time is compiling and starting
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")
PROTOCOL = (
    "each part of run_variants.py in a process of its own, every tensor an allocation of its own, so that a read past "
    "one's end is seen; errors: what compute-sanitizer (memcheck) counted, null where it did not come to count"
)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(run_variants.PARTS), default=list(run_variants.PARTS))
    parser.add_argument("--out", type=result_files.output, metavar="FILE")
    return parser.parse_args(given)


def run(part: str, before: Sequence[str]) -> dict[str, Any]:
    """Run one part behind a command, and return what it took and said."""
    start = time.monotonic()
    command = [*before, sys.executable, str(ROOT / "scripts" / "run_variants.py"), part]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    said = done.stdout + done.stderr
    found = SUMMARY.findall(said)
    errors = int(found[-1]) if found else None
    return {"part": part, "code": done.returncode, "errors": errors, "seconds": time.monotonic() - start, "said": said}


def run_all(parts: Sequence[str], before: Sequence[str]) -> list[dict[str, Any]]:
    """Run parts side by side."""
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return list(pool.map(lambda part: run(part, before), parts))


def failed(rows: Sequence[dict[str, Any]], watched: bool) -> bool:
    """Print what parts said that failed; of those that were watched, also where nothing was counted."""
    bad = [row for row in rows if row["code"] or (watched and row["errors"] != 0)]
    for row in bad:
        print(f"{row['part']}: exit {row['code']}, errors {row['errors']}\n{row['said']}", file=sys.stderr)
    return bool(bad)


def version(tool: str) -> str:
    """Return what a tool says of its version."""
    said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"[Vv]ersion ([\w.]+)", said)
    return found.group(1) if found else "unknown"


def main(given: Sequence[str] | None = None) -> int:
    """Run both rounds; returns 0 if nothing was found, 1 if something was, 2 where they cannot be run."""
    args = arguments(given)
    tool = shutil.which(TOOL)
    if tool is None or not torch.cuda.is_available():
        lacks = f"{TOOL} is not found; it comes with the CUDA toolkit" if tool is None else "torch finds no CUDA device"
        print(f"sanitize: {lacks}", file=sys.stderr)
        return 2
    if failed(run_all(args.parts, ()), watched=False):
        return 1
    rows = run_all(args.parts, (tool, "--error-exitcode", "1"))
    kept = [{"part": row["part"], "errors": row["errors"], "seconds": round(row["seconds"], 1)} for row in rows]
    out = args.out or record.folder("cuda") / "sanitize.json"
    record.write(out, kept, "cuda", tool=f"{TOOL} {version(tool)}", protocol=PROTOCOL)
    return int(failed(rows, watched=True))


if __name__ == "__main__":
    sys.exit(main())
