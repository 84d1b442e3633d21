"""What every result file records besides its rows: device, versions, commit, time, command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors")


def device_name(device: str) -> str:
    """Return the accelerator's name, or the processor's with its number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux: the platform's own name stands
    return f"{model}, {torch.get_num_threads()} threads"


def folder(device: str) -> Path:
    """Return where results of a device go: ``results/cpu``, or the accelerator's model, ``results/h200``."""
    return RESULTS / (device_name(device).split()[-1].lower() if device.startswith("cuda") else "cpu")


def commit() -> str:
    """Return the commit that is measured, with a mark where the tree differs from it."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "mobiquant_compiler"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MOBIQUANT_COMMIT", "unknown")
    return head + ("+changes" if changed else "")


def version_of(package: str) -> str | None:
    """Return an installed package's version, None where it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: str) -> dict[str, Any]:
    """Return what a reader needs to repeat a measurement."""
    return {
        "device": device_name(device),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": " ".join(["python", *(Path(a).name if a.startswith("/") else a for a in sys.argv)]),
    }


def write(path: Path, rows: Sequence[Mapping[str, Any]], device: str, **notes: Any) -> None:
    """Write a result file: environment, notes, rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**environment(device), **notes, "rows": list(rows)}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path} ({len(rows)} rows)")
