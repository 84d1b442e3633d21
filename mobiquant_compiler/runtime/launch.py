"""Launches kernels handed to it: shapes, scratch memory and grids, and nothing that waits for the device.

Everything here can be captured into a CUDA graph: sizes follow from shapes, what depends on data is read by kernels.
Device-agnostic: in Triton's interpreter the same functions run on CPU tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from mobiquant_compiler.errors import TooManyRows
from mobiquant_compiler.spec import Activation, KernelSpec

log = logging.getLogger(__name__)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)
MOST_BLOCKS = 65535  # programs of a grid's second axis (CUDA programming guide, table of limits)


class LaunchableKernel(Protocol):
    """What a kernel must offer."""

    @property
    def spec(self) -> KernelSpec:
        """What it was made from; grids follow from its tile."""

    def launch(self, grid: tuple[int, ...], **arguments: Any) -> None:
        """Enqueue it on the current stream."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Tokens ready to be multiplied: slice counts and activations in fixed point, in the order lanes load them.

    Attributes:
        counts: Slice counts, int32 [T].
        high: High halves (all there is in a8), int8 [groups, blocks of 8 tokens, 32 lanes, group / 4].
        low: Low halves, the same shape; empty in a8.
        affine: Step, and minus step times the sum of the integers, float32 [groups, 8 blocks, 2].
        shape: Leading dimensions of the activations.
        columns: K, columns before padding.
        dtype: Of the activations, and so of the outputs.
    """

    counts: Tensor
    high: Tensor
    low: Tensor
    affine: Tensor
    shape: tuple[int, ...]
    columns: int
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        """T, the number of tokens."""
        return self.counts.numel()


@dataclass(frozen=True, slots=True)
class Weight:
    """One sliced weight of a launch.

    Attributes:
        slices: int32 [total_bits, N, K_padded / 32].
        scale: [N, K_padded / group].
        zero: Same shape and dtype.
        bias: [N] or None.
    """

    slices: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None

    @property
    def rows(self) -> int:
        """N, output rows."""
        return self.slices.shape[1]


def ceil_div(value: int, block: int) -> int:
    """Return how many blocks cover `value`."""
    return -(-value // block)


def takes(x: Tensor) -> bool:
    """Say whether kernels take activations of this dtype on this device; others go to the reference, on record."""
    reason = refusal(x.dtype, x.device)
    if reason is None:
        return True
    _note_fallback(reason)
    return False


@lru_cache(maxsize=64)
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


@cache
def refusal(dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why no kernel runs, None where kernels do."""
    if dtype not in KERNEL_DTYPES:
        return f"activations are {dtype}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has no 16 x 8 x 32 products of bytes (sm_80 and later do)"
    return None


@cache
def _note_fallback(reason: str) -> None:
    """Say once why a call went to the reference: it is slow, and waits for the device."""
    log.warning("no kernel: %s; using the reference in plain torch, here and from now on", reason)


def prepare(
    kernel: LaunchableKernel,
    x: Tensor,
    router: Sequence[Tensor] = (),
    thresholds: Tensor | None = None,
    hist: Tensor | None = None,
    mask: Tensor | None = None,
    counts: Tensor | None = None,
) -> Prepared:
    """Launch route_quantize: `reference.route`, activations in fixed point, or both.

    Args:
        kernel: route_quantize; without ``route`` it takes `counts`, with it the router's tensors.
        x: [..., K].
        router: energy float32 [K], gain float32 [E - 1]; of a trained router also its network, float16 (see
            `reference.mlp_scores`), of as many hidden units as the kernel has.
        thresholds: float32 [E - 1].
        hist: int64 [E], added to.
        mask: int32 [1 + capacity].
        counts: int32 [...], slice counts that are known already.
    """
    spec, tokens, columns = kernel.spec, token_count(x), x.shape[-1]
    groups, blocks = spec.k // spec.group, ceil_div(tokens, 8)
    if counts is None:
        counts = torch.empty(tokens, dtype=torch.int32, device=x.device)
    halves = (2 if spec.activation is Activation.A16 else 1) if spec.quantize else 0
    bytes_ = torch.empty(halves, groups, blocks, 32, spec.group // 4, dtype=torch.int8, device=x.device)
    affine = torch.empty(groups if halves else 0, blocks * 8, 2, dtype=torch.float32, device=x.device)
    high = bytes_[0] if halves else bytes_
    low = bytes_[1] if halves == 2 else bytes_[:0]
    prepared = Prepared(counts.reshape(-1).contiguous(), high, low, affine, tuple(x.shape[:-1]), columns, x.dtype)
    if tokens:
        energy, gain, hidden, hidden_bias, out, out_bias = [*router, *(None,) * 6][:6]
        programs = ceil_div(spec.k, spec.block_w) if spec.quantize else 0
        with _current(x):
            kernel.launch(
                (tokens if spec.quantize else ceil_div(tokens, spec.block_m), int(spec.route) + programs),
                x_ptr=aligned(_rows(x)),
                energy_ptr=aligned(energy),
                gain_ptr=_packed(gain),
                hidden_ptr=aligned(hidden),
                hidden_bias_ptr=_packed(hidden_bias),
                out_ptr=_packed(out),
                out_bias_ptr=_packed(out_bias),
                thresholds_ptr=_packed(thresholds),
                hist_ptr=hist,
                mask_ptr=mask,
                counts_ptr=prepared.counts,
                high_ptr=high.view(torch.int32),
                low_ptr=low.view(torch.int32),
                affine_ptr=affine,
                tokens=tokens,
                capacity=0 if mask is None else mask.numel(),
            )
    return prepared


def multiply(kernel: LaunchableKernel, prepared: Prepared, weights: Sequence[Weight]) -> list[Tensor]:
    """Launch sliced_mma: multiply prepared tokens by every weight, each token by the slices its count says.

    Returns:
        [..., N] a weight, in the dtype of the activations.

    Raises:
        TooManyRows: more output rows than a grid has programs for, a million and more.
    """
    spec, tokens, device = kernel.spec, prepared.tokens, prepared.counts.device
    blocks = sum(ceil_div(weight.rows, spec.block_n) for weight in weights)
    if blocks > MOST_BLOCKS:
        rows = sum(weight.rows for weight in weights)
        raise TooManyRows(where="multiply", got=rows, wanted=MOST_BLOCKS * spec.block_n)
    ys = [torch.empty(*prepared.shape, w.rows, dtype=prepared.dtype, device=device) for w in weights]
    if tokens == 0:
        return ys
    arguments: dict[str, Any] = {}
    for number, (weight, y) in enumerate(zip(weights, ys, strict=True)):
        mark = str(number or "")
        arguments |= {
            f"slices{mark}_ptr": aligned(weight.slices),
            f"scale{mark}_ptr": aligned(weight.scale),
            f"zero{mark}_ptr": aligned(weight.zero),
            f"bias{mark}_ptr": _packed(weight.bias),
            f"y{mark}_ptr": y,
            f"n{mark}_rows": weight.rows,
        }
    with _current(prepared.counts):
        kernel.launch(
            (ceil_div(tokens, spec.block_m), blocks),
            high_ptr=prepared.high.view(torch.int32),
            low_ptr=prepared.low.view(torch.int32),
            affine_ptr=prepared.affine.view(torch.int32),
            counts_ptr=prepared.counts,
            tokens=tokens,
            **arguments,
        )
    return ys


def counts_of_offsets(offsets: Tensor, tokens: int) -> Tensor:
    """Return the slice counts int32 [T] of tokens in the order of `gather`, from its offsets int32 [E + 1]."""
    order = torch.arange(tokens, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous(), order, right=True, out_int32=True) + 1


def _packed(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def aligned(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor packed and aligned to 16 bytes, as vector loads want it; nearly always it is."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _current(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of `x` current: kernels are launched there. Costs nothing where it already is."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def token_count(x: Tensor) -> int:
    """Return how many tokens activations [..., K] hold."""
    tokens = 1
    for size in x.shape[:-1]:
        tokens *= size
    return tokens


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()
