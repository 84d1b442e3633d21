"""A warp's share of tokens times a sliced weight: what it loads, and integer products.

Names: acts are the pointers (high, low, affine) to quantized activations, weight those (slices, scale, zero). Four
numbers stand for a tile of 16 rows by a block of eight tokens as `fragments.multiply_tile` holds it: rows g and g + 8,
tokens 2 t and 2 t + 1 of each.
"""

import triton
import triton.language as tl

from mobiquant_compiler.codegen import activations, device, fragments, scaling


@triton.jit
def load_row(
    slices_ptr,
    row,
    pair,
    t,
    most,
    n_rows,
    base,
    COUNT: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Ask for a lane's words of a row's pair of groups, a tuple for each packed unit; see `load_chunk`.

    base: nothing, or the words of the base slice, where they were asked for before.
    """
    # Where the chains come out even no lane is without a share.
    CHECKED: tl.constexpr = K_PADDED // GROUP % 16 != 0 or not WHOLE
    words = base
    for index in tl.static_range(1 if len(base) > 0 else 0, COUNT):
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
    return words


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
    CUT: tl.constexpr = K_PADDED // GROUP % 16 != 0
    slices_ptr, scale_ptr, zero_ptr = weight
    words = ()
    grids = ()
    for half in tl.static_range(2):
        row = tl.minimum(first_row + half * 8, n_rows - 1)  # rows past the last are read as the last
        words = words + load_row(
            slices_ptr, row, pair, t, most, n_rows, (), COUNT, WHOLE, WIDTHS, LAYOUT, GROUP, K_PADDED, EMULATE
        )
        scales = scaling.load_scales(scale_ptr, row, pair, GROUP, K_PADDED, CUT, EMULATE)
        grids = grids + (scales + scaling.load_scales(zero_ptr, row, pair, GROUP, K_PADDED, CUT, EMULATE),)
    return words, grids


@triton.jit
def existing(group, GROUPS: tl.constexpr):
    """Return the group, or the last one where there is none: its weight is zero then, whatever is read."""
    if GROUPS % 16 != 0:
        group = tl.minimum(group, GROUPS - 1)
    return group


@triton.jit
def as_floats(words):
    """Return words as the float32 that they are, a tuple of both."""
    floats = ()
    for index in tl.static_range(len(words)):
        floats = floats + (words[index].to(tl.float32, bitcast=True),)
    return floats


@triton.jit
def load_facts(affine_ptr, at, t, EMULATE: tl.constexpr):
    """Load step and shift of tokens 2 t and 2 t + 1 of block `at` of the groups' blocks; four float32 [THREADS]."""
    return as_floats(fragments.read_words(affine_ptr + (at * 8 + 2 * t) * 2, 4, EMULATE))


@triton.jit
def load_fact(affine_ptr, group, EMULATE: tl.constexpr):
    """Load step and shift of a group of the only token; two float32 [THREADS], the same in every lane."""
    return as_floats(fragments.read_words(affine_ptr + group * 16, 2, EMULATE))


@triton.jit
def load_block(acts, at, lane, GROUP: tl.constexpr, ACTIVATION: tl.constexpr, EMULATE: tl.constexpr):
    """Load the bytes of block `at` of the groups' blocks of eight tokens, high halves and low ones.

    Nothing is masked: all blocks are whole in memory, and a token that does not exist has a column of its own.
    """
    high = activations.load_activation(acts[0], at, lane, GROUP, EMULATE)
    low = high
    if ACTIVATION == "a16":
        low = activations.load_activation(acts[1], at, lane, GROUP, EMULATE)
    return high, low


@triton.jit
def load_all(acts, at, lane, GROUP: tl.constexpr, ACTIVATION: tl.constexpr, EMULATE: tl.constexpr):
    """Load all there is of block `at` of the groups' blocks of eight tokens: high halves, low ones, and facts."""
    high, low = load_block(acts, at, lane, GROUP, ACTIVATION, EMULATE)
    return high, low, load_facts(acts[2], at, lane % 4, EMULATE)


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
    """Load the bytes of one token for a pair of groups; returns GROUP / 8 int32 [THREADS], as `token_products` wants.

    A product of one token has columns to spare. Lanes 0 and 1 of a quad multiply the first group, lanes 2 and 3 the
    second, so words stay where they were loaded: columns 0 and 1 are the high and the low half of the first group,
    columns 2 and 3 those of the second. Of a8 column 0 is the first group and column 1 the second.
    """
    high_ptr, low_ptr, _ = acts
    column = lane // 4
    which = column
    ptr = high_ptr
    if ACTIVATION == "a16":
        which = column // 2
        ptr = tl.where(column % 2 == 0, high_ptr, low_ptr)
    here = which == (lane % 4) // 2
    if K_PADDED // GROUP % 16 != 0:
        here = here & (2 * pair + which < K_PADDED // GROUP)
    # Lanes 0 and 2 have the first half of a group's columns, quarters 0 and 1; lanes 1 and 3 the second: those of lanes
    # 0 and 2, 1 and 3 of a quad, at places that differ by a constant, so that one address serves all loads.
    WORDS: tl.constexpr = activations.part_words(GROUP)
    ptr += (2 * pair + which) * (2 * GROUP) + (lane % 2) * WORDS
    tokens = ()
    for half in tl.static_range(2):
        tokens = tokens + activations.load_quarter(ptr + half * (2 * WORDS), here, GROUP, EMULATE)
    return tokens


@triton.jit
def add_products(
    dots, upper_codes, lower_codes, tokens, FIRST: tl.constexpr, STEP: tl.constexpr, EMULATE: tl.constexpr
):
    """Add products of 16 rows by 8 columns to dots, one after the other: every STEP-th of them from FIRST on."""
    for m in tl.static_range(FIRST, len(tokens) // 2, STEP):
        codes = (upper_codes[2 * m], lower_codes[2 * m], upper_codes[2 * m + 1], lower_codes[2 * m + 1])
        dots = fragments.multiply_tile(
            codes, tokens[2 * m], tokens[2 * m + 1], dots[0], dots[1], dots[2], dots[3], EMULATE
        )
    return dots


@triton.jit
def half_products(upper_codes, lower_codes, tokens, EMULATE: tl.constexpr):
    """Multiply codes by one half of the activations; even and odd steps are summed apart, so that each waits less."""
    zero = fragments.filled(tokens[0], 0)
    dots = add_products((zero, zero, zero, zero), upper_codes, lower_codes, tokens, 0, 2, EMULATE)
    if len(tokens) > 2:
        odd = add_products((zero, zero, zero, zero), upper_codes, lower_codes, tokens, 1, 2, EMULATE)
        dots = (dots[0] + odd[0], dots[1] + odd[1], dots[2] + odd[2], dots[3] + odd[3])
    return dots


@triton.jit
def token_products(upper_codes, lower_codes, tokens, ACTIVATION: tl.constexpr, EMULATE: tl.constexpr):
    """Multiply 16 rows by one token exactly; returns row g by the first and the second group, then row g + 8 by them.

    Lane 0 of a quad holds what the docstring says; the others take part only.
    """
    d0, d1, d2, d3 = half_products(upper_codes, lower_codes, tokens, EMULATE)
    if ACTIVATION == "a16":
        # Lane 0 has both halves of the first group, lane 1 those of the second.
        upper, lower = (d0 << 8) + d1, (d2 << 8) + d3
        d0, d1 = upper, fragments.from_lanes_away(upper, 1, EMULATE)
        d2, d3 = lower, fragments.from_lanes_away(lower, 1, EMULATE)
    return d0, d1, d2, d3


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
def products_in_turn(upper_codes, lower_codes, high, low, ACTIVATION: tl.constexpr, EMULATE: tl.constexpr):
    """Do what `products` does in four registers, for warps that have other blocks to multiply while one waits."""
    zero = fragments.filled(high[0], 0)
    dots = (zero, zero, zero, zero)
    if ACTIVATION == "a16":
        dots = add_products(dots, upper_codes, lower_codes, high, 0, 1, EMULATE)
        dots = (dots[0] << 8, dots[1] << 8, dots[2] << 8, dots[3] << 8)
    return add_products(dots, upper_codes, lower_codes, low, 0, 1, EMULATE)


@triton.jit
def block_products(
    upper_codes, lower_codes, high, low, IN_TURN: tl.constexpr, ACTIVATION: tl.constexpr, EMULATE: tl.constexpr
):
    """Multiply 16 rows by a block of eight tokens exactly; IN_TURN where other blocks or slices fill the waits."""
    if IN_TURN:
        dots = products_in_turn(upper_codes, lower_codes, high, low, ACTIVATION, EMULATE)
    else:
        dots = products(upper_codes, lower_codes, high, low, ACTIVATION, EMULATE)
    return dots


@triton.jit
def without_spare(dots, SPARE: tl.constexpr):
    """Return dot products of codes where those of codes times ``2**SPARE`` are given; nothing is rounded."""
    if SPARE > 0:
        dots = (dots[0] >> SPARE, dots[1] >> SPARE, dots[2] >> SPARE, dots[3] >> SPARE)
    return dots


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
def append_products(
    dots,
    codes,
    high,
    low,
    shrinks,
    INDEX: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Multiply a block by codes of slice INDEX of rows g and g + 8, and append it to the products of slices before."""
    more = block_products(codes[0], codes[1], high, low, True, ACTIVATION, EMULATE)
    more = without_spare(more, device.spare_bits(device.width_of(WIDTHS, INDEX), LAYOUT, 1))
    if INDEX > 0:
        more = append_slice(dots, more, shrinks, INDEX, WIDTHS)
    return more
