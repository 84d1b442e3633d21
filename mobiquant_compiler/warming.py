"""Runs every kernel that a launch can need once, on weights of zeros: what `warmup` is made of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from mobiquant_compiler import kernels, wiring
from mobiquant_compiler.kernels import fused_kernel, gather_kernel, target_of
from mobiquant_compiler.routing import idle_router, prepare, quantize, route
from mobiquant_compiler.runtime import fused, launch
from mobiquant_compiler.runtime import prefill as workspace
from mobiquant_compiler.runtime.launch import Weight
from mobiquant_compiler.spec import PREFILL_TOKENS, Activation, Prefill, SliceSpec


def warm_kernels(
    spec: SliceSpec,
    n: int,
    k: int,
    x_dtype: torch.dtype,
    device: torch.device | str,
    *,
    scale_dtype: torch.dtype = torch.float16,
    bias_dtype: torch.dtype | None = None,
    parts: int = 1,
    max_tokens: int | None = None,
    activation: Activation = Activation.A16,
    hidden: int = 0,
    units: Sequence[int] | None = None,
    splits: Sequence[bool] | None = None,
) -> int:
    """Compile and load every kernel that a launch needs, so that none is compiled while a graph is captured.

    Kernels take the number of output rows at run time, so one row of zeros stands for each weight.

    Args:
        spec: Widths, group and layout of the weights.
        n: Output rows of all weights of the launch.
        k: Input columns.
        x_dtype: Dtype of activations.
        device: Where it will run.
        scale_dtype: Dtype of scale and zero point.
        bias_dtype: Dtype of the bias, None where there is none.
        parts: Weights of the launch.
        max_tokens: Leave out kernels for more tokens a call than this.
        activation: Fixed-point width of activations.
        hidden: Hidden units of the trained router that the launch asks, 0 of a data-free one.
        units: Row units of kernels that the launch can take (`Launch.row_units`); all that `n` allows by default.
        splits: Whether fused kernels split programs of their last wave (`Launch.splits`); as `n` says by default.

    Returns:
        How many kernels were run.
    """
    from mobiquant_compiler.codegen.configs import TokenClass

    device = torch.device(device)
    bias = None if bias_dtype is None else torch.zeros(1, dtype=bias_dtype, device=device)
    scale = torch.zeros(spec.scale_shape(1, k), dtype=scale_dtype, device=device)
    slices = torch.zeros(spec.packed_shape(1, k), dtype=torch.int32, device=device)
    weights = [Weight(slices, scale, scale, bias)] * parts
    calls = [tokens.sample for tokens in TokenClass] + [PREFILL_TOKENS + 1]
    units = fused.row_units(n, parts) if units is None else units
    splits = kernels.fused_splits(n, k, parts) if splits is None else splits
    taken = (tokens for tokens in calls if max_tokens is None or tokens <= max_tokens)
    inputs = (torch.zeros(tokens, k, dtype=x_dtype, device=device) for tokens in taken)
    launched = sum(_warm_call(weights, x, spec, n, activation, hidden, units, splits) for x in inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return launched


def _warm_call(
    weights: Sequence[Weight],
    x: Tensor,
    spec: SliceSpec,
    n: int,
    activation: Activation,
    hidden: int,
    units: Sequence[int],
    splits: Sequence[bool],
) -> int:
    """Run every kernel that a call of as many tokens as `x` has can run; returns how many."""
    router, kind = idle_router(x.shape[-1], spec.num_slices, hidden, x.device)
    limits = router[1]
    hist = torch.zeros(spec.num_slices, dtype=torch.int64, device=x.device)
    mask = torch.zeros(1, dtype=torch.int32, device=x.device)
    routing = (router, limits, hist, mask)
    counts = route(x, *routing, kind)
    quantize(x, counts, spec, activation)
    prepared = prepare(x, *routing, spec, activation)
    launched = 3 + _warm_batches(weights, x, counts, routing, spec, n, activation, units)
    if not kernels.batch_takes_all(*_class_of(weights, x, spec, n)):
        kernel = wiring.multiply_kernel_for(weights, x.shape[0], n, x.shape[-1], spec, activation)
        launch.multiply(kernel, prepared, weights)
        launched += 1
    if x.shape[0] <= PREFILL_TOKENS:
        return launched
    ways = [Prefill.FULL] if x.is_cuda else []
    ways += [Prefill.ROUTED] if workspace.supports(x, n, x.shape[-1]) is None else []
    for prefill in ways:
        wiring.by_workspace(x, counts, weights, spec, prefill)
    launched += len(ways)
    if wiring.fused_refusal(x, spec) is not None:
        return launched
    return launched + _warm_fused(weights, x, counts, spec, units, splits)


def _warm_batches(
    weights: Sequence[Weight],
    x: Tensor,
    counts: Tensor,
    routing: tuple[Sequence[Tensor], Tensor, Tensor, Tensor],
    spec: SliceSpec,
    n: int,
    activation: Activation,
    units: Sequence[int],
) -> int:
    """Run the kernels of tokens as rows; returns how many."""
    k, target, calls = x.shape[-1], target_of(x.device), _class_of(weights, x, spec, n)
    tiles = kernels.batch_tiles(*calls)
    if not tiles:
        return 0
    prepared = quantize(x, counts, spec, activation, token_rows=True)
    routed = x.shape[0] <= PREFILL_TOKENS and kernels.batch_routes_rows(*calls)
    if routed:
        prepare(x, *routing, spec, activation, token_rows=True)
    facts = {"has_bias": weights[0].bias is not None, "parts": len(weights)}
    for unit in units:
        for tile in tiles:
            kernel = kernels.batch_kernel(spec, k, target, activation, tile=tile, row_unit=unit, **facts)
            launch.multiply(kernel, prepared, [_of_rows(weight, unit, spec, k) for weight in weights])
    return 1 + routed + len(tiles) * len(units)


def _class_of(weights: Sequence[Weight], x: Tensor, spec: SliceSpec, n: int) -> tuple[Any, ...]:
    """Return what functions of `kernels` want to know about calls of as many tokens as `x` and their like."""
    from mobiquant_compiler.codegen.configs import TokenClass

    return spec, target_of(x.device), TokenClass.of(x.shape[0]), n, x.shape[-1], len(weights)


def _of_rows(weight: Weight, rows: int, spec: SliceSpec, k: int) -> Weight:
    """Return a weight of zeros like this one, which has one row, with more rows."""
    slices = weight.slices.new_zeros(spec.packed_shape(rows, k))
    bias = None if weight.bias is None else weight.bias.expand(rows)
    return Weight(slices, weight.scale.expand(rows, -1), weight.zero.expand(rows, -1), bias)


def _warm_fused(
    weights: Sequence[Weight],
    x: Tensor,
    counts: Tensor,
    spec: SliceSpec,
    units: Sequence[int],
    splits: Sequence[bool],
) -> int:
    """Run the kernels that make weights in registers, of both tiles; returns how many."""
    k, target = x.shape[-1], target_of(x.device)
    tokens = fused.gather(gather_kernel(spec, k, target), x, counts)
    for unit, split, small in product(units, splits, (True, False)):
        weight = _of_rows(weights[0], unit, spec, k)
        facts = {"row_unit": unit, "has_bias": weight.bias is not None}
        fused.multiply(fused_kernel(spec, k, target, small=small, split=split, **facts), tokens, weight)
    return 1 + 2 * len(splits) * len(units)
