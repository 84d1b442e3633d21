"""Brings ops, code generation and launches together: the CUDA implementations of the ops.

Importing this module registers them and imports neither triton nor a kernel; both happen at the first call on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mobiquant_compiler import ops, reference
from mobiquant_compiler.kernels import (
    dequantize_kernel,
    fused_is_small,
    fused_kernel,
    gather_kernel,
    gluon_refusal,
    multiply_kernel,
    prepare_kernel,
    target_of,
)
from mobiquant_compiler.routing import idle_router, prepare, route, routes
from mobiquant_compiler.runtime import fused, launch, paths
from mobiquant_compiler.runtime import prefill as workspace
from mobiquant_compiler.runtime.launch import Prepared, Weight
from mobiquant_compiler.spec import PREFILL_TOKENS, Activation, Path, Prefill, SliceSpec

if TYPE_CHECKING:
    from mobiquant_compiler.codegen.cache import Kernel
    from mobiquant_compiler.codegen.crossover import Crossover


def with_counts(prepared: Prepared, counts: Tensor) -> Prepared:
    """Return prepared tokens with other slice counts, int32 [T]."""
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


def _multiply_all(
    prepared: Prepared, weights: Sequence[Weight], spec: SliceSpec, activation: Activation
) -> list[Tensor]:
    """Multiply prepared tokens by several weights: one launch where a kernel serves them all, else one each."""
    alike = len({(w.scale.dtype, None if w.bias is None else w.bias.dtype) for w in weights}) == 1
    if len(weights) > 1 and not alike:
        return [y for weight in weights for y in _multiply_all(prepared, [weight], spec, activation)]
    rows = sum(weight.rows for weight in weights)
    kernel = _multiply_kernel(weights, prepared.tokens, rows, prepared.columns, spec, activation)
    return launch.multiply(kernel, prepared, weights)


def _multiply_kernel(
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
        return by_fused(x, counts, weights, spec)
    return by_integers(x, counts, weights, spec, activation)


def by_integers(
    x: Tensor, counts: Tensor, weights: Sequence[Weight], spec: SliceSpec, activation: Activation
) -> list[Tensor]:
    """Multiply tokens of given slice counts by weights on the integer path; returns [..., N] a weight."""
    kernel = prepare_kernel(spec, x.shape[-1], target_of(x.device), activation, route=False, quantize=True)
    return _multiply_all(launch.prepare(kernel, x, counts=counts), weights, spec, activation)


def by_workspace(
    x: Tensor, counts: Tensor, weights: Sequence[Weight], spec: SliceSpec, prefill: Prefill
) -> list[Tensor]:
    """Multiply tokens of given slice counts, all equal with `Prefill.FULL`, by dequantized weights."""
    full = prefill is Prefill.FULL
    kernel = dequantize_kernel(spec, x.shape[-1], target_of(x.device), sorted_rows=not full)
    if full:  # all tokens have one count: nothing has to be sorted
        return [workspace.uniform_linear(kernel, x, counts, weight) for weight in weights]
    return workspace.workspace_linears(kernel, x, counts, weights)


def by_fused(x: Tensor, counts: Tensor, weights: Sequence[Weight], spec: SliceSpec) -> list[Tensor]:
    """Multiply tokens of given slice counts by weights that are made in registers; returns [..., N] a weight."""
    k, target = x.shape[-1], target_of(x.device)

    def kernel_of(weight: Weight, tokens: int) -> Kernel:
        facts = {"row_unit": fused.row_unit(weight.rows), "has_bias": weight.bias is not None}
        return fused_kernel(spec, k, target, small=fused_is_small(tokens, weight.rows, spec.num_slices), **facts)

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
    """`reference.elastic_linears`: two launches on the integer path, one to route and quantize, one to multiply."""
    n = max(weight.shape[1] for weight in slices)
    if not routes(x, kind, prefill) or path_of(x, n, spec, prefill) is not Path.INTEGER:
        counts = route(x, router, thresholds, hist, mask, kind, prefill)
        return routed_linears(x, counts, slices, scale, zero, bias, spec, activation, prefill)
    paths.note(Path.INTEGER, launch.token_count(x), len(slices))
    prepared = prepare(x, router, thresholds, hist, mask, spec, activation)
    weights = [Weight(*weight) for weight in zip(slices, scale, zero, bias, strict=True)]
    return _multiply_all(prepared, weights, spec, activation)


# Made once: it stands in the path of every call.
_elastic_linears = ops.takes_spec(elastic_linears)


def _elastic_linear(*args: Any) -> Tensor:
    """`elastic_linears` with one linear, as the schema of `elastic_linear` has it."""
    *router, slices, scale, zero, bias, widths, group, layout, activation, prefill = args
    weight = ([slices], [scale], [zero], [bias])
    return _elastic_linears(*router, *weight, widths, group, layout, activation, prefill)[0]


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
    launched = sum(
        _warm_call(weights, torch.zeros(tokens, k, dtype=x_dtype, device=device), spec, n, activation, hidden)
        for tokens in calls
        if max_tokens is None or tokens <= max_tokens
    )
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return launched


def _warm_call(
    weights: Sequence[Weight], x: Tensor, spec: SliceSpec, n: int, activation: Activation, hidden: int
) -> int:
    """Run every kernel that a call of as many tokens as `x` has can run; returns how many."""
    router, kind = idle_router(x.shape[-1], spec.num_slices, hidden, x.device)
    limits = router[1]
    hist = torch.zeros(spec.num_slices, dtype=torch.int64, device=x.device)
    mask = torch.zeros(1, dtype=torch.int32, device=x.device)
    counts = route(x, router, limits, hist, mask, kind)
    quantize = prepare_kernel(spec, x.shape[-1], target_of(x.device), activation, route=False, quantize=True)
    launch.prepare(quantize, x, counts=counts)
    kernel = _multiply_kernel(weights, x.shape[0], n, x.shape[-1], spec, activation)
    launch.multiply(kernel, prepare(x, router, limits, hist, mask, spec, activation), weights)
    if x.shape[0] <= PREFILL_TOKENS:
        return 4
    ways = [Prefill.FULL] if x.is_cuda else []
    ways += [Prefill.ROUTED] if workspace.supports(x, n, x.shape[-1]) is None else []
    for prefill in ways:
        by_workspace(x, counts, weights, spec, prefill)
    return 4 + len(ways) + (_warm_fused(weights, x, counts, spec, n) if fused_refusal(x, spec) is None else 0)


def _warm_fused(weights: Sequence[Weight], x: Tensor, counts: Tensor, spec: SliceSpec, n: int) -> int:
    """Run the kernels that make weights in registers, of both tiles; returns how many."""
    k, target, units = x.shape[-1], target_of(x.device), fused.row_units(n, len(weights))
    tokens = fused.gather(gather_kernel(spec, k, target), x, counts)
    for unit in units:
        slices = torch.zeros(spec.packed_shape(unit, k), dtype=torch.int32, device=x.device)
        scale = weights[0].scale.expand(unit, -1)
        bias = None if weights[0].bias is None else weights[0].bias.expand(unit)
        for small in (True, False):
            kernel = fused_kernel(spec, k, target, small=small, row_unit=unit, has_bias=bias is not None)
            fused.multiply(kernel, tokens, Weight(slices, scale, scale, bias))
    return 1 + 2 * len(units)


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
