"""Many tokens in one launch a weight: grouped by slice count, multiplied by weights that are made in registers.

Everything here can be captured into a CUDA graph: sizes follow from shapes, what depends on data is read by kernels.

Numerics: weights are a code less its middle, times the scale, plus an offset, in the dtype of the activations: scale,
offset and weight are rounded once each (in float16 what is below 6e-5 loses bits). Sums are float32; bias is added
before they are rounded. Where programs do not fill their last wave, and the kernel splits them, a sum is that of parts
of the columns. How many parts depends on how many tokens there are of each count, so the last bits of a token's result
depend on its companions. The order within a part, and of parts, is fixed: a call gives the same bits every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mobiquant_compiler.runtime.launch import (
    LaunchableKernel,
    Weight,
    capability,
    ceil_div,
    multiprocessors,
    rows_of_words,
)
from mobiquant_compiler.spec import Family, SliceSpec, most_parts, split_programs

DTYPES = (torch.bfloat16, torch.float16)
CAPABILITY = (9, 0)  # warpgroup products with an operand in registers are an instruction of sm_90 alone
_COLUMNS = 128  # of a step of the kernel
_SLOT = 256 * 128  # sums of a part of a tile, as split_columns has it
_THREADS = 256  # that multiply: a mark each


@dataclass(frozen=True, slots=True)
class GatheredTokens:
    """Tokens brought together by slice count, for any number of linears that share their decision.

    Attributes:
        x: [T, K_padded up to 128], in the order of their counts, columns in the order of operands.
        rows: int32 [T], where each token came from.
        offsets: int32 [E + 1], on the device; tokens of count c are ``offsets[c - 1] : offsets[c]``.
        at_once: Programs of `multiply` that run at a time: those that do not fill their last wave are split, or tiles
            have half the tokens where as many are enough.
        partial: float32, room for the sums of parts, 128 KB each (some MB where a linear is split); linears take it one
            after the other, as they do `marks`.
        marks: int32, zeros before and after each linear: what says that parts are there.
    """

    x: Tensor
    rows: Tensor
    offsets: Tensor
    at_once: int
    partial: Tensor
    marks: Tensor

    @property
    def tokens(self) -> int:
        """T, the number of tokens."""
        return self.rows.numel()


def supports(x: Tensor, spec: SliceSpec) -> str | None:
    """Return why `multiply` cannot take these activations with such weights, None where it can.

    Args:
        x: [..., K]; only its columns, dtype and device matter.
        spec: Widths, group and layout of the weights.
    """
    if not x.is_cuda or torch.version.hip is not None:
        return f"products of warpgroups need a CUDA device of sm_90, activations are on {x.device}"
    if x.dtype not in DTYPES:
        return f"activations are {x.dtype}, not bfloat16 or float16"
    if not takes_slices(spec):
        return f"slices are {spec.widths} in {spec.layout}, not up to four of two bits in slice_major"
    if not takes_columns(spec, x.shape[-1]):
        return f"rows of {spec.padded(x.shape[-1])} columns cannot be copied in boxes: wanted a multiple of 64"
    found = capability(x.device)
    if found != CAPABILITY:
        return f"the GPU is sm_{found[0]}{found[1]}, not sm_90"
    return None


@lru_cache(maxsize=64)
def takes_slices(spec: SliceSpec) -> bool:
    """Say whether the kernel knows such slices."""
    return spec.in_bit_pairs


def takes_columns(spec: SliceSpec, k: int) -> bool:
    """Say whether rows of words begin at multiples of 16 bytes, as the copy engine wants them."""
    return spec.padded(k) % 64 == 0


def row_units(n: int, parts: int) -> tuple[int, ...]:
    """Return the ``row_unit`` of kernels that a launch can take, given its output rows in all.

    One weight takes one kernel. Of several, whose rows are not known one by one, some may take either.
    """
    return (row_unit(n),) if parts == 1 else (1, 8)


def row_unit(n: int) -> int:
    """Return the ``row_unit`` of the kernel for a weight of `n` rows."""
    return 1 if n % 8 else 8


def gather(
    kernel: LaunchableKernel,
    x: Tensor,
    counts: Tensor,
    *,
    room: tuple[int, int] | None = None,
    at_once: int | None = None,
) -> GatheredTokens:
    """Bring tokens of equal slice count together, in their order, and their columns into the order of operands.

    Args:
        kernel: gather_tokens.
        x: [T, K].
        counts: int32, T of them in any shape; values outside 1..E count as the nearest.
        room: For parts of programs that kernels of `multiply` split: `room_for_parts`; as much as any needs by default.
        at_once: Programs of `multiply` that run at a time, the device's multiprocessors by default.
    """
    spec, (tokens, columns) = kernel.spec, x.shape
    assert spec.family is Family.GATHER_TOKENS, f"{spec.family} gathers nothing"
    width = ceil_div(spec.k, _COLUMNS) * _COLUMNS
    gathered = torch.empty(tokens, width, dtype=x.dtype, device=x.device)
    rows = torch.empty(tokens, dtype=torch.int32, device=x.device)
    offsets = torch.empty(len(spec.widths) + 1, dtype=torch.int32, device=x.device)
    at_once = multiprocessors(x.device) if at_once is None else at_once
    slots, programs = most_room(spec.k, at_once) if room is None else room
    partial = torch.empty(slots * _SLOT, dtype=torch.float32, device=x.device)
    marks = torch.empty(programs * _THREADS, dtype=torch.int32, device=x.device)
    kernel.launch(
        (ceil_div(tokens, spec.block_m),),
        x_ptr=x.contiguous(),
        counts_ptr=counts.reshape(-1).contiguous(),
        rows_ptr=rows,
        offsets_ptr=offsets,
        gathered_ptr=gathered,
        marks_ptr=marks,
        tokens=tokens,
        columns=columns,
        marks=marks.numel(),
    )
    return GatheredTokens(gathered, rows, offsets, at_once, partial, marks)


def most_room(k: int, at_once: int) -> tuple[int, int]:
    """Return how many parts leave their sums at most, and how many programs are split at most, whatever the shapes.

    Of a program that is split into S parts S - 1 leave something. Parts are as many as run at a time or fewer, but
    thirds, which may be twice as many.
    """
    parts = most_parts(k)
    if parts < 3:
        return at_once * (parts - 1) // parts, at_once // 2 * (parts - 1)
    split = 2 * at_once // 3
    return max(at_once * (parts - 1) // parts, 2 * split), split


def multiply(kernel: LaunchableKernel, tokens: GatheredTokens, weight: Weight) -> Tensor:
    """Multiply each token by the weight of its slice count; returns [T, N] in the order before gathering.

    Args:
        kernel: sliced_wgmma.
        tokens: What `gather` gave for as many columns.
        weight: Its rows are a multiple of the kernel's ``row_unit``.
    """
    spec = kernel.spec
    assert spec.family is Family.SLICED_WGMMA, f"{spec.family} multiplies no gathered tokens"
    assert weight.rows % spec.row_unit == 0, f"{weight.rows} rows are no multiple of {spec.row_unit}"
    y = torch.empty(tokens.tokens, weight.rows, dtype=tokens.x.dtype, device=tokens.x.device)
    blocks = ceil_div(weight.rows, spec.block_n)
    facts = (tokens.tokens, len(spec.widths), spec.block_m)
    tiles = most_tiles(*facts, tokens.at_once // blocks)
    programs = most_programs(*facts, blocks, tokens.at_once, spec.k) if spec.split else tiles * blocks
    slots, split = _room_of(kernel, weight, tokens.tokens, tokens.at_once)
    enough = tokens.partial.numel() >= slots * _SLOT and tokens.marks.numel() >= split * _THREADS
    assert enough, "tokens were gathered for kernels that split less, or nothing"
    kernel.launch(
        (programs,),
        x_ptr=tokens.x,
        rows_ptr=tokens.rows,
        offsets_ptr=tokens.offsets,
        slices_ptr=rows_of_words(weight.slices, spec.k),
        scale_ptr=weight.scale.contiguous(),
        zero_ptr=weight.zero.contiguous(),
        bias_ptr=None if weight.bias is None else weight.bias.contiguous(),
        y_ptr=y,
        partial_ptr=tokens.partial,
        marks_ptr=tokens.marks,
        tiles=tiles,
        at_once=tokens.at_once,
        row_units=weight.rows // spec.row_unit,
    )
    return y


def most_tiles(tokens: int, groups: int, block_m: int, together: int) -> int:
    """Return how many tiles there are at most where no program is split, however many tokens each of the groups has.

    Of groups that end inside a tile there is one less than there are groups. Tiles of half the tokens are more, but
    only made where no more than `together` of them are needed.
    """
    ends = groups - 1
    return max(ceil_div(tokens, block_m) + ends, min(ceil_div(tokens, block_m // 2) + ends, together))


@lru_cache(maxsize=1024)
def most_programs(tokens: int, groups: int, block_m: int, blocks: int, at_once: int, k: int) -> int:
    """Return how many programs there are at most, parts too, however many tokens each of the groups has.

    More tiles are not always more programs: fewer may be split into more parts.
    """
    waves = _waves(tokens, groups, block_m, blocks, at_once, k)
    return max(whole + rest * parts for whole, rest, parts in waves)


@lru_cache(maxsize=1024)
def room_for_parts(tokens: int, groups: int, block_m: int, blocks: int, at_once: int, k: int) -> tuple[int, int]:
    """Return how much room parts take at most, of the programs that `most_programs` counts.

    Returns:
        Parts that leave their sums, 128 KB each, and programs that are split.
    """
    waves = _waves(tokens, groups, block_m, blocks, at_once, k)
    cut = [(rest, parts) for _, rest, parts in waves if parts > 1]
    return max((rest * (parts - 1) for rest, parts in cut), default=0), max((rest for rest, _ in cut), default=0)


def _waves(tokens: int, groups: int, block_m: int, blocks: int, at_once: int, k: int) -> Iterator[tuple[int, int, int]]:
    """Return `split_programs` of every number of tiles that tokens can make.

    Of groups that end inside a tile there is one less than there are groups.
    """
    least = ceil_div(tokens, block_m)
    return (split_programs(tiles * blocks, at_once, k) for tiles in range(least, least + groups))


def _room_of(kernel: LaunchableKernel, weight: Weight, tokens: int, at_once: int) -> tuple[int, int]:
    """Return the room that parts take where `kernel` multiplies tokens by a weight."""
    spec = kernel.spec
    if not spec.split:
        return 0, 0
    blocks = ceil_div(weight.rows, spec.block_n)
    return room_for_parts(tokens, len(spec.widths), spec.block_m, blocks, at_once, spec.k)


def fused_linears(
    gather_kernel: LaunchableKernel,
    kernel_of: Callable[[Weight, int], LaunchableKernel],
    x: Tensor,
    counts: Tensor,
    weights: Sequence[Weight],
) -> list[Tensor]:
    """Multiply each token by the weights of its slice count: `reference.routed_linears` with rounded weights.

    Args:
        gather_kernel: gather_tokens.
        kernel_of: Returns sliced_wgmma for a weight and a number of tokens.
        x: [..., K].
        counts: int32 [...] in 1..E.
        weights: Linears that share input and decision; tokens are gathered once for all.

    Returns:
        [..., N] of each, in the dtype of x.
    """
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] == 0:
        return [x.new_empty(*x.shape[:-1], weight.rows) for weight in weights]
    with torch.cuda.device_of(x):
        kernels = [kernel_of(weight, flat.shape[0]) for weight in weights]
        pairs = list(zip(kernels, weights, strict=True))
        rooms = [_room_of(*pair, flat.shape[0], multiprocessors(x.device)) for pair in pairs]
        tokens = gather(gather_kernel, flat, counts, room=(max(r[0] for r in rooms), max(r[1] for r in rooms)))
        found = [multiply(kernel, tokens, weight) for kernel, weight in pairs]
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in found]
