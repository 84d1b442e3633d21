"""A warp's share of tokens times a sliced weight: loads, integer products, and sums in a fixed order.

What `templates/sliced_mma` is made of. A warp works on 16 output rows and the columns of one chain: pairs of groups are
dealt to eight chains in turn, so that the eight warps of a program together read whole lines. The deal depends on the
number of columns alone: a token meets the same sums in the same order in every kernel and every batch.

Names: acts are the pointers (high, low, affine) to quantized activations, weight those (slices, scale, zero). Tuples
of four sums stand for a tile of 16 rows by 8 tokens as `fragments.multiply_tile` holds it: rows g and g + 8, tokens 2 t
and 2 t + 1 of each.
"""

import triton
import triton.language as tl

from mobiquant_compiler.codegen import activations, device, fragments


@triton.jit
def load_chunk(
    weight,
    first_row,
    pair,
    t,
    most,
    n_rows,
    COUNT: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Ask for all that a warp needs of a pair of groups; without WHOLE only for the first `most` slices.

    Returns words as loaded, a tuple for each packed unit of row g, then of row g + 8, and for each of the two rows
    (scale, scale, zero, zero) of the groups.
    """
    # Where the chains come out even no lane is without a share; rows past the last are read as the last.
    CUT: tl.constexpr = K_PADDED // GROUP % 16 != 0
    CHECKED: tl.constexpr = CUT or not WHOLE
    slices_ptr, scale_ptr, zero_ptr = weight
    words = ()
    grids = ()
    for half in tl.static_range(2):
        row = tl.minimum(first_row + half * 8, n_rows - 1)
        for index in tl.static_range(COUNT):
            here = row == row
            if not WHOLE:
                here = here & (index < most)
            for part in tl.static_range(device.unit_count(WIDTHS, LAYOUT, index)):
                words = words + (
                    device.load_pair(
                        slices_ptr,
                        row,
                        pair,
                        t,
                        here,
                        n_rows,
                        index,
                        part,
                        WIDTHS,
                        LAYOUT,
                        GROUP,
                        K_PADDED,
                        CHECKED,
                        EMULATE,
                    ),
                )
        scales = device.load_scales(scale_ptr, row, pair, GROUP, K_PADDED, CUT, EMULATE)
        grids = grids + (scales + device.load_scales(zero_ptr, row, pair, GROUP, K_PADDED, CUT, EMULATE),)
    return words, grids


@triton.jit
def load_facts(affine_ptr, group, block, t, tokens, GROUPS: tl.constexpr, EMULATE: tl.constexpr):
    """Load a group's step and total of tokens 2 t and 2 t + 1 of a block of eight; returns four float32 [THREADS]."""
    here = (group < GROUPS) & (block * 8 + 2 * t < tokens)
    at = (group * tl.cdiv(tokens, 8) + block) * 8 + 2 * t
    facts = fragments.load_words(affine_ptr + at * 2, here, 4, EMULATE)
    step0 = facts[0].to(tl.float32, bitcast=True)
    total0 = facts[1].to(tl.float32, bitcast=True)
    step1 = facts[2].to(tl.float32, bitcast=True)
    total1 = facts[3].to(tl.float32, bitcast=True)
    return step0, total0, step1, total1


@triton.jit
def load_block(
    acts,
    group,
    block,
    lane,
    tokens,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Load eight tokens' bytes of one group, high halves and low ones, and what turns products into sums."""
    high_ptr, low_ptr, affine_ptr = acts
    here = (group < K_PADDED // GROUP) & (block * 8 + lane // 4 < tokens)
    at = group * tl.cdiv(tokens, 8) + block
    high = activations.load_activation(high_ptr, at, lane, here, GROUP, EMULATE)
    low = high
    if ACTIVATION == "a16":
        low = activations.load_activation(low_ptr, at, lane, here, GROUP, EMULATE)
    return high, low, load_facts(affine_ptr, group, block, lane % 4, tokens, K_PADDED // GROUP, EMULATE)


@triton.jit
def load_token_pair(
    acts,
    pair,
    lane,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Load the bytes of one token for a pair of groups, the first in column 0 of the product, the second in column 1.

    Lanes 0 and 1 of a quad then multiply the first group, lanes 2 and 3 the second: words stay where they were loaded.
    """
    high_ptr, low_ptr, _ = acts
    column = lane // 4
    here = (column == (lane % 4) // 2) & (2 * pair + column < K_PADDED // GROUP)
    high = ()
    low = ()
    # Lanes 0 and 2 have the first half of a group's columns, quarters 0 and 1; lanes 1 and 3 the second.
    for half in tl.static_range(2):
        slot = fragments.quarter_of_lane((lane % 2) * 2 + half)
        high = high + activations.load_activation(high_ptr, 2 * pair + column, slot, here, GROUP, EMULATE)
        if ACTIVATION == "a16":
            low = low + activations.load_activation(low_ptr, 2 * pair + column, slot, here, GROUP, EMULATE)
    if ACTIVATION == "a8":
        low = high
    return high, low


@triton.jit
def half_products(upper_codes, lower_codes, tokens, EMULATE: tl.constexpr):
    """Multiply codes by one half of the activations; even and odd steps are summed apart, so that each waits less."""
    zero = tl.zeros_like(tokens[0])
    e0, e1, e2, e3 = zero, zero, zero, zero
    o0, o1, o2, o3 = zero, zero, zero, zero
    for m in tl.static_range(0, len(tokens) // 2, 2):
        codes = (upper_codes[2 * m], lower_codes[2 * m], upper_codes[2 * m + 1], lower_codes[2 * m + 1])
        e0, e1, e2, e3 = fragments.multiply_tile(codes, tokens[2 * m], tokens[2 * m + 1], e0, e1, e2, e3, EMULATE)
    for m in tl.static_range(1, len(tokens) // 2, 2):
        codes = (upper_codes[2 * m], lower_codes[2 * m], upper_codes[2 * m + 1], lower_codes[2 * m + 1])
        o0, o1, o2, o3 = fragments.multiply_tile(codes, tokens[2 * m], tokens[2 * m + 1], o0, o1, o2, o3, EMULATE)
    if len(tokens) > 2:
        e0, e1, e2, e3 = e0 + o0, e1 + o1, e2 + o2, e3 + o3
    return e0, e1, e2, e3


@triton.jit
def products(upper_codes, lower_codes, high, low, ACTIVATION: tl.constexpr, EMULATE: tl.constexpr):
    """Multiply 16 rows by 8 columns exactly; returns four int32 [THREADS].

    Shapes: tuples of int32 [THREADS], four codes or bytes each: codes of rows g and g + 8, halves of the activations.
    """
    d0, d1, d2, d3 = half_products(upper_codes, lower_codes, low, EMULATE)
    if ACTIVATION == "a16":
        # At most 128 * 255 * 32637 in all, below 2**31. Halves are summed apart: their products need not wait.
        h0, h1, h2, h3 = half_products(upper_codes, lower_codes, high, EMULATE)
        d0, d1, d2, d3 = (h0 << 8) + d0, (h1 << 8) + d1, (h2 << 8) + d2, (h3 << 8) + d3
    return d0, d1, d2, d3


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
    SHRINK: tl.constexpr = device.shrink_at(WIDTHS, COUNT)
    GROUPS: tl.constexpr = K_PADDED // GROUP
    t = lane % 4
    words, grids = chunk
    high, low = load_token_pair(acts, pair, lane, GROUP, K_PADDED, ACTIVATION, EMULATE)
    first = load_facts(acts[2], 2 * pair, 0, t, 1, GROUPS, EMULATE)
    second = load_facts(acts[2], 2 * pair + 1, 0, t, 1, GROUPS, EMULATE)
    # A lane's words go on from the first group into the second: as columns of one group of twice the size.
    upper = device.combined_codes(words, t, 0, -1, COUNT, 2 * GROUP, WIDTHS, LAYOUT, EMULATE)
    lower = device.combined_codes(words, t, UNITS, -1, COUNT, 2 * GROUP, WIDTHS, LAYOUT, EMULATE)
    d0, d1, d2, d3 = products(upper, lower, high, low, ACTIVATION, EMULATE)
    a0 = device.add_group(sums[0], d0, grids[0][0], grids[0][2], first[0], first[1], SHRINK)
    a0 = device.add_group(a0, d1, grids[0][1], grids[0][3], second[0], second[1], SHRINK)
    a1 = device.add_group(sums[1], d2, grids[1][0], grids[1][2], first[0], first[1], SHRINK)
    a1 = device.add_group(a1, d3, grids[1][1], grids[1][3], second[0], second[1], SHRINK)
    return a0, a1


@triton.jit
def count_step(
    sums,
    words,
    grids,
    loaded,
    used,
    t,
    COUNT: tl.constexpr,
    WHICH: tl.constexpr,
    UNITS: tl.constexpr,
    ALIKE: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Add one group's products with the weight of COUNT slices to the sums of the tokens that use as many."""
    SHRINK: tl.constexpr = device.shrink_at(WIDTHS, COUNT)
    high, low, facts = loaded
    upper = device.combined_codes(words, t, 0, WHICH, COUNT, GROUP, WIDTHS, LAYOUT, EMULATE)
    lower = device.combined_codes(words, t, UNITS, WHICH, COUNT, GROUP, WIDTHS, LAYOUT, EMULATE)
    d0, d1, d2, d3 = products(upper, lower, high, low, ACTIVATION, EMULATE)
    scale0, zero0 = grids[0][WHICH], grids[0][2 + WHICH]
    scale1, zero1 = grids[1][WHICH], grids[1][2 + WHICH]
    b0 = device.add_group(sums[0], d0, scale0, zero0, facts[0], facts[1], SHRINK)
    b1 = device.add_group(sums[1], d1, scale0, zero0, facts[2], facts[3], SHRINK)
    b2 = device.add_group(sums[2], d2, scale1, zero1, facts[0], facts[1], SHRINK)
    b3 = device.add_group(sums[3], d3, scale1, zero1, facts[2], facts[3], SHRINK)
    if not ALIKE:
        even = used[0] == COUNT
        odd = used[1] == COUNT
        b0, b1 = tl.where(even, b0, sums[0]), tl.where(odd, b1, sums[1])
        b2, b3 = tl.where(even, b2, sums[2]), tl.where(odd, b3, sums[3])
    return b0, b1, b2, b3


@triton.jit
def many_tokens_step(
    sums,
    acts,
    chunk,
    pair,
    lane,
    block,
    used,
    present,
    tokens,
    COUNT: tl.constexpr,
    ALIKE: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Add a pair of groups of a block of eight tokens, each token by the codes of its own slice count.

    Codes are made, and multiplied, for the counts that some token has; for COUNT alone, without asking, where tokens
    are ALIKE.
    """
    UNITS: tl.constexpr = device.units_before(WIDTHS, LAYOUT, COUNT)
    t = lane % 4
    words = device.split_words(chunk[0], t, COUNT, WIDTHS, LAYOUT, GROUP, 2, EMULATE)
    for which in tl.static_range(2):
        loaded = load_block(acts, 2 * pair + which, block, lane, tokens, GROUP, K_PADDED, ACTIVATION, EMULATE)
        for count in tl.static_range(COUNT if ALIKE else 1, COUNT + 1):
            if ALIKE or (present >> count) & 1 != 0:
                sums = count_step(
                    sums,
                    words,
                    chunk[1],
                    loaded,
                    used,
                    t,
                    count,
                    which,
                    UNITS,
                    ALIKE,
                    WIDTHS,
                    LAYOUT,
                    GROUP,
                    ACTIVATION,
                    EMULATE,
                )
    return sums


@triton.jit
def chain_sums(
    operands,
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
    """Sum each warp's chain of pairs of groups, in order; returns two float32 [THREADS] for ONE token, else four.

    operands: acts, weight, and the tile (thread numbers, first row of a lane, block of tokens, counts of a lane's
    tokens, a word with a bit for each count there is, the largest, tokens and rows in all).

    No token uses more than COUNT slices. WHOLE: at least one uses as many. ALIKE: all do.
    """
    STEPS: tl.constexpr = (K_PADDED // GROUP + 15) // 16
    acts, weight, tile = operands
    tid, first_row, block, used, present, most, tokens, n_rows = tile
    zero = tl.zeros(tid.shape, tl.float32)
    sums = (zero, zero)
    if not ONE:
        sums = (zero, zero, zero, zero)
    lane = tid % 32
    for step in tl.range(0, STEPS):
        pair = step * 8 + tid // 32
        # All loads of a step are asked for before the first is used; other warps multiply meanwhile.
        chunk = load_chunk(
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
                block,
                used,
                present,
                tokens,
                COUNT,
                ALIKE,
                WIDTHS,
                LAYOUT,
                GROUP,
                K_PADDED,
                ACTIVATION,
                EMULATE,
            )
    return sums
