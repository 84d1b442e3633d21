"""Elastic linear layers for PyTorch models: residual bit slices, per-token routing, a budget that moves at run time.

import mobiquant_compiler as mq

mq.quantize_(model, calibration=tokens)
model = torch.compile(model, backend="mobiquant")
mq.set_budget(model, 3.0)
"""

from typing import TYPE_CHECKING, Any

from mobiquant_compiler import wiring as _wiring  # noqa: F401  (registers the CUDA kernels; queries no device)
from mobiquant_compiler.budgets import (
    achieved_bits,
    budget,
    get_budget,
    padding_mask,
    refresh,
    reset_telemetry,
    set_budget,
)
from mobiquant_compiler.calibration import CalibrationConfig, calibrate_
from mobiquant_compiler.config import CompileConfig, SliceConfig
from mobiquant_compiler.errors import MobiQuantError
from mobiquant_compiler.execution import set_execution
from mobiquant_compiler.following import BudgetFollower, follow_budget
from mobiquant_compiler.linear import MobiLinear
from mobiquant_compiler.quantize import quantize_
from mobiquant_compiler.report import Coverage, Skip, SkipReason
from mobiquant_compiler.runtime.paths import execution_paths, reset_execution_paths
from mobiquant_compiler.runtime.telemetry import AchievedBits
from mobiquant_compiler.slices import output_bound, slice_bound
from mobiquant_compiler.spec import Layout, SliceSpec
from mobiquant_compiler.warmup import WarmupReport, warmup

if TYPE_CHECKING:
    from mobiquant_compiler.checkpoint import load, load_into, save

__version__ = "0.1.0"
__all__ = [
    "AchievedBits",
    "BudgetFollower",
    "CalibrationConfig",
    "CompileConfig",
    "Coverage",
    "Layout",
    "MobiLinear",
    "MobiQuantError",
    "Skip",
    "SkipReason",
    "SliceConfig",
    "SliceSpec",
    "WarmupReport",
    "achieved_bits",
    "budget",
    "calibrate_",
    "execution_paths",
    "follow_budget",
    "get_budget",
    "load",
    "load_into",
    "output_bound",
    "padding_mask",
    "quantize_",
    "refresh",
    "reset_execution_paths",
    "reset_telemetry",
    "save",
    "set_budget",
    "set_execution",
    "slice_bound",
    "warmup",
]


def __getattr__(name: str) -> Any:
    # Checkpoints need transformers, which takes seconds to import: only where they are used.
    if name in ("load", "load_into", "save"):
        from mobiquant_compiler import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
