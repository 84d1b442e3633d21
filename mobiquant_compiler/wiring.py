"""Brings ops, code generation and launches together: the CUDA implementations of the ops.

Importing this module registers them and imports neither triton nor a kernel; both happen at the first call on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum, auto
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mobiquant_compiler import kernels, ops, reference
from mobiquant_compiler.kernels import (
    dequantize_kernel,
    fused_is_small,
    fused_is_split,
    fused_kernel,
    gather_kernel,
    gluon_refusal,
    multiply_kernel,
    target_of,
)
from mobiquant_compiler.routing import prepare, quantize, route, routes
from mobiquant_compiler.runtime import fused, launch, paths
from mobiquant_compiler.runtime import prefill as workspace
from mobiquant_compiler.runtime.launch import Prepared, Weight
from mobiquant_compiler.spec import BATCH_TOKENS, PREFILL_TOKENS, Activation, Path, Prefill, SliceSpec

if TYPE_CHECKING:
    from mobiquant_compiler.codegen.cache import Kernel
    from mobiquant_compiler.codegen.crossover import Crossover


def with_counts(prepared: Prepared, counts: Tensor) -> Prepared:
    """Return prepared tokens, no rows, with other slice counts, int32 [T]."""
    assert prepared.placed is None, "rows have their counts in the order in which they lie"
    return replace(prepared, counts=counts)


def multiply(
    prepared: Prepared,
    slices: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    spec: SliceSpec,
    activation: Activation = Activation.A16,
) -> Tensor:
    """Multiply prepared tokens by a weight, on the integer path; `reference.routed_linear` for the rest."""
    return _multiply_all(prepared, [Weight(slices, scale, zero, bias)], spec, activation)[0]


class Order(StrEnum):
    """How tokens that are routed lie where they are multiplied."""

    LANES = auto()  # as lanes load them, in the order they have
    ROWS = auto()  # as rows, for batch_wgmma, in the order they have
    SORTED = auto()  # as rows, those of most slices first


def order_of(x: Tensor, weights: Sequence[Weight], spec: SliceSpec) -> Order:
    """Return how tokens [..., K] are quantized for weights, by shapes, dtypes and device alone.

    That is where they are routed too. Those of given counts are sorted wherever they are rows.
    """
    tokens, k = launch.token_count(x), x.shape[-1]
    if tokens < BATCH_TOKENS:
        return Order.LANES
    rows = tuple(weight.rows for weight in weights)
    if kernels.batch_tile(spec, target_of(x.device), tokens, rows, k) is None:
        return Order.LANES
    return Order.ROWS if kernels.batch_keeps_order(tokens, rows, k) else Order.SORTED


def _share_launch(weights: Sequence[Weight]) -> bool:
    """Say whether one launch serves all weights."""
    return len({(w.scale.dtype, None if w.bias is None else w.bias.dtype) for w in weights}) == 1


def _are_apart(x: Tensor, weights: Sequence[Weight]) -> bool:
    """Say whether weights are multiplied as if each were alone, by the kernels that it then has for as many tokens."""
    return launch.token_count(x) >= BATCH_TOKENS and not _share_launch(weights)


def _multiply_all(
    prepared: Prepared, weights: Sequence[Weight], spec: SliceSpec, activation: Activation
) -> list[Tensor]:
    """Multiply prepared tokens by several weights: one launch where a kernel serves them all, else one each."""
    if len(weights) > 1 and not _share_launch(weights):
        return [y for weight in weights for y in _multiply_all(prepared, [weight], spec, activation)]
    if prepared.sums is not None:
        return launch.multiply(_batch_kernel(prepared, weights, spec, activation), prepared, weights)
    n = sum(weight.rows for weight in weights)
    kernel = multiply_kernel_for(weights, prepared.tokens, n, prepared.columns, spec, activation)
    return launch.multiply(kernel, prepared, weights)


def _batch_kernel(prepared: Prepared, weights: Sequence[Weight], spec: SliceSpec, activation: Activation) -> Kernel:
    """Return the kernel that multiplies tokens as rows by weights like these."""
    rows, target = tuple(weight.rows for weight in weights), target_of(prepared.counts.device)
    tile = kernels.batch_tile(spec, target, max(1, prepared.tokens), rows, prepared.columns)
    assert tile is not None, "tokens became rows for as many weights"
    facts = {"has_bias": weights[0].bias is not None, "row_unit": min(map(fused.row_unit, rows))}
    return kernels.batch_kernel(spec, prepared.columns, target, activation, tile=tile, parts=len(rows), **facts)


def multiply_kernel_for(
    weights: Sequence[Weight], tokens: int, n: int, k: int, spec: SliceSpec, activation: Activation
) -> Kernel:
    """Return the kernel that multiplies so many tokens by weights like these, of `n` output rows together."""
    from mobiquant_compiler.codegen.configs import TokenClass

    return multiply_kernel(
        spec,
        n,
        k,
        TokenClass.of(max(1, tokens)),
        target_of(weights[0].slices.device),
        activation,
        has_bias=weights[0].bias is not None,
        parts=len(weights),
        scale_bytes=weights[0].scale.element_size(),
    )


@lru_cache(maxsize=64)
def _crossover(device: torch.device) -> Crossover:
    from mobiquant_compiler.codegen import crossover

    return crossover.load(torch.cuda.get_device_name(device))


def path_of(x: Tensor, n: int, spec: SliceSpec, prefill: Prefill) -> Path:
    """Return how a call of `routed_linear` is done: by shapes, dtype and device alone.

    Args:
        x: [..., K].
        n: Output rows.
        spec: Widths, group and layout.
        prefill: What the user asked for.
    """
    if not launch.takes(x):
        return Path.REFERENCE
    tokens, k = launch.token_count(x), x.shape[-1]
    if tokens <= PREFILL_TOKENS or prefill is Prefill.EXACT:
        return Path.INTEGER
    full, in_registers = prefill is Prefill.FULL, fused_refusal(x, spec) is None
    if full and not in_registers:
        return Path.WORKSPACE if x.is_cuda else Path.INTEGER
    grouped = full or workspace.supports(x, n, k) is None
    if not (in_registers or grouped):
        return Path.INTEGER
    return _crossover(x.device).path(tokens, n, k, full=full, fused=in_registers, workspace=grouped)


def fused_refusal(x: Tensor, spec: SliceSpec) -> str | None:
    """Return why weights like these cannot be made in registers for activations like `x`, None where they can."""
    return fused.supports(x, spec) or gluon_refusal()


def routed_linears(
    x: Tensor,
    counts: Tensor,
    slices: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    spec: SliceSpec,
    activation: Activation = Activation.A16,
    prefill: Prefill = Prefill.ROUTED,
) -> list[Tensor]:
    """`reference.routed_linears` by the path that suits the number of tokens; activations are prepared once.

    With `Prefill.FULL` and more than `PREFILL_TOKENS` tokens all counts must be equal, as `route` then makes them.
    """
    weights = [Weight(*weight) for weight in zip(slices, scale, zero, bias, strict=True)]
    path = path_of(x, max(weight.rows for weight in weights), spec, prefill)
    paths.note(path, launch.token_count(x), len(weights))
    if path is Path.REFERENCE:
        return reference.routed_linears(x, counts, slices, scale, zero, bias, spec)
    if path is Path.WORKSPACE:
        return by_workspace(x, counts, weights, spec, prefill)
    if path is Path.FUSED:
        return by_fused(x, counts, weights, spec, prefill)
    return by_integers(x, counts, weights, spec, activation)


def prepare_for(
    weights: Sequence[Weight],
    x: Tensor,
    router: Sequence[Tensor],
    thresholds: Tensor,
    hist: Tensor,
    mask: Tensor,
    kind: str,
    spec: SliceSpec,
    activation: Activation = Activation.A16,
) -> Prepared:
    """Route and quantize tokens for weights: in one launch, or in two where they are sorted by what the first chose."""
    order = order_of(x, weights, spec)
    if order is Order.SORTED:
        counts = route(x, router, thresholds, hist, mask, kind)
        return quantize(x, counts, spec, activation, token_rows=True)
    return prepare(x, router, thresholds, hist, mask, spec, activation, token_rows=order is Order.ROWS)


def by_integers(
    x: Tensor, counts: Tensor, weights: Sequence[Weight], spec: SliceSpec, activation: Activation
) -> list[Tensor]:
    """Multiply tokens of given slice counts by weights on the integer path; returns [..., N] a weight."""
    if _are_apart(x, weights):
        return [by_integers(x, counts, [weight], spec, activation)[0] for weight in weights]
    prepared = quantize(x, counts, spec, activation, token_rows=order_of(x, weights, spec) is not Order.LANES)
    return _multiply_all(prepared, weights, spec, activation)


def by_workspace(
    x: Tensor, counts: Tensor, weights: Sequence[Weight], spec: SliceSpec, prefill: Prefill
) -> list[Tensor]:
    """Multiply tokens of given slice counts, all equal with `Prefill.FULL`, by dequantized weights."""
    full = prefill is Prefill.FULL
    kernel = dequantize_kernel(spec, x.shape[-1], target_of(x.device), sorted_rows=not full)
    if full:  # all tokens have one count: nothing has to be sorted
        return [workspace.uniform_linear(kernel, x, counts, weight) for weight in weights]
    return workspace.workspace_linears(kernel, x, counts, weights)


def by_fused(
    x: Tensor, counts: Tensor, weights: Sequence[Weight], spec: SliceSpec, prefill: Prefill = Prefill.ROUTED
) -> list[Tensor]:
    """Multiply tokens of given slice counts, all equal with `Prefill.FULL`, by weights that are made in registers."""
    k, target = x.shape[-1], target_of(x.device)
    groups = 1 if prefill is Prefill.FULL else spec.num_slices

    def kernel_of(weight: Weight, tokens: int) -> Kernel:
        facts = {"row_unit": fused.row_unit(weight.rows), "has_bias": weight.bias is not None}
        facts["split"] = fused_is_split(weight.rows, k)
        return fused_kernel(spec, k, target, small=fused_is_small(tokens, weight.rows, k, groups), **facts)

    return fused.fused_linears(gather_kernel(spec, k, target), kernel_of, x, counts, weights)


def routed_linear(
    x: Tensor,
    counts: Tensor,
    slices: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    spec: SliceSpec,
    activation: Activation = Activation.A16,
    prefill: Prefill = Prefill.ROUTED,
) -> Tensor:
    """`routed_linears` with one linear."""
    return routed_linears(x, counts, [slices], [scale], [zero], [bias], spec, activation, prefill)[0]


def slice_gemm(
    x: Tensor,
    offsets: Tensor,
    slices: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    spec: SliceSpec,
    activation: Activation = Activation.A16,
    prefill: Prefill = Prefill.ROUTED,
) -> Tensor:
    """`reference.slice_gemm` without waiting for the offsets."""
    counts = launch.counts_of_offsets(offsets, x.shape[0])
    return routed_linear(x, counts, slices, scale, zero, bias, spec, activation, prefill)


def elastic_linears(
    x: Tensor,
    router: Sequence[Tensor],
    thresholds: Tensor,
    hist: Tensor,
    mask: Tensor,
    kind: str,
    slices: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    spec: SliceSpec,
    activation: Activation,
    prefill: Prefill,
) -> list[Tensor]:
    """`reference.elastic_linears`: on the integer path by `prepare_for` and a launch to multiply."""
    ops.check_routed(x, router)
    weights = [Weight(*weight) for weight in zip(slices, scale, zero, bias, strict=True)]
    n = max(weight.rows for weight in weights)
    on_integers = routes(x, kind, prefill) and path_of(x, n, spec, prefill) is Path.INTEGER
    if not on_integers or _are_apart(x, weights):
        counts = route(x, router, thresholds, hist, mask, kind, prefill)
        return routed_linears(x, counts, slices, scale, zero, bias, spec, activation, prefill)
    paths.note(Path.INTEGER, launch.token_count(x), len(slices))
    prepared = prepare_for(weights, x, router, thresholds, hist, mask, kind, spec, activation)
    return _multiply_all(prepared, weights, spec, activation)


# Made once: it stands in the path of every call.
_elastic_linears = ops.takes_spec(elastic_linears)


def _elastic_linear(*args: Any) -> Tensor:
    """`elastic_linears` with one linear, as the schema of `elastic_linear` has it."""
    *router, slices, scale, zero, bias, widths, group, layout, activation, prefill = args
    weight = ([slices], [scale], [zero], [bias])
    return _elastic_linears(*router, *weight, widths, group, layout, activation, prefill)[0]


def _counts_as_given(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let an op whose caller gives the slice counts honour them: only with `route` in it does FULL make them equal."""

    @wraps(function)
    def call(*args: Any) -> Any:
        *rest, prefill = args
        return function(*rest, Prefill.ROUTED if prefill is Prefill.FULL else prefill)

    return call


def _register() -> None:
    implementations = {
        "route": ops.takes_prefill(route),
        # Sorting and indexing by tensors stay on the device: the reference is what one would write.
        "gather": reference.gather,
        "slice_gemm": ops.takes_spec(_counts_as_given(slice_gemm)),
        "scatter": reference.scatter,
        "routed_linear": ops.takes_spec(_counts_as_given(routed_linear)),
        "elastic_linear": _elastic_linear,
        "routed_linears": ops.takes_spec(_counts_as_given(routed_linears)),
        "elastic_linears": _elastic_linears,
    }
    ops.implement(implementations, "CUDA")


_register()
