"""Tile configurations by family and token class, and the pure estimate that says which fit a target."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from mobiquant_compiler.codegen.resident_layout import ResidentLayout
from mobiquant_compiler.errors import KernelDoesNotFit
from mobiquant_compiler.spec import (
    MULTIPROCESSORS,
    Activation,
    Family,
    KernelSpec,
    SliceSpec,
    most_parts,
    split_programs,
)

# Dynamic shared memory a block may have, in bytes, by compute capability (CUDA programming guide, table of limits).
_SHARED_BYTES = {
    75: 65536,
    80: 166912,
    86: 101376,
    87: 166912,
    89: 101376,
    90: 232448,
    100: 232448,
    103: 232448,
    120: 101376,
}
_OVERLAPS_FROM = 90  # compute capability of programmatic dependent launches
_SCORED = 4096  # columns that a routing program has in flight at a time, at most
_LONG = 8192  # columns above which a token gets wider programs: one of them reads all of it, to route
_ROUTED_TOGETHER = 4  # tokens of a long call that a program routes by a network, whose weights it then reads once
_FEW_COLUMNS = 1024  # up to which four warps are enough for that
_NETWORK_REGISTERS = {4: 168, 8: 128}  # by warps: three programs and two share a multiprocessor
_ONE_PASS = 16  # hidden units that a pass over the columns sums, at most
_FEW_ROWS = 8192  # below, programs are so few that all begin at once: their whole base slice is worth asking for early
_ELSEWHERE = (Family.SLICED_WGMMA, Family.BATCH_WGMMA, Family.RESIDENT_MMA)  # families with choosers of their own
_WIDE_SLICES = 4  # with more slices than these a warp has no registers for more than eight tokens


@dataclass(frozen=True, slots=True)
class Target:
    """What a kernel must fit.

    Attributes:
        cc: Compute capability, as 90 for sm_90.
        shared_bytes: Shared memory that one block may use.
    """

    cc: int
    shared_bytes: int

    @classmethod
    def of(cls, cc: int) -> Target:
        """Return the target of a compute capability; an unknown one gets the limit of the next older known one."""
        known = max((c for c in _SHARED_BYTES if c <= cc), default=75)
        return cls(cc, _SHARED_BYTES[known])

    def __str__(self) -> str:
        return f"sm_{self.cc}"


def known_targets() -> tuple[int, ...]:
    """Return the compute capabilities that kernels can be made for: those with integer products of 16 x 8 x 32."""
    return tuple(cc for cc in _SHARED_BYTES if cc >= 80)


class TokenClass(StrEnum):
    """Numbers of tokens that share a kernel."""

    ONE = "1"
    FEW = "2..8"
    SOME = "9..16"
    MANY = "17.."

    @classmethod
    def of(cls, tokens: int) -> TokenClass:
        """Return the class of `tokens` >= 1."""
        return next(c for c in reversed(cls) if tokens >= c.sample)

    @property
    def sample(self) -> int:
        """The least number of tokens of this class, for warming up."""
        return int(self.value.partition("..")[0])


@dataclass(frozen=True, slots=True)
class Tile:
    """One line of the table; fields as those of `KernelSpec`, registers 0 for as many as the compiler likes."""

    block_m: int
    block_n: int
    block_w: int
    num_warps: int
    max_registers: int = 0
    block_r: int = 1
    row_tiles: int = 1


# Best first; a later line needs less. Measured on an H100 (benchmarks/results/h100/linear.json has what they give).
_TILES: dict[tuple[Family, TokenClass], tuple[Tile, ...]] = {
    (Family.SLICED_MMA, TokenClass.ONE): (Tile(1, 16, 32, 8, 128),),
    (Family.SLICED_MMA, TokenClass.FEW): (Tile(8, 16, 32, 8, 128),),
    (Family.SLICED_MMA, TokenClass.SOME): (Tile(16, 16, 32, 8, 128),),
    # Two tiles of rows a warp halve what comes from L1, and give registers enough to load a step ahead. Four warps with
    # two programs a multiprocessor are as fast where there are many programs, and far slower where there are few.
    (Family.SLICED_MMA, TokenClass.MANY): (Tile(32, 32, 32, 8, 255, row_tiles=2),),
    # Four runs of 1024 columns: a lane has four octets, whose loads are in flight together.
    (Family.DEQUANTIZE, TokenClass.MANY): (Tile(1, 4, 1024, 4),),
    (Family.GATHER_TOKENS, TokenClass.MANY): (Tile(1, 1, 2048, 4),),
}
# Tiles of sliced_wgmma, and one with half as many tokens for calls that make few of those, or few full ones; and how
# long an H100 takes for the programs that it runs at a time: 4096 columns of two slices, in microseconds. To add one
# more part of a split program takes longer than this by as much.
_WGMMA_TILE, _WGMMA_SMALL_TILE = Tile(256, 128, 1, 4), Tile(128, 128, 1, 4)
_WGMMA_STAGES, _WGMMA_SMALL_STAGES = 4, 6
_WGMMA_WAVE, _WGMMA_SMALL_WAVE = 45.0, 31.0
_WGMMA_PART, _WGMMA_SMALL_PART = 2.0, 1.0
_WGMMA_COLUMNS, _SPLIT_ROWS = 4096, 4096
_WORD_STAGES = 2  # as sorted_tiles has them
_SHARED_ACTIVATIONS = 8 << 20  # bytes of activations that programs side by side share: they leave room in the L2 cache


def shared_bytes(spec: KernelSpec) -> int:
    """Estimate, from above, the shared memory in bytes that a block of `spec` needs.

    - route_quantize: one float32 a warp for each group reduced; with a trained router at least two a thread; of tokens
      as rows a byte a column, on its way to where it belongs.
    - sliced_mma: the sums of all warps over two blocks of eight tokens; more are moved in parts.
    - resident_mma: what its layout says, with scales of 16 bits or of 32, whichever are more and fit.
    - batch_wgmma: stages of a pair of groups, of as many slices as are largest, and sums of chains.
    - sliced_wgmma: stages of 64 columns of activations, two of 128 columns of words, the tile of outputs, barriers.
    - dequantize: nothing where the workspace has 16 bits; a tile of float32 on its way to 16-byte stores, ``4 N W``.
    """
    if spec.family is Family.RESIDENT_MMA:
        return _resident_bytes(spec)
    if spec.family is Family.SLICED_MMA:
        return 2 * 4 * 4 * 32 * spec.num_warps
    if spec.family is Family.DEQUANTIZE:
        return 4 * spec.block_n * spec.block_w
    if spec.family is Family.BATCH_WGMMA:
        return _batch_bytes(spec)
    if spec.family is Family.SLICED_WGMMA:
        words = _WORD_STAGES * 32 * spec.block_n * min(len(spec.widths), 4)  # the template refuses more slices
        return 2 * spec.block_m * (64 * spec.num_stages + spec.block_n) + words + 1024
    reduced = 4 * spec.num_warps * max(64 if spec.hidden else 32, spec.block_w // spec.group)
    return max(reduced, spec.block_w if spec.token_rows else 0)


def _resident_bytes(spec: KernelSpec) -> int:
    slices, groups = len(spec.widths), spec.k // spec.group
    halves = 2 if spec.activation is Activation.A16 else 1
    layouts = [ResidentLayout(groups, size, halves) for size in (2, 4)]
    return max((layout.total_bytes(slices) for layout in layouts if layout.fits(slices)), default=1 << 20)


def _batch_bytes(spec: KernelSpec) -> int:
    """Estimate the shared memory of batch_wgmma: the body of most bytes; from three slices on a stage less."""
    halves = 2 if spec.activation is Activation.A16 else 1
    tokens = spec.block_m * (2 * halves * spec.group + 2 * 12)
    slices = len(spec.widths)
    bodies = [(slices, spec.num_stages - (slices > 2)), (min(slices, 2), spec.num_stages)]
    words = spec.block_n * spec.group // 2
    stages = max(spec.consumers * stages * (tokens + count * words + 16) for count, stages in bodies)
    levels = (8 if spec.consumers == 2 else 3) * 4 * spec.block_n * spec.block_m
    return stages + levels + 1024


def fits(spec: KernelSpec, target: Target) -> bool:
    """Say whether a block of `spec` fits the target's shared memory; pure."""
    return shared_bytes(spec) <= target.shared_bytes


def power_of_two(value: int) -> int:
    """Return the least power of two that is at least `value`."""
    return 1 << max(0, value - 1).bit_length()


def choose(candidates: Iterator[KernelSpec] | tuple[KernelSpec, ...], target: Target) -> KernelSpec:
    """Return the first candidate that fits.

    Raises:
        KernelDoesNotFit: none does.
    """
    refused = []
    for spec in candidates:
        if fits(spec, target):
            return spec
        refused.append(spec)
    least = min(refused, key=shared_bytes)
    raise KernelDoesNotFit(
        family=least.family, target=target, spec=least.name, got=shared_bytes(least), wanted=target.shared_bytes
    )


def kernel_spec(
    family: Family,
    weight: SliceSpec,
    k: int,
    tokens: TokenClass,
    target: Target,
    *,
    n: int = 0,
    activation: Activation = Activation.A16,
    has_bias: bool = False,
    parts: int = 1,
    route: bool = True,
    quantize: bool = True,
    hidden: int = 0,
    long: bool = False,
    sorted_rows: bool = True,
    token_rows: bool = False,
    emulate: bool = False,
) -> KernelSpec:
    """Choose the kernel of `family` for a weight of `k` input columns.

    Options that a family does not have are left out. `n` is the rows of all weights, `long` more than `PREFILL_TOKENS`.

    Raises:
        KernelDoesNotFit: no tile fits the target.
    """
    mma, first = family is Family.SLICED_MMA, family is Family.ROUTE_QUANTIZE
    hidden = hidden if route and first else 0
    overlap = target.cc >= _OVERLAPS_FROM and not emulate and (mma or first)
    tiles = (_network_tile(weight, k, hidden, long),) if hidden else _tiles(family, weight, k, tokens)
    specs = (
        KernelSpec(
            family,
            *(weight.widths, weight.group, weight.layout, weight.padded(k)),
            activation=activation,
            has_bias=has_bias and mma,
            parts=parts if mma else 1,
            route=route and first,
            quantize=quantize and first,
            hidden=hidden,
            columns=k if first else 0,
            token_rows=token_rows and quantize and first,
            block_m=tile.block_m,
            block_n=tile.block_n,
            row_tiles=tile.row_tiles,
            block_w=tile.block_w,
            block_r=tile.block_r if route else 1,
            num_warps=tile.num_warps,
            overlap=overlap,
            prefetch=0 if not overlap else prefetched(weight, n, k, tokens) if mma else k if hidden else 0,
            max_registers=0 if emulate else tile.max_registers,
            sorted_rows=sorted_rows and family is Family.DEQUANTIZE,
            emulate=emulate and (mma or hidden > 0),
        )
        for tile in tiles
    )
    return choose(tuple(specs), target)


def _tiles(family: Family, weight: SliceSpec, k: int, tokens: TokenClass) -> tuple[Tile, ...]:
    assert family not in _ELSEWHERE, "wgmma_spec, batch_spec and multiply_spec choose them"
    if family is Family.ROUTE_QUANTIZE:
        # 16 bytes of bfloat16 a thread to quantize; four warps route 4096 columns with all their loads in flight.
        warps = 4 if k <= _LONG else 8
        columns = min(256 * warps, power_of_two(weight.padded(k)))
        return (Tile(1, 1, columns, warps, block_r=min(_SCORED, power_of_two(k))),)
    if family in (Family.DEQUANTIZE, Family.GATHER_TOKENS):
        return _TILES[family, TokenClass.MANY]
    if tokens is not TokenClass.ONE and weight.num_slices > _WIDE_SLICES:
        tokens = TokenClass.FEW
    return _TILES[family, tokens]


def _network_tile(weight: SliceSpec, k: int, hidden: int, long: bool) -> Tile:
    """Return the tile of a kernel that routes by a network; a step gives two columns to each thread.

    One token has the loads of as many steps in flight as there are registers for: eight of one pass over the columns.
    Of several tokens the sums take the registers, and an odd number of columns is loaded one by one. Triton takes
    minutes for long steps inside the loop over passes.
    """
    warps = 4 if k <= _FEW_COLUMNS else 8
    steps = 2 if long or k % 2 else 8 if hidden <= _ONE_PASS else 4
    steps = min(steps, power_of_two(-(-k // (64 * warps))))
    columns = min(256 * warps, power_of_two(weight.padded(k)))
    return Tile(
        _ROUTED_TOGETHER if long else 1, 1, columns, warps, _NETWORK_REGISTERS[warps], block_r=64 * warps * steps
    )


def prefetched(weight: SliceSpec, n: int, k: int, tokens: TokenClass) -> int:
    """Return how many columns of the base slice a program asks for before the kernel before has ended; pure.

    With more programs than run at once those of a first step (eight pairs of groups), which all of a warp's loads wait
    for: more would be asked for twice. With more than 16 tokens several programs read the same rows anyway.
    """
    if tokens not in (TokenClass.ONE, TokenClass.FEW, TokenClass.SOME):
        return 0
    k = weight.padded(k)
    return k if n < _FEW_ROWS else min(k, 16 * weight.group)


def wgmma_is_split(n: int, k: int) -> bool:
    """Say whether programs of a last wave of sliced_wgmma are split along the columns; pure.

    Measured on an H100: a kernel that can is faster for weights of few rows, whose programs fill few waves, by up to a
    third with long columns; elsewhere it is slower by some hundredths, as it has a third more instructions.
    """
    return n <= _SPLIT_ROWS and most_parts(k) > 1


def wgmma_is_small(tokens: int, n: int, k: int, groups: int) -> bool:
    """Say whether a call of sliced_wgmma is faster with small tiles; pure.

    What counts is in how many waves its programs run, the last of which may be split. How many tiles tokens make
    depends on their counts, which only the device knows: tokens that are all alike and tokens of every count, half a
    tile lost each, weigh the same. Of one group, which is as many different counts as they can have, there is nothing
    to weigh.
    """
    split = wgmma_is_split(n, k)

    def cost(tile: Tile, wave: float, part: float) -> float:
        blocks = -(-n // tile.block_n)
        alike = -(-tokens // tile.block_m)
        tiles = (alike, alike if groups == 1 else tokens / tile.block_m + groups / 2)
        if not split:
            return sum(wave * math.ceil(count * blocks / MULTIPROCESSORS) for count in tiles)
        return sum(_waves_cost(math.ceil(count * blocks), k, wave * k / _WGMMA_COLUMNS, part) for count in tiles)

    small = cost(_WGMMA_SMALL_TILE, _WGMMA_SMALL_WAVE, _WGMMA_SMALL_PART)
    return small < cost(_WGMMA_TILE, _WGMMA_WAVE, _WGMMA_PART)


def _waves_cost(programs: int, k: int, wave: float, part: float) -> float:
    """Return how long programs take whose last wave is split as `split_columns.share_of` does, each part added."""
    whole, rest, parts = split_programs(programs, MULTIPROCESSORS, k)
    full = whole // MULTIPROCESSORS
    if rest == 0:
        return wave * full
    return wave * (full + math.ceil(rest * parts / MULTIPROCESSORS) / parts) + part * (parts - 1)


def wgmma_spec(
    weight: SliceSpec,
    k: int,
    target: Target,
    *,
    small: bool,
    split: bool = False,
    row_unit: int = 1,
    has_bias: bool = False,
) -> KernelSpec:
    """Choose the kernel of sliced_wgmma.

    Args:
        weight: Widths, group and layout.
        k: Input columns.
        target: What it must fit.
        small: Use small tiles (`wgmma_is_small`).
        split: Split programs of a last wave (`wgmma_is_split`), which columns must be enough for.
        row_unit: 8 where the number of output rows is a multiple of it, else 1.
        has_bias: Whether a bias is added.

    Raises:
        KernelDoesNotFit: the tile does not fit the target. Widths, layouts and columns that the template does not know
            are refused when it is specialised.
    """
    tile, padded = _WGMMA_SMALL_TILE if small else _WGMMA_TILE, weight.padded(k)
    across = _SHARED_ACTIVATIONS // (2 * tile.block_m * padded)
    spec = KernelSpec(
        family=Family.SLICED_WGMMA,
        widths=weight.widths,
        group=weight.group,
        layout=weight.layout,
        k=padded,
        has_bias=has_bias,
        block_m=tile.block_m,
        block_n=tile.block_n,
        block_w=1 << max(0, across.bit_length() - 1),
        num_warps=tile.num_warps,
        num_stages=_WGMMA_SMALL_STAGES if small else _WGMMA_STAGES,
        consumers=2,
        row_unit=row_unit,
        split=split,
    )
    return choose((spec,), target)
