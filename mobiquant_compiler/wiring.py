"""Brings ops, code generation and launches together: the CUDA implementations of the ops.

Importing this module registers them and imports neither triton nor a kernel; both happen at the first call on a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mobiquant_compiler import ops, reference
from mobiquant_compiler.spec import Activation, Family, SliceSpec

if TYPE_CHECKING:
    from mobiquant_compiler.codegen.cache import Kernel
    from mobiquant_compiler.codegen.configs import Target, TokenClass
    from mobiquant_compiler.runtime.launch import LinearKernels

_INTERPRETER_CC = 80  # tiles of the interpreter: those of the oldest target we test
KERNEL_ROUTERS = ("energy",)


@lru_cache(maxsize=64)
def target_of(device: torch.device) -> Target:
    """Return what kernels for `device` must fit; CPU tensors are the interpreter's."""
    from mobiquant_compiler.codegen.configs import Target

    if device.type != "cuda":
        return Target.of(_INTERPRETER_CC)
    major, minor = torch.cuda.get_device_capability(device)
    return Target.of(10 * major + minor)


@cache
def route_kernel(spec: SliceSpec, k: int, tokens: TokenClass, target: Target) -> Kernel:
    """Return the route kernel for inputs of `k` columns."""
    from mobiquant_compiler.codegen import cache, configs

    return cache.load(configs.kernel_spec(Family.ROUTE, spec, k, tokens, target))


@cache
def linear_kernels(
    spec: SliceSpec,
    k: int,
    tokens: TokenClass,
    target: Target,
    has_bias: bool,
    activation: Activation = Activation.A16,
) -> LinearKernels:
    """Return the kernels of a linear of `k` input columns for one class of token counts."""
    from mobiquant_compiler.codegen import cache, configs, toolchain
    from mobiquant_compiler.runtime.launch import LinearKernels

    one = tokens is configs.TokenClass.ONE
    quantize = configs.kernel_spec(Family.QUANTIZE, spec, k, tokens, target, activation=activation)
    multiply = configs.kernel_spec(
        Family.DECODE if one else Family.GROUPED,
        spec,
        k,
        tokens,
        target,
        activation=activation,
        has_bias=has_bias,
        emulate=toolchain.interpreting(),
    )
    return LinearKernels(cache.load(quantize), cache.load(multiply))


@lru_cache(maxsize=64)
def router_spec(num_slices: int) -> SliceSpec:
    """Return the spec that route kernels are made for: they see the number of slices only, not their widths."""
    return SliceSpec((1,) * num_slices, 32)


def route(x: Tensor, router: Sequence[Tensor], thresholds: Tensor, hist: Tensor, mask: Tensor, kind: str) -> Tensor:
    """`reference.route` as one kernel."""
    from mobiquant_compiler.runtime import launch

    if kind not in KERNEL_ROUTERS or not launch.takes(x):
        return reference.route(x, router, thresholds, hist, mask, kind)
    kernel = route_kernel(router_spec(hist.numel()), x.shape[-1], _token_class(x), target_of(x.device))
    return launch.route(kernel, x, router, thresholds, hist, mask)


def routed_linear(
    x: Tensor,
    counts: Tensor,
    slices: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    spec: SliceSpec,
    activation: Activation = Activation.A16,
) -> Tensor:
    """`reference.routed_linear` as a quantize and a multiply kernel."""
    from mobiquant_compiler.runtime import launch

    if not launch.takes(x):
        return reference.routed_linear(x, counts, slices, scale, zero, bias, spec)
    kernels = linear_kernels(spec, x.shape[-1], _token_class(x), target_of(x.device), bias is not None, activation)
    return launch.routed_linear(kernels, x, counts, slices, scale, zero, bias)


def slice_gemm(
    x: Tensor, offsets: Tensor, slices: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, spec: SliceSpec
) -> Tensor:
    """`reference.slice_gemm` without waiting for the offsets."""
    from mobiquant_compiler.runtime import launch

    if not launch.takes(x):
        return reference.slice_gemm(x, offsets, slices, scale, zero, bias, spec)
    kernels = linear_kernels(spec, x.shape[-1], _token_class(x), target_of(x.device), bias is not None)
    return launch.slice_gemm(kernels, x, offsets, slices, scale, zero, bias)


def warm_kernels(
    spec: SliceSpec,
    n: int,
    k: int,
    x_dtype: torch.dtype,
    device: torch.device | str,
    *,
    scale_dtype: torch.dtype = torch.float16,
    bias_dtype: torch.dtype | None = None,
    max_tokens: int | None = None,
    activation: Activation = Activation.A16,
) -> int:
    """Compile and load every kernel that a linear needs, so that none is compiled while a graph is captured.

    Kernels take the number of output rows at run time, so one row of zeros stands for the weight.

    Args:
        spec: Widths, group and layout of the weight.
        n: Output rows.
        k: Input columns.
        x_dtype: Dtype of activations.
        device: Where the linear will run.
        scale_dtype: Dtype of scale and zero point.
        bias_dtype: Dtype of the bias, None where there is none.
        max_tokens: Leave out kernels for more tokens a call than this.
        activation: Fixed-point width of activations.

    Returns:
        How many kernels were run.
    """
    from mobiquant_compiler.codegen.configs import TokenClass

    device = torch.device(device)
    rows = min(n, 1)
    slices = torch.zeros(spec.packed_shape(rows, k), dtype=torch.int32, device=device)
    scale = torch.zeros(spec.scale_shape(rows, k), dtype=scale_dtype, device=device)
    bias = None if bias_dtype is None else torch.zeros(rows, dtype=bias_dtype, device=device)
    router = (torch.zeros(k, device=device), torch.zeros(spec.num_slices - 1, device=device))
    hist = torch.zeros(spec.num_slices, dtype=torch.int64, device=device)
    mask = torch.zeros(1, dtype=torch.int32, device=device)
    launched = 0
    for tokens in TokenClass:
        if max_tokens is not None and tokens.sample > max_tokens:
            continue
        x = torch.zeros(tokens.sample, k, dtype=x_dtype, device=device)
        counts = route(x, router, router[1], hist, mask, KERNEL_ROUTERS[0])
        routed_linear(x, counts, slices, scale, scale, bias, spec, activation)
        launched += 3
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return launched


def _token_class(x: Tensor) -> TokenClass:
    from mobiquant_compiler.codegen.configs import TokenClass

    return TokenClass.of(max(1, x.numel() // max(1, x.shape[-1])))


def _register() -> None:
    implementations = {
        "route": route,
        # Sorting and indexing by tensors stay on the device: the reference is what one would write.
        "gather": reference.gather,
        "slice_gemm": ops.takes_spec(slice_gemm),
        "scatter": reference.scatter,
        "routed_linear": ops.takes_spec(routed_linear),
        "elastic_linear": ops.elastic_by(route, routed_linear),
    }
    for name, implementation in implementations.items():
        ops.LIBRARY.impl(name, implementation, "CUDA")


_register()
