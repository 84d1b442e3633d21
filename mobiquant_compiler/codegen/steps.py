"""What one pair of groups adds to the sums of several blocks of eight tokens.

Names are those of `products`. Tuples hold four sums for each block of tokens and, in it, each tile of 16 rows.
"""

import triton
import triton.language as tl

from mobiquant_compiler.codegen import device, products, scaling


@triton.jit
def four_of(values, INDEX: tl.constexpr):
    """Return the INDEX-th four of a tuple: a block of eight tokens by a tile of 16 rows, as a lane has it."""
    return values[4 * INDEX : 4 * INDEX + 4]


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
def mixed_grids(grids, shrinks, WHICH: tl.constexpr):
    """Return what `add_block` wants of rows' grids of one group of a pair, where two tokens have their own steps."""
    own = ()
    for side in tl.static_range(2):
        grow = scaling.power_of_minus(shrinks[side])
        for half in tl.static_range(2):
            grid = grids[half]
            own = own + (scaling.grid_at(grid[WHICH], grid[2 + WHICH], shrinks[side], grow),)
    return own


@triton.jit
def alike_group(
    sums,
    acts,
    words,
    grids,
    ats,
    lane,
    loaded,
    COUNT: tl.constexpr,
    WHICH: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Add one group of tokens that all use COUNT slices: the codes of all of them are one integer.

    A block's activations are loaded once for all tiles of rows.
    """
    UNITS: tl.constexpr = device.units_before(WIDTHS, LAYOUT, COUNT)
    SHRINK: tl.constexpr = scaling.shrink_at(WIDTHS, COUNT)
    TILES: tl.constexpr = len(words)
    IN_TURN: tl.constexpr = len(ats) * TILES > 1
    t = lane % 4
    codes = ()
    centres = ()
    for tile in tl.static_range(TILES):
        for half in tl.static_range(2):
            own = device.combined_codes(words[tile], t, half * UNITS, WHICH, COUNT, GROUP, WIDTHS, LAYOUT, EMULATE)
            grid = grids[tile][half]
            codes = codes + (own,)
            centres = centres + (scaling.grid_at(grid[WHICH], grid[2 + WHICH], SHRINK, 1.0 / SHRINK),)
    added = ()
    for block in tl.static_range(len(ats)):
        if len(loaded) > 0:
            high, low, facts = loaded[block]
        else:
            high, low, facts = products.load_all(acts, ats[block], lane, GROUP, ACTIVATION, EMULATE)
        for tile in tl.static_range(TILES):
            first, second = centres[2 * tile], centres[2 * tile + 1]
            dots = products.block_products(
                codes[2 * tile], codes[2 * tile + 1], high, low, IN_TURN, ACTIVATION, EMULATE
            )
            dots = products.without_spare(dots, device.spare_bits(WIDTHS, LAYOUT, COUNT))
            own = four_of(sums, block * TILES + tile)
            added = added + add_block(own, dots, (first, second, first, second), facts)
    return added


@triton.jit
def slice_products(
    dots,
    acts,
    words,
    ats,
    lane,
    loaded,
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
    TILES: tl.constexpr = len(words)
    t = lane % 4
    codes = ()
    for tile in tl.static_range(TILES):
        for half in tl.static_range(2):
            own = device.combined_codes(words[tile], t, half * UNITS + FIRST, WHICH, 1, GROUP, OWN, LAYOUT, EMULATE)
            codes = codes + (own,)
    appended = ()
    for block in tl.static_range(len(ats)):
        if len(loaded) > 0:
            high, low, _ = loaded[block]
        else:
            high, low = products.load_block(acts, ats[block], lane, GROUP, ACTIVATION, EMULATE)
        for tile in tl.static_range(TILES):
            before = ()
            if INDEX > 0:
                before = four_of(dots, block * TILES + tile)
            both = codes[2 * tile : 2 * tile + 2]
            own = shrinks[2 * block : 2 * block + 2]
            appended = appended + products.append_products(
                before, both, high, low, own, INDEX, WIDTHS, LAYOUT, ACTIVATION, EMULATE
            )
    return appended


@triton.jit
def mixed_group(
    sums,
    acts,
    words,
    grids,
    ats,
    lane,
    loaded,
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
    TILES: tl.constexpr = len(words)
    dots = slice_products(
        (), acts, words, ats, lane, loaded, shrinks, 0, UNITS, WHICH, WIDTHS, LAYOUT, GROUP, ACTIVATION, EMULATE
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
                loaded,
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
        if len(loaded) > 0:
            facts = loaded[block][2]
        else:
            facts = products.load_facts(acts[2], ats[block], lane % 4, EMULATE)
        for tile in tl.static_range(TILES):
            own = mixed_grids(grids[tile], shrinks[2 * block : 2 * block + 2], WHICH)
            before = four_of(sums, block * TILES + tile)
            added = added + add_block(before, four_of(dots, block * TILES + tile), own, facts)
    return added


@triton.jit
def add_group(
    sums,
    acts,
    words,
    grids,
    ats,
    lane,
    loaded,
    shrinks,
    most,
    COUNT: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIKE: tl.constexpr,
    WHICH: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Add one group of a pair; by tile, words are what `device.split_words` gives, grids (scale, scale, zero, zero).

    loaded: by block what `products.load_all` gave, or nothing: then blocks `ats` are loaded here.
    """
    if ALIKE:
        sums = alike_group(
            sums, acts, words, grids, ats, lane, loaded, COUNT, WHICH, WIDTHS, LAYOUT, GROUP, ACTIVATION, EMULATE
        )
    else:
        sums = mixed_group(
            sums,
            acts,
            words,
            grids,
            ats,
            lane,
            loaded,
            shrinks,
            most,
            COUNT,
            WHOLE,
            WHICH,
            WIDTHS,
            LAYOUT,
            GROUP,
            ACTIVATION,
            EMULATE,
        )
    return sums


@triton.jit
def load_early(
    acts,
    pair,
    lane,
    blocks,
    COUNT: tl.constexpr,
    WIDTHS: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Load the only block of tokens while words are under way: of a pair's first group, and up to four bits of both.

    Returns what `add_group` wants, by group. ptxas would put the loads behind the wait for words, for a second wait.
    """
    GROUPS: tl.constexpr = K_PADDED // GROUP
    first = products.existing(2 * pair, GROUPS) * blocks[1] + blocks[0][0]
    loaded = ((products.load_all(acts, first, lane, GROUP, ACTIVATION, False),), ())
    if device.bits_before(WIDTHS, COUNT) <= 4:
        second = products.existing(2 * pair + 1, GROUPS) * blocks[1] + blocks[0][0]
        loaded = (loaded[0], (products.load_all(acts, second, lane, GROUP, ACTIVATION, False),))
    return loaded


@triton.jit
def many_tokens_step(
    sums,
    acts,
    chunks,
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

    chunks: what `products.load_chunk` gave for each tile of 16 rows. blocks: numbers of the program's blocks, and how
    many there are in all.
    """
    loaded = ((), ())
    if WHOLE and len(blocks[0]) == 1 and len(chunks) == 1 and not EMULATE:
        loaded = load_early(acts, pair, lane, blocks, COUNT, WIDTHS, GROUP, K_PADDED, ACTIVATION)
    words = ()
    grids = ()
    for tile in tl.static_range(len(chunks)):
        words = words + (device.split_words(chunks[tile][0], lane % 4, COUNT, WIDTHS, LAYOUT, GROUP, 2, EMULATE),)
        grids = grids + (chunks[tile][1],)
    for which in tl.static_range(2):
        first = products.existing(2 * pair + which, K_PADDED // GROUP) * blocks[1]
        ats = ()
        for block in tl.static_range(len(blocks[0])):
            ats = ats + (first + blocks[0][block],)
        sums = add_group(
            sums,
            acts,
            words,
            grids,
            ats,
            lane,
            loaded[which],
            shrinks,
            most,
            COUNT,
            WHOLE,
            ALIKE,
            which,
            WIDTHS,
            LAYOUT,
            GROUP,
            ACTIVATION,
            EMULATE,
        )
    return sums
