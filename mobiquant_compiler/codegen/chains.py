"""Sums over a warp's columns in a fixed order, for one token or several blocks of eight.

A warp works on 16 output rows, all tokens of its program, and the columns of one or more chains: pairs of groups are
dealt to eight chains in turn. The deal, and the tree in which chains are added (`fragments.sum_neighbours`), depend on
the number of columns alone: a token meets the same sums in the same order in every kernel and every batch.

Names are those of `products`; tuples hold the four sums of each block in turn.
"""

import triton
import triton.language as tl

from mobiquant_compiler.codegen import device, products, scaling


@triton.jit
def one_token_step(
    sums,
    acts,
    chunk,
    pair,
    lane,
    COUNT: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Add a pair of groups of one token, both groups in one product; returns the sums of rows g and g + 8."""
    UNITS: tl.constexpr = device.units_before(WIDTHS, LAYOUT, COUNT)
    SHRINK: tl.constexpr = scaling.shrink_at(WIDTHS, COUNT)
    GROUPS: tl.constexpr = K_PADDED // GROUP
    t = lane % 4
    words, grids = chunk
    high, low = products.load_token_pair(acts, pair, lane, GROUP, K_PADDED, ACTIVATION, EMULATE)
    facts = (
        products.load_fact(acts[2], products.existing(2 * pair, GROUPS), EMULATE),
        products.load_fact(acts[2], products.existing(2 * pair + 1, GROUPS), EMULATE),
    )
    # A lane's words go on from the first group into the second: as columns of one group of twice the size.
    upper = device.combined_codes(words, t, 0, -1, COUNT, 2 * GROUP, WIDTHS, LAYOUT, EMULATE)
    lower = device.combined_codes(words, t, UNITS, -1, COUNT, 2 * GROUP, WIDTHS, LAYOUT, EMULATE)
    dots = products.products(upper, lower, high, low, ACTIVATION, EMULATE)
    sides = ()
    for half in tl.static_range(2):
        a = sums[half]
        for which in tl.static_range(2):
            grid = scaling.grid_at(grids[half][which], grids[half][2 + which], SHRINK, 1.0 / SHRINK)
            a = scaling.add_group(a, dots[2 * half + which], grid, facts[which][0], facts[which][1])
        sides = sides + (a,)
    return sides


@triton.jit
def add_block(sums, dots, grids, facts):
    """Add one group's dot products of a block of eight tokens to its four sums.

    grids: (scale, centre) as `scaling.add_group` wants them, for rows g and g + 8 of token 2 t, then of token 2 t + 1.
    """
    b0 = scaling.add_group(sums[0], dots[0], grids[0], facts[0], facts[1])
    b1 = scaling.add_group(sums[1], dots[1], grids[2], facts[2], facts[3])
    b2 = scaling.add_group(sums[2], dots[2], grids[1], facts[0], facts[1])
    b3 = scaling.add_group(sums[3], dots[3], grids[3], facts[2], facts[3])
    return b0, b1, b2, b3


@triton.jit
def alike_group(
    sums,
    acts,
    words,
    grids,
    ats,
    lane,
    COUNT: tl.constexpr,
    WHICH: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Add one group of tokens that all use COUNT slices: the codes of all of them are one integer."""
    UNITS: tl.constexpr = device.units_before(WIDTHS, LAYOUT, COUNT)
    SHRINK: tl.constexpr = scaling.shrink_at(WIDTHS, COUNT)
    first = scaling.grid_at(grids[0][WHICH], grids[0][2 + WHICH], SHRINK, 1.0 / SHRINK)
    second = scaling.grid_at(grids[1][WHICH], grids[1][2 + WHICH], SHRINK, 1.0 / SHRINK)
    t = lane % 4
    upper = device.combined_codes(words, t, 0, WHICH, COUNT, GROUP, WIDTHS, LAYOUT, EMULATE)
    lower = device.combined_codes(words, t, UNITS, WHICH, COUNT, GROUP, WIDTHS, LAYOUT, EMULATE)
    added = ()
    for block in tl.static_range(len(ats)):
        dots = products.block_products(upper, lower, acts, ats[block], lane, len(ats) > 1, GROUP, ACTIVATION, EMULATE)
        facts = products.load_facts(acts[2], ats[block], t, EMULATE)
        added = added + add_block(sums[4 * block : 4 * block + 4], dots, (first, second, first, second), facts)
    return added


@triton.jit
def append_slice(dots, more, shrinks, INDEX: tl.constexpr, WIDTHS: tl.constexpr):
    """Append slice INDEX to a block's dot products, those of tokens that use it: codes of slices are one integer."""
    WIDTH: tl.constexpr = WIDTHS[INDEX]
    # Steps say how many slices are used, and take no further register.
    LEAST: tl.constexpr = scaling.shrink_at(WIDTHS, INDEX + 1)
    even, odd = shrinks[0] <= LEAST, shrinks[1] <= LEAST
    d0 = tl.where(even, (dots[0] << WIDTH) + more[0], dots[0])
    d1 = tl.where(odd, (dots[1] << WIDTH) + more[1], dots[1])
    d2 = tl.where(even, (dots[2] << WIDTH) + more[2], dots[2])
    d3 = tl.where(odd, (dots[3] << WIDTH) + more[3], dots[3])
    return d0, d1, d2, d3


@triton.jit
def slice_products(
    dots,
    acts,
    words,
    ats,
    lane,
    shrinks,
    INDEX: tl.constexpr,
    UNITS: tl.constexpr,
    WHICH: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Multiply all blocks of tokens by slice INDEX alone, and append it to the dot products of those that use it."""
    OWN: tl.constexpr = device.width_of(WIDTHS, INDEX)
    FIRST: tl.constexpr = device.units_before(WIDTHS, LAYOUT, INDEX)
    t = lane % 4
    upper = device.combined_codes(words, t, FIRST, WHICH, 1, GROUP, OWN, LAYOUT, EMULATE)
    lower = device.combined_codes(words, t, UNITS + FIRST, WHICH, 1, GROUP, OWN, LAYOUT, EMULATE)
    appended = ()
    for block in tl.static_range(len(ats)):
        more = products.block_products(upper, lower, acts, ats[block], lane, True, GROUP, ACTIVATION, EMULATE)
        if INDEX == 0:
            appended = appended + more
        else:
            own = dots[4 * block : 4 * block + 4]
            appended = appended + append_slice(own, more, shrinks[2 * block : 2 * block + 2], INDEX, WIDTHS)
    return appended


@triton.jit
def mixed_group(
    sums,
    acts,
    words,
    grids,
    ats,
    lane,
    shrinks,
    most,
    COUNT: tl.constexpr,
    WHOLE: tl.constexpr,
    WHICH: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Add one group of tokens of different slice counts: a product a slice, whatever the counts, and one sum."""
    UNITS: tl.constexpr = device.units_before(WIDTHS, LAYOUT, COUNT)
    dots = slice_products(
        (), acts, words, ats, lane, shrinks, 0, UNITS, WHICH, WIDTHS, LAYOUT, GROUP, ACTIVATION, EMULATE
    )
    for index in tl.static_range(1, COUNT):
        needed = True
        if not WHOLE:
            needed = index < most
        if needed:
            dots = slice_products(
                dots,
                acts,
                words,
                ats,
                lane,
                shrinks,
                index,
                UNITS,
                WHICH,
                WIDTHS,
                LAYOUT,
                GROUP,
                ACTIVATION,
                EMULATE,
            )
    added = ()
    for block in tl.static_range(len(ats)):
        facts = products.load_facts(acts[2], ats[block], lane % 4, EMULATE)
        own = ()
        for side in tl.static_range(2):
            shrink = shrinks[2 * block + side]
            grow = scaling.power_of_minus(shrink)
            for half in tl.static_range(2):
                own = own + (scaling.grid_at(grids[half][WHICH], grids[half][2 + WHICH], shrink, grow),)
        added = added + add_block(sums[4 * block : 4 * block + 4], dots[4 * block : 4 * block + 4], own, facts)
    return added


@triton.jit
def many_tokens_step(
    sums,
    acts,
    chunk,
    pair,
    lane,
    blocks,
    shrinks,
    most,
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
    """Add a pair of groups of all blocks of tokens, each token by the codes of its own slice count.

    blocks: numbers of the program's blocks, and how many there are in all.
    """
    words = device.split_words(chunk[0], lane % 4, COUNT, WIDTHS, LAYOUT, GROUP, 2, EMULATE)
    for which in tl.static_range(2):
        first = products.existing(2 * pair + which, K_PADDED // GROUP) * blocks[1]
        ats = ()
        for block in tl.static_range(len(blocks[0])):
            ats = ats + (first + blocks[0][block],)
        if ALIKE:
            sums = alike_group(
                sums, acts, words, chunk[1], ats, lane, COUNT, which, WIDTHS, LAYOUT, GROUP, ACTIVATION, EMULATE
            )
        else:
            sums = mixed_group(
                sums,
                acts,
                words,
                chunk[1],
                ats,
                lane,
                shrinks,
                most,
                COUNT,
                WHOLE,
                which,
                WIDTHS,
                LAYOUT,
                GROUP,
                ACTIVATION,
                EMULATE,
            )
    return sums


@triton.constexpr_function
def blocks_at_a_time(blocks, alike):
    """Return how many of a program's blocks are multiplied together: unlike tokens need registers for every slice."""
    return blocks if alike else min(blocks, 2)


@triton.jit
def zeros_for(tid, COUNT: tl.constexpr):
    """Return COUNT sums of nothing."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros(tid.shape, tl.float32),)
    return sums


@triton.jit
def add_each(left, right):
    """Add two tuples, place by place."""
    sums = ()
    for index in tl.static_range(len(left)):
        sums = sums + (left[index] + right[index],)
    return sums


@triton.jit
def chain_sums(
    operands,
    chain,
    COUNT: tl.constexpr,
    WHOLE: tl.constexpr,
    ONE: tl.constexpr,
    ALIKE: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Sum one chain of pairs of groups, in order; returns two float32 [THREADS] for ONE token, else four a block."""
    STEPS: tl.constexpr = (K_PADDED // GROUP + 15) // 16
    acts, weight, tile = operands
    tid, first_row, blocks, shrinks, most, n_rows = tile
    sums = zeros_for(tid, 2 if ONE else 4 * len(blocks[0]))
    lane = tid % 32
    for step in tl.range(0, STEPS):
        pair = step * 8 + chain
        # All loads of a step are asked for before the first is used; other warps multiply meanwhile.
        chunk = products.load_chunk(
            weight, first_row, pair, lane % 4, most, n_rows, COUNT, WHOLE, WIDTHS, LAYOUT, GROUP, K_PADDED, EMULATE
        )
        if ONE:
            sums = one_token_step(
                sums, acts, chunk, pair, lane, COUNT, WIDTHS, LAYOUT, GROUP, K_PADDED, ACTIVATION, EMULATE
            )
        else:
            sums = many_tokens_step(
                sums,
                acts,
                chunk,
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
    return sums


@triton.jit
def warp_sums(
    operands,
    first_chain,
    CHAINS: tl.constexpr,
    COUNT: tl.constexpr,
    WHOLE: tl.constexpr,
    ONE: tl.constexpr,
    ALIKE: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Sum the CHAINS (1, 2 or 4) chains of each warp as `fragments.sum_neighbours` would; see `chain_sums`.

    operands: acts, weight, and the tile (thread numbers, first row of a lane, blocks of tokens as `many_tokens_step`
    has them, how much smaller than the base step those of a lane's tokens are, the largest count, rows in all).

    No token uses more than COUNT slices. WHOLE: at least one uses as many. ALIKE: all do.
    """
    if CHAINS == 1:
        total = chain_sums(
            operands, first_chain, COUNT, WHOLE, ONE, ALIKE, WIDTHS, LAYOUT, GROUP, K_PADDED, ACTIVATION, EMULATE
        )
    else:
        # From zero: no sum of a chain is -0, which adding to zero would change.
        total = zeros_for(operands[2][0], 2 if ONE else 4 * len(operands[2][2][0]))
        before = total
        for index in tl.range(0, CHAINS):
            chain = first_chain + index
            sums = chain_sums(
                operands, chain, COUNT, WHOLE, ONE, ALIKE, WIDTHS, LAYOUT, GROUP, K_PADDED, ACTIVATION, EMULATE
            )
            if index % 2 == 1:
                total = add_each(total, add_each(before, sums))
            before = sums
    return total
