"""Launches kernels handed to it: shapes, scratch memory and grids, and nothing that waits for the device.

Everything here can be captured into a CUDA graph: sizes follow from shapes, what depends on data is read by kernels.
Device-agnostic: in Triton's interpreter the same functions run on CPU tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from mobiquant_compiler.spec import Activation, Family, KernelSpec

log = logging.getLogger(__name__)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LaunchableKernel(Protocol):
    """What a kernel must offer."""

    @property
    def spec(self) -> KernelSpec:
        """What it was made from; grids follow from its tile."""

    def launch(self, grid: tuple[int, ...], **arguments: Any) -> None:
        """Enqueue it on the current stream."""


@dataclass(frozen=True, slots=True)
class LinearKernels:
    """The two kernels of one linear for one class of token counts.

    Attributes:
        quantize: Activations to fixed point, in the order `multiply` reads.
        multiply: decode_gemv for one token, grouped_gemm for more.
    """

    quantize: LaunchableKernel
    multiply: LaunchableKernel


@dataclass(frozen=True, slots=True)
class FixedPoint:
    """Quantized activations.

    Attributes:
        high: High halves (all there is in a8), int8 [T, K_padded].
        low: Low halves, int8 [T, K_padded]; empty in a8.
        step: float32 [T, K_padded / group].
        total: Sum of the integers of each group, int32 of the same shape.
    """

    high: Tensor
    low: Tensor
    step: Tensor
    total: Tensor


def ceil_div(value: int, block: int) -> int:
    """Return how many blocks cover `value`."""
    return -(-value // block)


def takes(x: Tensor) -> bool:
    """Say whether kernels take activations of this dtype; others go to the reference, on record."""
    if x.dtype in KERNEL_DTYPES:
        return True
    _note_fallback(f"activations are {x.dtype}")
    return False


@cache
def _note_fallback(reason: str) -> None:
    """Say once why a call went to the reference: it is slow, and waits for the device."""
    log.warning("no kernel: %s; using the reference in plain torch, here and from now on", reason)


def route(
    kernel: LaunchableKernel, x: Tensor, router: Sequence[Tensor], thresholds: Tensor, hist: Tensor, mask: Tensor
) -> Tensor:
    """Launch the route kernel; `reference.route` with ``kind="energy"``.

    Shapes: x [..., K]; returns int32 [...].
    """
    tokens, columns = _token_count(x), x.shape[-1]
    counts = torch.empty(x.shape[:-1], dtype=torch.int32, device=x.device)
    if tokens == 0:
        return counts
    energy, gain = router
    with _current(x):
        kernel.launch(
            (ceil_div(tokens, kernel.spec.block_m),),
            x_ptr=_rows(x),
            energy_ptr=energy.contiguous(),
            gain_ptr=gain.contiguous(),
            thresholds_ptr=thresholds.contiguous(),
            hist_ptr=hist,
            mask_ptr=mask,
            counts_ptr=counts,
            tokens=tokens,
            columns=columns,
            capacity=mask.numel(),
        )
    return counts


def quantize(kernel: LaunchableKernel, x: Tensor) -> FixedPoint:
    """Launch the quantize kernel on activations [T, K]."""
    spec = kernel.spec
    tokens, columns = x.shape
    groups = spec.k // spec.group
    halves = 2 if spec.activation is Activation.A16 else 1
    bytes_ = torch.empty(halves, tokens, spec.k, dtype=torch.int8, device=x.device)
    step = torch.empty(tokens, groups, dtype=torch.float32, device=x.device)
    total = torch.empty(tokens, groups, dtype=torch.int32, device=x.device)
    fixed = FixedPoint(bytes_[0], bytes_[halves - 1], step, total)
    kernel.launch(
        (tokens, ceil_div(spec.k, spec.block_w)),
        x_ptr=x,
        high_ptr=fixed.high,
        low_ptr=fixed.low,
        step_ptr=step,
        total_ptr=total,
        columns=columns,
    )
    return fixed


def routed_linear(
    kernels: LinearKernels,
    x: Tensor,
    counts: Tensor,
    slices: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Multiply each token by the weight of its slice count; `reference.routed_linear`.

    Shapes: x [..., K]; counts int32 [...]; slices int32 [total_bits, N, K_padded / 32]; scale, zero
        [N, K_padded / group]; bias [N]; returns [..., N] in the dtype of x.
    """
    tokens, n = _token_count(x), slices.shape[1]
    y = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    if tokens == 0:
        return y
    with _current(x):
        fixed = quantize(kernels.quantize, _rows(x))
        _multiply(kernels.multiply, fixed, counts.reshape(-1).contiguous(), slices, scale, zero, bias, y)
    return y


def _multiply(
    kernel: LaunchableKernel,
    fixed: FixedPoint,
    counts: Tensor,
    slices: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    """Launch decode_gemv or grouped_gemm, whichever `kernel` is, into y."""
    spec, tokens, n = kernel.spec, counts.shape[0], slices.shape[1]
    # Tokens of equal count come to lie in one tile; sorting on the device needs no word from it.
    rows = torch.sort(counts, stable=True).indices if spec.sorted_rows else None
    decode = spec.family is Family.DECODE
    grid = (ceil_div(n, spec.block_n),) if decode else (ceil_div(tokens, spec.block_m), ceil_div(n, spec.block_n))
    kernel.launch(
        grid,
        high_ptr=fixed.high.view(torch.int32) if decode else fixed.high,
        low_ptr=fixed.low.view(torch.int32) if decode else fixed.low,
        step_ptr=fixed.step,
        total_ptr=fixed.total,
        counts_ptr=counts,
        rows_ptr=rows,
        slices_ptr=slices.contiguous(),
        scale_ptr=scale.contiguous(),
        zero_ptr=zero.contiguous(),
        bias_ptr=None if bias is None else bias.contiguous(),
        y_ptr=y,
        tokens=tokens,
        n_rows=n,
    )


def slice_gemm(
    kernels: LinearKernels,
    x: Tensor,
    offsets: Tensor,
    slices: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Multiply tokens in the order of `gather` by the weight of their slice count; `reference.slice_gemm`.

    Shapes: x [T, K]; offsets int32 [E + 1]; returns [T, N].
    """
    order = torch.arange(x.shape[0], dtype=offsets.dtype, device=x.device)
    counts = torch.searchsorted(offsets[1:].contiguous(), order, right=True, out_int32=True) + 1
    return routed_linear(kernels, x, counts, slices, scale, zero, bias)


def _current(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of `x` current: kernels are launched there. Costs nothing where it already is."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def _token_count(x: Tensor) -> int:
    tokens = 1
    for size in x.shape[:-1]:
        tokens *= size
    return tokens


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()
