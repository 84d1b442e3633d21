"""A chain of eight tokens of different slice counts: both groups of a pair are multiplied slice by slice.

Activations are loaded once a pair, and products begin while words of later slices are under way. Registers are short:
where a lane reads is computed anew for every pair, else addresses of all slices would stay in a fifth of them.

Names are those of `steps`. Every slice is read in runs that lanes share (`device.all_shared`).
"""

import triton
import triton.language as tl

from mobiquant_compiler.codegen import device, fragments, products, scaling, steps


@triton.jit
def load_slice(
    slices_ptr,
    row,
    pair,
    t,
    n_rows,
    INDEX: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Load what `device.load_pair` does of each unit of slice INDEX; the lane's place is one for slices of one width.

    Shapes: row, pair and t [THREADS]; returns a tuple, by unit, of tuples of int32 [THREADS].
    """
    UNIT: tl.constexpr = device.unit_bits(WIDTHS, LAYOUT, INDEX)
    WORDS: tl.constexpr = 2 * device.words_per_lane(UNIT, GROUP)
    CUT: tl.constexpr = K_PADDED // GROUP % 16 != 0
    place = row.to(tl.int64) * (K_PADDED * UNIT // 32) + (pair * (GROUP * UNIT // 16) + t * WORDS)
    here = 2 * pair + (t >> 1) < K_PADDED // GROUP
    words = ()
    for part in tl.static_range(device.unit_count(WIDTHS, LAYOUT, INDEX)):
        before = tl.cast(n_rows, tl.int64) * ((device.bits_before(WIDTHS, INDEX) + part * UNIT) * (K_PADDED // 32))
        run = device.load_run(
            slices_ptr + before + place,
            here,
            WORDS,
            device.aligned_words(WIDTHS, INDEX, part, UNIT, K_PADDED, WORDS),
            CUT,
            EMULATE,
        )
        words = words + (run,)
    return words


@triton.jit
def load_rows(
    operands,
    pair,
    tid,
    COUNT: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Load a pair of groups of rows g and g + 8: by row, words of each slice; by row, (scale, scale, zero, zero).

    tid: thread numbers as those of the tile, read again.
    """
    _, weight, tile = operands
    known, rows, _, _, _, n_rows = tile
    CUT: tl.constexpr = K_PADDED // GROUP % 16 != 0
    words = ()
    grids = ()
    for half in tl.static_range(2):
        # The difference is zero, which the compiler does not know: rows are computed from what was read again.
        row = tl.minimum(rows[0] + (tid - known) + half * 8, n_rows - 1)
        slices = ()
        for index in tl.static_range(COUNT):
            own = load_slice(weight[0], row, pair, tid % 4, n_rows, index, WIDTHS, LAYOUT, GROUP, K_PADDED, EMULATE)
            slices = slices + (own,)
        words = words + (slices,)
        scales = scaling.load_scales(weight[1], row, pair, GROUP, K_PADDED, CUT, EMULATE)
        grids = grids + (scales + scaling.load_scales(weight[2], row, pair, GROUP, K_PADDED, CUT, EMULATE),)
    return words, grids


@triton.jit
def multiply_slice(
    dots,
    words,
    loaded,
    t,
    shrinks,
    INDEX: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Multiply both groups by slice INDEX alone, and append it to dot products, by group, of tokens that use it."""
    OWN: tl.constexpr = device.width_of(WIDTHS, INDEX)
    UNITS: tl.constexpr = device.unit_count(WIDTHS, LAYOUT, INDEX)
    split = device.split_words(words[0][INDEX] + words[1][INDEX], t, 1, OWN, LAYOUT, GROUP, 2, EMULATE)
    both = ()
    for which in tl.static_range(2):
        high, low = loaded[which]
        upper = device.combined_codes(split, t, 0, which, 1, GROUP, OWN, LAYOUT, EMULATE)
        lower = device.combined_codes(split, t, UNITS, which, 1, GROUP, OWN, LAYOUT, EMULATE)
        own = products.append_products(
            dots[which], (upper, lower), high, low, shrinks, INDEX, WIDTHS, LAYOUT, ACTIVATION, EMULATE
        )
        both = both + (own,)
    return both


@triton.jit
def add_pair(
    sums,
    operands,
    pair,
    COUNT: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Add a pair of groups of the block of tokens to its four sums."""
    acts, _, tile = operands
    known, _, blocks, shrinks, _, _ = tile
    # The same numbers, of which the compiler knows only that they are not negative: it divides them by shifts.
    tid = fragments.thread_again(known, EMULATE) & (known.shape[0] - 1)
    words, grids = load_rows(operands, pair, tid, COUNT, WIDTHS, LAYOUT, GROUP, K_PADDED, EMULATE)
    ats = ()
    loaded = ()
    for which in tl.static_range(2):
        ats = ats + (products.existing(2 * pair + which, K_PADDED // GROUP) * blocks[1] + blocks[0][0],)
        loaded = loaded + (products.load_block(acts, ats[which], tid % 32, GROUP, ACTIVATION, EMULATE),)
    dots = ((), ())
    for index in tl.static_range(COUNT):
        dots = multiply_slice(dots, words, loaded, tid % 4, shrinks, index, WIDTHS, LAYOUT, GROUP, ACTIVATION, EMULATE)
    for which in tl.static_range(2):
        facts = products.load_facts(acts[2], ats[which], tid % 4, EMULATE)
        own = steps.mixed_grids(grids, shrinks, which)
        sums = steps.add_block(sums, dots[which], own, facts)
    return sums


@triton.jit
def mixed_chain(
    sums,
    operands,
    chain,
    COUNT: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Add one chain of pairs of groups, in order, to the four sums of a block of tokens by a tile of 16 rows.

    operands: as `chains.warp_sums` has them, of one block and one tile; at least one token uses COUNT slices.
    """
    for step in tl.range(0, (K_PADDED // GROUP + 15) // 16):
        sums = add_pair(sums, operands, step * 8 + chain, COUNT, WIDTHS, LAYOUT, GROUP, K_PADDED, ACTIVATION, EMULATE)
    return sums
