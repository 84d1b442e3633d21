"""One linear by the functions of `runtime.prefill`, with the arguments of a `kernel_cases.Case` in their order."""

from __future__ import annotations

from torch import Tensor

from mobiquant_compiler.runtime import prefill
from mobiquant_compiler.runtime.launch import LaunchableKernel, Weight


def workspace_linear(kernel: LaunchableKernel, x: Tensor, counts: Tensor, *weight: Tensor | None) -> Tensor:
    """Run `prefill.workspace_linears` with one weight: slices, scale, zero and bias."""
    return prefill.workspace_linears(kernel, x, counts, [Weight(*weight)])[0]


def uniform_linear(kernel: LaunchableKernel, x: Tensor, counts: Tensor, *weight: Tensor | None) -> Tensor:
    """Run `prefill.uniform_linear` with a weight: slices, scale, zero and bias."""
    return prefill.uniform_linear(kernel, x, counts, Weight(*weight))
