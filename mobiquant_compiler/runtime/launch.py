"""Launches kernels handed to it: shapes, scratch memory and grids; nothing waits for the device.

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
from torch.nn.functional import pad

from mobiquant_compiler.errors import TooManyRows
from mobiquant_compiler.packing import unit_views
from mobiquant_compiler.spec import MULTIPROCESSORS, REGISTERS, Activation, Family, KernelSpec, SliceSpec

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
    """Tokens ready to be multiplied: slice counts and activations in fixed point, as lanes load them or as rows.

    Attributes:
        counts: Slice counts, int32 [T].
        high: High halves (all there is in a8), int8 [groups, blocks of 8 tokens, 32 lanes, group / 4]; where tokens are
            rows of 128 columns, both halves, int8 [columns / 128, halves, 8 blocks, 128].
        low: Low halves, the same shape; empty in a8, and where tokens are rows.
        affine: Step, and minus step times the sum of the integers, float32 [groups, 8 blocks, 2].
        shape: Leading dimensions of the activations.
        columns: K, columns before padding.
        dtype: Of the activations, and so of the outputs.
        sums: Sums of the integers, int32 [groups, 8 blocks], where tokens are rows; None where they are not.
        placed: Slice counts of rows and which token each is, int32 [2, T]; None where tokens are no rows. Those of most
            slices come first, of every 64, where counts were given; else tokens keep their order.
    """

    counts: Tensor
    high: Tensor
    low: Tensor
    affine: Tensor
    shape: tuple[int, ...]
    columns: int
    dtype: torch.dtype
    sums: Tensor | None = None
    placed: Tensor | None = None

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


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a CUDA device has, and those of an H100 for other devices."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


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
    assert spec.route == (counts is None), "counts are chosen, or given"
    groups, blocks = spec.k // spec.group, ceil_div(tokens, 8)
    placed = torch.empty(2, tokens, dtype=torch.int32, device=x.device) if spec.token_rows else None
    if counts is None:
        counts = torch.empty(tokens, dtype=torch.int32, device=x.device) if placed is None else placed[0]
    high, low, sums = _scratch(spec, blocks, x.device)
    affine = torch.empty(groups if spec.quantize else 0, blocks * 8, 2, dtype=torch.float32, device=x.device)
    shape, flat = tuple(x.shape[:-1]), counts.reshape(-1).contiguous()
    low_only = low[:0] if spec.token_rows else low
    prepared = Prepared(flat, high, low_only, affine, shape, columns, x.dtype, sums, placed)
    if tokens:
        energy, gain, hidden, hidden_bias, out, out_bias = [*router, *(None,) * 6][:6]
        with _current(x):
            kernel.launch(
                _grid_of_tokens(spec, tokens),
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
                sums_ptr=sums,
                placed_ptr=placed,
                tokens=tokens,
                capacity=0 if mask is None else mask.numel(),
            )
    return prepared


def _grid_of_tokens(spec: KernelSpec, tokens: int) -> tuple[int, ...]:
    """Return the grid of route_quantize."""
    programs = int(spec.route) + (ceil_div(spec.k, spec.block_w) if spec.quantize else 0)
    return (tokens if spec.quantize else ceil_div(tokens, spec.block_m), programs)


def _scratch(spec: KernelSpec, blocks: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return memory for high halves, low halves and the sums of integers; as rows both halves share the first."""
    halves = (2 if spec.activation is Activation.A16 else 1) if spec.quantize else 0
    groups = spec.k // spec.group
    if spec.token_rows:
        rows = torch.empty(ceil_div(spec.k, 128), halves, blocks * 8, 128, dtype=torch.int8, device=device)
        return rows, rows[:, halves - 1], torch.empty(groups, blocks * 8, dtype=torch.int32, device=device)
    lanes = torch.empty(halves, groups, blocks, 32, spec.group // 4, dtype=torch.int8, device=device)
    return lanes[0] if halves else lanes, lanes[1] if halves == 2 else lanes[:0], None


def multiply(
    kernel: LaunchableKernel, prepared: Prepared, weights: Sequence[Weight], *, at_once: int | None = None
) -> list[Tensor]:
    """Launch sliced_mma, resident_mma or batch_wgmma: multiply prepared tokens by every weight.

    Each token is multiplied by the slices that its count says.

    Args:
        kernel: sliced_mma or resident_mma for tokens as lanes load them, batch_wgmma for rows.
        prepared: What `prepare` gave for as many columns.
        weights: Of batch_wgmma, with rows that are a multiple of its ``row_unit``.
        at_once: Programs that a device runs at a time, where they go from one tile of rows to the next; by default as
            many as there are registers for.

    Returns:
        [..., N] a weight, in the dtype of the activations.

    Raises:
        TooManyRows: more output rows than a grid has programs for, a million and more.
    """
    spec = kernel.spec
    if spec.family is Family.SLICED_MMA and spec.block_m == 1 and any(w.rows < spec.block_n for w in weights):
        ys = _multiply_whole(kernel, prepared, [_with_rows(weight, spec) for weight in weights], at_once)
        return [y[..., : weight.rows].contiguous() for y, weight in zip(ys, weights, strict=True)]
    return _multiply_whole(kernel, prepared, weights, at_once)


def _multiply_whole(
    kernel: LaunchableKernel, prepared: Prepared, weights: Sequence[Weight], at_once: int | None
) -> list[Tensor]:
    """Do what `multiply` says, with weights of as many rows as a program reads."""
    spec, tokens, device = kernel.spec, prepared.tokens, prepared.counts.device
    blocks = sum(ceil_div(weight.rows, spec.block_n) for weight in weights)
    if blocks > MOST_BLOCKS:
        rows = sum(weight.rows for weight in weights)
        raise TooManyRows(where="multiply", got=rows, wanted=MOST_BLOCKS * spec.block_n)
    ys = [torch.empty(*prepared.shape, w.rows, dtype=prepared.dtype, device=device) for w in weights]
    if tokens == 0:
        return ys
    own = _rows_arguments(prepared) if spec.family is Family.BATCH_WGMMA else _lanes_arguments(prepared)
    for number, (weight, y) in enumerate(zip(weights, ys, strict=True)):
        own |= _weight_arguments(spec, str(number or ""), weight, y)
    if spec.family is Family.RESIDENT_MMA:
        assert tokens <= spec.block_m, "programs that go from tile to tile have one block of tokens"
        # As few as are done no later: with the same number of tiles each, none runs alone at the end.
        turns = ceil_div(blocks, at_once or programs_at_once(spec, device))
        blocks = ceil_div(blocks, max(1, turns))
    with _current(prepared.counts):
        kernel.launch((ceil_div(tokens, spec.block_m), blocks), tokens=tokens, **own)
    return ys


def _with_rows(weight: Weight, spec: KernelSpec) -> Weight:
    """Return a weight of at least the rows of a program, zeros where it lacks any: one token's compare none."""
    lacks = spec.block_n - weight.rows
    if lacks <= 0:
        return weight
    sliced = SliceSpec(spec.widths, spec.group, spec.layout)
    views = unit_views(weight.slices, sliced, sliced.num_slices)
    words = [pad(view, (0, 0, 0, lacks)).flatten() for view in views]
    slices = torch.cat(words).view(weight.slices.shape[0], spec.block_n, -1)
    scale, zero = (pad(facts, (0, 0, 0, lacks)) for facts in (weight.scale, weight.zero))
    return Weight(slices, scale, zero, None if weight.bias is None else pad(weight.bias, (0, lacks)))


def programs_at_once(spec: KernelSpec, device: torch.device) -> int:
    """Return how many programs a device runs at a time, of a kernel whose registers are what limits them."""
    assert spec.max_registers, "a limit of registers is part of the spec"
    return multiprocessors(device) * (REGISTERS // (32 * spec.num_warps * spec.max_registers))


def _lanes_arguments(prepared: Prepared) -> dict[str, Any]:
    """Return the tokens of a launch of sliced_mma or resident_mma."""
    assert prepared.sums is None, "these tokens are rows"
    return {
        "counts_ptr": prepared.counts,
        "high_ptr": prepared.high.view(torch.int32),
        "low_ptr": prepared.low.view(torch.int32),
        "affine_ptr": prepared.affine.view(torch.int32),
    }


def _rows_arguments(prepared: Prepared) -> dict[str, Any]:
    """Return the tokens of a launch of batch_wgmma, activations of as many dimensions as their boxes have."""
    assert prepared.sums is not None, "these tokens are as lanes load them"
    return {
        "acts_ptr": prepared.high.flatten(0, 1),
        "facts_ptr": prepared.affine.flatten(1),
        "sums_ptr": prepared.sums,
        "placed_ptr": prepared.placed,
    }


def _weight_arguments(spec: KernelSpec, mark: str, weight: Weight, y: Tensor) -> dict[str, Any]:
    """Return the arguments of a launch that are about one weight."""
    described = spec.family in (Family.BATCH_WGMMA, Family.RESIDENT_MMA)
    slices = rows_of_words(weight.slices, spec.k) if described else aligned(weight.slices)
    if spec.family is Family.BATCH_WGMMA:
        assert weight.rows % spec.row_unit == 0, f"{weight.rows} rows are no multiple of {spec.row_unit}"
        rows = {f"row{mark}_units": weight.rows // spec.row_unit}
    else:
        rows = {f"n{mark}_rows": weight.rows}
    return rows | {
        f"slices{mark}_ptr": slices,
        f"scale{mark}_ptr": aligned(weight.scale),
        f"zero{mark}_ptr": aligned(weight.zero),
        f"bias{mark}_ptr": _packed(weight.bias),
        f"y{mark}_ptr": y,
    }


def counts_of_offsets(offsets: Tensor, tokens: int) -> Tensor:
    """Return the slice counts int32 [T] of tokens in the order of `gather`, from its offsets int32 [E + 1]."""
    order = torch.arange(tokens, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous(), order, right=True, out_int32=True) + 1


def _packed(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def rows_of_words(slices: Tensor, k: int) -> Tensor | None:
    """Return slices of two bits as rows, int32 [slices N, k / 16], as descriptors want them: 16 columns a word."""
    return aligned(slices.reshape(-1, k // 16))


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
