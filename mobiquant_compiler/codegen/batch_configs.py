"""Which calls batch_wgmma serves, and its tiles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from mobiquant_compiler.codegen.configs import Target, TokenClass, choose
from mobiquant_compiler.spec import (
    BATCH_TOKENS,
    MULTIPROCESSORS,
    PREFILL_TOKENS,
    Activation,
    Family,
    KernelSpec,
    SliceSpec,
)

CC = 90  # warpgroup products with an operand in registers are an instruction of sm_90 alone
ROWS = 64  # output rows of a program: what a warpgroup multiplies
_SMALL, _LARGE = 16, 32  # tokens of programs
# Measured on an H100, of 132 multiprocessors, for 2048 to 28672 rows: with fewer programs than these, of calls of one
# tile and of more, the programs of `sliced_mma`, of 16 or 32 rows, keep more of them busy.
_LEAST_OF_ONE_TILE, _LEAST_PROGRAMS = 80, 64
_COLUMNS_IN_STAGES = 3 * 256  # a stage is a pair of groups
_SHORT_ROWS = 4096  # columns: programs of so many or fewer end soon, and beginning and ending take much of their time
_HALF_OF_THE_REGISTERS = 128  # a thread of 256, where two programs share a multiprocessor


@dataclass(frozen=True, slots=True)
class BatchTile:
    """What a program multiplies besides `ROWS` rows.

    Attributes:
        tokens: Tokens of a program.
        consumers: Warpgroups that share its columns.
    """

    tokens: int
    consumers: int


def takes_slices(weight: SliceSpec) -> bool:
    """Say whether the kernel knows such slices; pure."""
    return weight.in_bit_pairs and weight.group >= 64


def serves(weight: SliceSpec, target: Target) -> bool:
    """Say whether a target's calls may be served by the kernel; pure."""
    return target.cc == CC and takes_slices(weight)


def blocks_of(rows: Iterable[int]) -> int:
    """Return how many blocks of `ROWS` output rows weights of so many rows have."""
    return sum(math.ceil(n / ROWS) for n in rows)


def tile_of(tokens: int, blocks: int, k: int) -> BatchTile | None:
    """Return the tile of a call, None where tokens as lanes load them are no slower if their counts are unlike; pure.

    It must be said before counts are known. Tokens of one count may be slower than by sliced_mma, as 16 at 8192x28672
    and 32 at 4096x14336, by less than unlike ones are faster.

    Args:
        tokens: T.
        blocks: Blocks of `ROWS` output rows that the weights have (`blocks_of`).
        k: Input columns.
    """
    if tokens < BATCH_TOKENS:
        return None
    small, large = (math.ceil(tokens / size) * blocks for size in (_SMALL, _LARGE))
    least = _LEAST_OF_ONE_TILE if tokens <= _SMALL else _LEAST_PROGRAMS
    if small < least:
        return None
    size, programs = (_SMALL, small) if tokens <= _SMALL or small <= MULTIPROCESSORS else (_LARGE, large)
    # Two programs share a multiprocessor where there are no more than that, or where one begins while the other works;
    # elsewhere two warpgroups share a program.
    shared = programs > MULTIPROCESSORS and (programs <= 2 * MULTIPROCESSORS or k <= _SHORT_ROWS)
    return BatchTile(size, 1 if shared else 2)


def keeps_order(tokens: int, blocks: int, k: int) -> bool:
    """Say whether a call's tokens stay in their order where they are routed, instead of sorted by slice count; pure.

    Sorting takes a launch more, since counts must be known before. A tile that holds all tokens has all counts in any
    order. Where all tiles are multiplied at the same time, the one of most slices is done last in any order; unsorted
    ones have more counts each and take longer, with few columns by less than a launch.

    Args:
        tokens: T, up to `PREFILL_TOKENS` unless they are sorted: kernels that route more do not write rows.
        blocks: Blocks of `ROWS` output rows that the weights have; of calls that have a tile (`tile_of`).
        k: Input columns.
    """
    tile = tile_of(tokens, blocks, k)
    assert tile is not None, "lanes have no other order"
    tiles = math.ceil(tokens / tile.tokens)
    if tiles == 1:
        return True
    return k <= _SHORT_ROWS and tokens <= PREFILL_TOKENS and tiles * blocks <= MULTIPROCESSORS


def _calls_of(tokens: TokenClass, n: int, k: int, parts: int) -> Iterator[tuple[int, int, BatchTile | None]]:
    """Yield token count, blocks and tile of every kind of call of a class."""
    most = {TokenClass.SOME: _SMALL, TokenClass.MANY: _LARGE * (MULTIPROCESSORS + 1)}.get(tokens, 0)
    least = math.ceil(n / ROWS)
    for count, blocks in product(range(tokens.sample, most + 1, _SMALL), range(least, least + parts)):
        yield count, blocks, tile_of(count, blocks, k)


def tiles_of(tokens: TokenClass, n: int, k: int, parts: int) -> tuple[BatchTile, ...]:
    """Return the tiles that calls of a class of token counts can take; pure.

    Args:
        tokens: The class.
        n: Output rows of all weights together; how many each has may differ.
        k: Input columns.
        parts: Weights.
    """
    found = {tile for _, _, tile in _calls_of(tokens, n, k, parts) if tile is not None}
    return tuple(sorted(found, key=lambda tile: (tile.tokens, tile.consumers)))


def takes_all(tokens: TokenClass, n: int, k: int, parts: int) -> bool:
    """Say whether every call of a class of token counts has a tile; arguments of `tiles_of`."""
    tiles = [tile for _, _, tile in _calls_of(tokens, n, k, parts)]
    return bool(tiles) and None not in tiles


def keeps_any_order(tokens: TokenClass, n: int, k: int, parts: int) -> bool:
    """Say whether `keeps_order` holds for any call of a class of token counts; arguments of `tiles_of`."""
    return any(keeps_order(count, blocks, k) for count, blocks, tile in _calls_of(tokens, n, k, parts) if tile)


def batch_spec(
    weight: SliceSpec,
    k: int,
    target: Target,
    *,
    tile: BatchTile,
    activation: Activation = Activation.A16,
    has_bias: bool = False,
    parts: int = 1,
    row_unit: int = 1,
) -> KernelSpec:
    """Choose the kernel of batch_wgmma.

    Args:
        weight: Widths, group and layout.
        k: Input columns.
        target: What it must fit.
        tile: Tokens and warpgroups of a program.
        activation: Fixed-point width of activations.
        has_bias: Whether a bias is added.
        parts: Weights of the launch.
        row_unit: 8 where the output rows of every weight are a multiple of it, else 1.

    Raises:
        BadKernelSpec: the widths, the layout or the group are not those it knows.
        KernelDoesNotFit: the tile does not fit the target.
    """
    spec = KernelSpec(
        family=Family.BATCH_WGMMA,
        widths=weight.widths,
        group=weight.group,
        layout=weight.layout,
        k=weight.padded(k),
        activation=activation,
        has_bias=has_bias,
        parts=parts,
        block_m=tile.tokens,
        block_n=ROWS,
        num_warps=ROWS // 16,
        # Sums of every chain and, of groups of 64, six stages of four slices are more than shared memory holds.
        num_stages=_COLUMNS_IN_STAGES // (2 * weight.group) - (tile.consumers == 2 and weight.group == 64),
        consumers=tile.consumers,
        row_unit=row_unit,
        overlap=True,
        max_registers=_HALF_OF_THE_REGISTERS if tile.consumers == 1 else 0,
    )
    return choose((spec,), target)
