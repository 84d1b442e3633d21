"""One token times a sliced weight: what a warp asks for and when, and what it adds.

acts and weight are tuples of pointers as in `products`, weight with the bias behind. Columns are dealt to chains, and
chains added up, as `chains` says, to the same bits.
"""

import triton
import triton.language as tl

from mobiquant_compiler.codegen import device, fragments, products, scaling, tiles


@triton.jit
def load_step(
    acts,
    weight,
    place,
    step,
    base,
    COUNT: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Ask for all that a step of a warp's chain needs, and wait for nothing.

    A warp waits by six counters, which all its loads share: what is asked for together has to be needed together.
    Activations that are asked for where they are needed come with the words of the next step, and from as far away.

    Args:
        acts: Pointers (high, low, affine).
        weight: Pointers (slices, scale, zero, bias).
        place: The program's first row, of which there are 16 from there on, thread numbers, and rows in all.
        step: Which of the chain's.
        base: Nothing, or what this gave for a COUNT of 1: then only the other slices are asked for.

    Returns words, a tuple for each packed unit of row g, then of row g + 8; for each of the rows scales and zero points
    as `scaling.ask_scales` gives them; activations; and the facts of both groups.
    """
    CUT: tl.constexpr = K_PADDED // GROUP % 16 != 0
    UNITS: tl.constexpr = device.unit_count(WIDTHS, LAYOUT, 0)
    program_row, tid, n_rows = place
    slices_ptr, scale_ptr, zero_ptr = weight[:3]
    # In 64 bits, so that the compiler sees that addresses of rows and steps differ by constants.
    pair = (step * 8 + tid // 32).to(tl.int64)
    first_row = (program_row + tid % 32 // 4).to(tl.int64)
    words = ()
    grids = ()
    for half in tl.static_range(2):
        row = first_row + half * 8
        before = ()
        if len(base) > 0:
            before = base[0][half * UNITS : half * UNITS + UNITS]
        words = words + products.load_row(
            slices_ptr,
            row,
            pair,
            tid % 4,
            COUNT,
            n_rows,
            before,
            COUNT,
            True,
            WIDTHS,
            LAYOUT,
            GROUP,
            K_PADDED,
            EMULATE,
        )
        if len(base) == 0:
            scale = scaling.ask_scales(scale_ptr, row, pair, GROUP, K_PADDED, CUT, EMULATE)
            grids = grids + ((scale, scaling.ask_scales(zero_ptr, row, pair, GROUP, K_PADDED, CUT, EMULATE)),)
    if len(base) > 0:
        found = (words,) + base[1:]
    else:
        token = products.load_token_pair(acts, pair, tid % 32, GROUP, K_PADDED, ACTIVATION, EMULATE)
        first = products.load_fact(acts[2], products.existing(2 * pair, K_PADDED // GROUP), EMULATE)
        second = products.load_fact(acts[2], products.existing(2 * pair + 1, K_PADDED // GROUP), EMULATE)
        found = (words, grids, token, (first, second))
    return found


@triton.jit
def add_step(
    sums,
    weight,
    chunk,
    t,
    COUNT: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Add a pair of groups, both in one product, as `load_step` gave it; returns the sums of rows g and g + 8."""
    UNITS: tl.constexpr = device.units_before(WIDTHS, LAYOUT, COUNT)
    SHRINK: tl.constexpr = scaling.shrink_at(WIDTHS, COUNT)
    words, grids, tokens, facts = chunk
    # A lane's words go on from the first group into the second: as columns of one group of twice the size.
    upper = device.combined_codes(words, t, 0, -1, COUNT, 2 * GROUP, WIDTHS, LAYOUT, EMULATE)
    lower = device.combined_codes(words, t, UNITS, -1, COUNT, 2 * GROUP, WIDTHS, LAYOUT, EMULATE)
    dots = products.token_products(upper, lower, tokens, ACTIVATION, EMULATE)
    dots = products.without_spare(dots, device.spare_bits(WIDTHS, LAYOUT, COUNT))
    sides = ()
    for half in tl.static_range(2):
        a = sums[half]
        scales = scaling.scales_of(grids[half][0], weight[1])
        zeros = scaling.scales_of(grids[half][1], weight[2])
        for which in tl.static_range(2):
            grid = scaling.grid_at(scales[which], zeros[which], SHRINK, 1.0 / SHRINK)
            a = scaling.add_group(a, dots[2 * half + which], grid, facts[which][0], facts[which][1])
        sides = sides + (a,)
    return sides


@triton.constexpr_function
def is_rolled(bits, steps):
    """Say whether all steps are those of one loop, though what was asked for early is asked for again.

    Measured: two steps of four slices take longer where their instructions stand twice, as programs are over by then.
    """
    return bits > 6 and steps == 2


@triton.jit
def chain_sums(
    acts,
    weight,
    place,
    base,
    COUNT: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Sum a warp's chain of pairs of groups, in order, by COUNT slices; returns the sums of rows g and g + 8.

    base: what `load_step` gave of the first step with one slice. Up to four bits the next step is asked for before this
    one is multiplied; for more there are no registers, and other warps multiply meanwhile.
    """
    STEPS: tl.constexpr = (K_PADDED // GROUP + 15) // 16
    BITS: tl.constexpr = device.bits_before(WIDTHS, COUNT)
    AHEAD: tl.constexpr = BITS <= 4
    ROLLED: tl.constexpr = is_rolled(BITS, STEPS)
    t = place[1] % 4
    zero = fragments.filled(place[1], 0).to(tl.float32)
    sums = (zero, zero)
    chunk = base
    if not ROLLED:
        chunk = load_step(acts, weight, place, 0, base, COUNT, WIDTHS, LAYOUT, GROUP, K_PADDED, ACTIVATION, EMULATE)
    if not ROLLED and not AHEAD:
        sums = add_step(sums, weight, chunk, t, COUNT, WIDTHS, LAYOUT, GROUP, ACTIVATION, EMULATE)
        # Addresses of later steps take no registers while the first is multiplied.
        place = (place[0], fragments.thread_again(place[1], EMULATE), place[2])
    for step in tl.range(0 if ROLLED else 1, STEPS):
        following = load_step(
            acts, weight, place, step, (), COUNT, WIDTHS, LAYOUT, GROUP, K_PADDED, ACTIVATION, EMULATE
        )
        if AHEAD:
            sums = add_step(sums, weight, chunk, t, COUNT, WIDTHS, LAYOUT, GROUP, ACTIVATION, EMULATE)
            chunk = following
        else:
            sums = add_step(sums, weight, following, t, COUNT, WIDTHS, LAYOUT, GROUP, ACTIVATION, EMULATE)
    if AHEAD:
        sums = add_step(sums, weight, chunk, t, COUNT, WIDTHS, LAYOUT, GROUP, ACTIVATION, EMULATE)
    return sums


@triton.jit
def multiply_program(
    acts,
    weight,
    tile,
    WIDTHS: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    GROUP: tl.constexpr,
    LAYOUT: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Multiply the only token by a program's 16 rows, by as many slices as it uses, and write the result.

    Eight warps have a chain each. What every count needs of the first step is asked for before the count is there.

    Args: acts are the pointers (high, low, affine), weight those (slices, scale, zero, bias); tile is (pointer to the
        count, pointer to the output, first row, thread numbers, tokens, rows in all).
    """
    counts_ptr, y_ptr, program_row, tid, tokens, n_rows = tile
    tl.static_assert(tid.shape[0] == 256, "eight warps multiply one token")
    place = (program_row, tid, n_rows)
    base = load_step(acts, weight, place, 0, (), 1, WIDTHS, LAYOUT, GROUP, K_PADDED, ACTIVATION, EMULATE)
    most = tl.minimum(tl.maximum(tl.load(counts_ptr), 1), NUM_SLICES)
    for count in tl.static_range(1, NUM_SLICES + 1):
        if most == count:
            sums = chain_sums(acts, weight, place, base, count, WIDTHS, LAYOUT, GROUP, K_PADDED, ACTIVATION, EMULATE)
            result = (y_ptr, weight[3], program_row, 0, tokens, n_rows)
            tiles.store_blocks(sums, result, HAS_BIAS, True, 1, 1, 1, 8)
