"""Sums over a warp's columns in a fixed order, for blocks of eight tokens.

A warp works on one or two tiles of 16 output rows, all tokens of its program, and the columns of one or more chains:
pairs of groups are dealt to eight chains in turn. The deal, and the tree in which chains are added
(`fragments.sum_neighbours`), depend on the number of columns alone: a token meets the same sums in the same order in
every kernel and every batch.

Names are those of `products`; tuples hold sums as `steps` has them.
"""

import triton
import triton.language as tl

from mobiquant_compiler.codegen import device, fragments, products, slice_steps, steps


@triton.constexpr_function
def blocks_at_a_time(blocks, alike):
    """Return how many of a program's blocks are multiplied together: unlike tokens need registers for every slice."""
    return blocks if alike else min(blocks, 2)


@triton.jit
def zeros_for(tid, COUNT: tl.constexpr):
    """Return COUNT sums of nothing."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (fragments.filled(tid, 0).to(tl.float32),)
    return sums


@triton.jit
def add_each(left, right):
    """Add two tuples, place by place."""
    sums = ()
    for index in tl.static_range(len(left)):
        sums = sums + (left[index] + right[index],)
    return sums


@triton.constexpr_function
def loads_ahead(tiles, blocks, alike, bits, steps):
    """Say whether a step's words are loaded before those of the step before are multiplied.

    Measured: it pays where the registers for a second step are there. One block of tokens that are alike has them up to
    four bits; a warp of two tiles of rows may use 255 registers, enough for tokens that are alike, and for four bits of
    unlike ones.
    """
    if tiles > 1:
        return steps > 1 if alike else steps > 2 and bits <= 4
    return steps > 2 and alike and bits <= 4 and blocks == 1


@triton.jit
def load_chunks(
    operands,
    pair,
    COUNT: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Ask for a pair of groups of every tile of rows; `products.load_chunk` says what comes."""
    _, weight, tile = operands
    tid, rows, _, _, most, n_rows = tile
    chunks = ()
    for at in tl.static_range(len(rows)):
        chunk = products.load_chunk(
            weight, rows[at], pair, tid % 4, most, n_rows, COUNT, WHOLE, WIDTHS, LAYOUT, GROUP, K_PADDED, EMULATE
        )
        chunks = chunks + (chunk,)
    return chunks


@triton.jit
def add_step(
    sums,
    operands,
    chunks,
    pair,
    COUNT: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIKE: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Add the pair of groups that `load_chunks` brought to all sums."""
    acts, _, tile = operands
    tid, _, blocks, shrinks, most, _ = tile
    lane = tid % 32
    return steps.many_tokens_step(
        sums,
        acts,
        chunks,
        pair,
        lane,
        blocks,
        shrinks,
        most,
        COUNT,
        WHOLE,
        ALIKE,
        WIDTHS,
        LAYOUT,
        GROUP,
        K_PADDED,
        ACTIVATION,
        EMULATE,
    )


@triton.jit
def grouped_chain(
    sums,
    operands,
    chain,
    COUNT: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIKE: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Add one chain of pairs of groups, in order, to the sums; of a pair one group after the other."""
    STEPS: tl.constexpr = (K_PADDED // GROUP + 15) // 16
    TILES: tl.constexpr = len(operands[2][1])
    BLOCKS: tl.constexpr = len(operands[2][2][0])
    BITS: tl.constexpr = device.bits_before(WIDTHS, COUNT)
    AHEAD: tl.constexpr = loads_ahead(TILES, BLOCKS, ALIKE, BITS, STEPS)
    if AHEAD:
        chunks = load_chunks(operands, chain, COUNT, WHOLE, WIDTHS, LAYOUT, GROUP, K_PADDED, EMULATE)
    for step in tl.range(0, STEPS - 1 if AHEAD else STEPS):
        pair = step * 8 + chain
        # All loads of a step are asked for before the first is used; other warps multiply meanwhile.
        if AHEAD:
            following = load_chunks(operands, pair + 8, COUNT, WHOLE, WIDTHS, LAYOUT, GROUP, K_PADDED, EMULATE)
        else:
            chunks = load_chunks(operands, pair, COUNT, WHOLE, WIDTHS, LAYOUT, GROUP, K_PADDED, EMULATE)
        sums = add_step(
            sums, operands, chunks, pair, COUNT, WHOLE, ALIKE, WIDTHS, LAYOUT, GROUP, K_PADDED, ACTIVATION, EMULATE
        )
        if AHEAD:
            chunks = following
    if AHEAD:
        pair = (STEPS - 1) * 8 + chain
        sums = add_step(
            sums, operands, chunks, pair, COUNT, WHOLE, ALIKE, WIDTHS, LAYOUT, GROUP, K_PADDED, ACTIVATION, EMULATE
        )
    return sums


@triton.jit
def chain_sums(
    operands,
    chain,
    COUNT: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIKE: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Sum one chain of pairs of groups, in order.

    Returns four float32 [THREADS] for each block of tokens and, in it, each tile of 16 rows.
    """
    TILES: tl.constexpr = len(operands[2][1])
    BLOCKS: tl.constexpr = len(operands[2][2][0])
    sums = zeros_for(operands[2][0], 4 * TILES * BLOCKS)
    # Unlike tokens of which one uses COUNT slices; words of more slices than are used are not to be asked for.
    UNLIKE: tl.constexpr = WHOLE and not ALIKE
    if UNLIKE and TILES * BLOCKS == 1 and device.all_shared(WIDTHS, LAYOUT, GROUP):
        sums = slice_steps.mixed_chain(
            sums, operands, chain, COUNT, WIDTHS, LAYOUT, GROUP, K_PADDED, ACTIVATION, EMULATE
        )
    else:
        sums = grouped_chain(
            sums, operands, chain, COUNT, WHOLE, ALIKE, WIDTHS, LAYOUT, GROUP, K_PADDED, ACTIVATION, EMULATE
        )
    return sums


@triton.jit
def warp_sums(
    operands,
    first_chain,
    CHAINS: tl.constexpr,
    COUNT: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIKE: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Sum the CHAINS (1, 2 or 4) chains of each warp as `fragments.sum_neighbours` would; see `chain_sums`.

    operands: acts, weight, and the tile (thread numbers, a lane's row in each tile of 16, blocks of tokens as
    `steps.many_tokens_step` has them, how much smaller than the base step those of a lane's tokens are, the largest
    count, rows in all).

    No token uses more than COUNT slices. WHOLE: at least one uses as many. ALIKE: all do.
    """
    if CHAINS == 1:
        total = chain_sums(
            operands, first_chain, COUNT, WHOLE, ALIKE, WIDTHS, LAYOUT, GROUP, K_PADDED, ACTIVATION, EMULATE
        )
    else:
        # From zero: no sum of a chain is -0, which adding to zero would change.
        total = zeros_for(operands[2][0], 4 * len(operands[2][1]) * len(operands[2][2][0]))
        before = total
        for index in tl.range(0, CHAINS):
            chain = first_chain + index
            sums = chain_sums(
                operands, chain, COUNT, WHOLE, ALIKE, WIDTHS, LAYOUT, GROUP, K_PADDED, ACTIVATION, EMULATE
            )
            if index % 2 == 1:
                total = add_each(total, add_each(before, sums))
            before = sums
    return total
