"""What every result file records besides its rows: device, versions, commit, time, command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "transformers", "numpy", "safetensors", "gemlite", "hqq")
MODEL = re.compile(r"\b[A-Z]{1,2}\d{2,4}[A-Z]?\b")  # of an accelerator, in its name: H100 in "NVIDIA H100 80GB HBM3"


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
    if not device.startswith("cuda"):
        return RESULTS / "cpu"
    name = device_name(device)
    found = MODEL.search(name)
    return RESULTS / (found.group() if found else name.split()[-1]).lower()


def driver() -> str | None:
    """Return the version of the NVIDIA driver, None where its tool does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def commit() -> str:
    """Return the commit that is measured, with a mark where the tree differs from it.

    MOBIQUANT_COMMIT says it where what is measured is a copy without its history.
    """
    if told := os.environ.get("MOBIQUANT_COMMIT"):
        return told
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "mobiquant_compiler"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed else "")


def version_of(package: str) -> str | None:
    """Return an installed package's version, None where it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: str) -> dict[str, Any]:
    """Return what a reader needs to repeat a measurement."""
    gpu = {"driver": driver(), "cuda": torch.version.cuda} if device.startswith("cuda") else {}
    return {
        "device": device_name(device),
        **gpu,
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
    whole = path.with_name(f".{path.name}.partial")  # whoever reads it meanwhile sees the old file or the new one
    whole.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    whole.replace(path)
    print(f"wrote {path} ({len(rows)} rows)")
