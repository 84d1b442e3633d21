"""Two to eight tokens, which stay in shared memory, times tile after tile of 16 rows, whose words come ahead.

A program has the whole of a multiprocessor: two teams of eight warps, a chain a warp (`chains`), that share the
activations of all columns, and each go from tile to tile. Warps of a team wait for one another once a tile, when the
sums of chains are added. Words come by rings (`rings`), and take no registers before they are multiplied.

Names are those of `rings`; base is the address of a program's shared memory (`resident_layout`).
"""

import triton
import triton.language as tl

from mobiquant_compiler.codegen import chains, parts, products, rings, shared_memory, steps, tiles
from mobiquant_compiler.codegen.resident_layout import SUMS as SUMS_BYTES

TEAM = rings.TEAM
ALL = tl.constexpr(3)  # the barrier where both teams meet; their own are 1 and 2
SUMS = tl.constexpr(SUMS_BYTES)


@triton.jit
def copy_activations(base, acts, tid, GROUPS: tl.constexpr, HALVES: tl.constexpr):
    """Begin to copy all of eight tokens: high halves, low ones, steps and shifts, as they lie in memory."""
    for half in tl.static_range(HALVES):
        for start in tl.static_range(0, GROUPS * 64, 2 * TEAM):
            at = start + tid
            shared_memory.copy_where(base + half * (GROUPS * 1024) + at * 16, acts[half] + at * 4, at < GROUPS * 64)
    for start in tl.static_range(0, GROUPS * 4, 2 * TEAM):
        at = start + tid
        shared_memory.copy_where(base + HALVES * (GROUPS * 1024) + at * 16, acts[2] + at * 4, at < GROUPS * 4)


@triton.jit
def read_group(base, group, lane, GROUPS: tl.constexpr, HALVES: tl.constexpr):
    """Read what there is of eight tokens and a group of 128 columns, as `products.load_all` loads it."""
    group = products.existing(group, GROUPS)
    at = base + group * 1024 + lane * 16
    high = shared_memory.read_four(at) + shared_memory.read_four(at + 512)
    low = high
    if HALVES == 2:
        low = shared_memory.read_four(at + GROUPS * 1024) + shared_memory.read_four(at + (GROUPS * 1024 + 512))
    found = shared_memory.read_four(base + HALVES * (GROUPS * 1024) + group * 64 + lane % 4 * 16)
    facts = ()
    for index in tl.static_range(4):
        facts = facts + (found[index].to(tl.float32, bitcast=True),)
    return high, low, facts


@triton.jit
def group_of(words, grids, WHICH: tl.constexpr):
    """Return words and scales of one group of a pair, as those of a pair of which it is the first."""
    own = ()
    facts = ()
    for index in tl.static_range(len(words)):
        own = own + ((words[index][WHICH],),)
    for half in tl.static_range(2):
        scale, zero = grids[half][WHICH], grids[half][2 + WHICH]
        facts = facts + ((scale, scale, zero, zero),)
    return own, facts


@triton.jit
def add_group(
    sums,
    base,
    group,
    taken,
    tid,
    given,
    COUNT: tl.constexpr,
    ALIKE: tl.constexpr,
    WIDTHS: tl.constexpr,
    GROUP: tl.constexpr,
    LAYOUT: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Add a group to the sums, given what `group_of` returns, steps of the tokens and the largest count."""
    HALVES: tl.constexpr = 2 if ACTIVATION == "a16" else 1
    now = read_group(base, group, tid % 32, K_PADDED // GROUP, HALVES)
    return steps.add_group(
        sums,
        (),
        (taken[0],),
        (taken[1],),
        (0,),
        tid % 32,
        (now,),
        given[0],
        given[1],
        COUNT,
        True,
        ALIKE,
        0,
        WIDTHS,
        LAYOUT,
        GROUP,
        ACTIVATION,
        False,
    )


@triton.jit
def add_chains(sums, room, tid, SIDES: tl.constexpr):
    """Return the sums of all chains, float32 [THREADS]: of a lane's four that of number ``warp % 4``.

    Chains are added as `fragments.sum_neighbours` does. room: memory of which the next tile writes another side, if
    there are two SIDES.
    """
    if SIDES == 1:
        shared_memory.meet(1 + tid // TEAM, TEAM)
    for number in tl.static_range(4):
        shared_memory.write_one(room + (tid % TEAM // 32 * 128 + number * 32 + tid % 32) * 4, sums[number])
    shared_memory.meet(1 + tid // TEAM, TEAM)
    found = ()
    for warp in tl.static_range(8):
        found = found + (shared_memory.read_one(room + (warp * 128 + tid % 128) * 4).to(tl.float32, bitcast=True),)
    left = (found[0] + found[1]) + (found[2] + found[3])
    return left + ((found[4] + found[5]) + (found[6] + found[7]))


@triton.jit
def store_tile(total, tile, weights, tokens, tid, HAS_BIAS: tl.constexpr):
    """Add the bias and write a tile of eight tokens by 16 rows, given what `add_chains` returns."""
    part, own = parts.which_part(tile, weights[5], 16)
    y_ptr, n_rows = parts.of_part(part, weights[3]), parts.of_part(part, weights[5])
    number, lane = tid // 32 % 4, tid % 32
    row = own * 16 + lane // 4 + number // 2 * 8
    token = lane % 4 * 2 + number % 2
    mine = (row < n_rows) & (token < tokens) & (tid % TEAM < 128)
    if HAS_BIAS:
        total += tl.load(parts.of_part(part, weights[4]) + row, mask=mine, other=0.0).to(tl.float32)
    at = token.to(tl.int64) * n_rows + row
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=mine)


@triton.jit
def multiply_tiles(
    acts,
    weights,
    given,
    base,
    COUNT: tl.constexpr,
    ALIKE: tl.constexpr,
    WIDTHS: tl.constexpr,
    GROUP: tl.constexpr,
    LAYOUT: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Multiply up to eight tokens by every tile of 16 rows that is the program's, and write the results.

    Args: acts are the pointers (high, low, affine); given is (pointer to counts, thread numbers, the largest count,
        tokens).
    """
    counts_ptr, tid, most, tokens = given
    HALVES: tl.constexpr = 2 if ACTIVATION == "a16" else 1
    GROUPS: tl.constexpr = K_PADDED // GROUP
    DTYPE: tl.constexpr = weights[1][0].dtype.element_ty
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    STEPS: tl.constexpr = rings.laid_out("steps", GROUPS, SIZE, HALVES)
    DEPTH: tl.constexpr = rings.laid_out("depth", GROUPS, SIZE, HALVES, COUNT)
    SIDES: tl.constexpr = rings.laid_out("sides", GROUPS, SIZE, HALVES, COUNT)
    shrinks = ()
    if not ALIKE:
        shrinks = tiles.shrinks_of(counts_ptr, 0, tid % 4, tokens, 1, WIDTHS, False)
    team = (
        base
        + rings.laid_out("acts_bytes", GROUPS, SIZE, HALVES)
        + tid // TEAM * rings.laid_out("team_bytes", GROUPS, SIZE, HALVES, COUNT)
    )
    ring = team + tid % TEAM // 32 * (1024 * COUNT * DEPTH)
    zero = tl.program_id(1) * 0
    tile = rings.tile_of(zero, tid, weights[5])
    upper, lower, words_each = rings.begin_tile(team, zero, tile, weights, tid, COUNT, GROUPS, HALVES)
    asked = (zero, tile, zero, upper, lower, words_each)
    rings.ask(ring, asked, weights, tid, COUNT, GROUPS)
    # Words come from further away than activations: they are asked for first.
    copy_activations(base, acts, tid, GROUPS, HALVES)
    asked = rings.ask_after(team, asked, weights, tid, COUNT, GROUPS, HALVES)
    for ahead in tl.static_range(1, DEPTH):
        rings.ask(ring + ahead * (1024 * COUNT), asked, weights, tid, COUNT, GROUPS)
        asked = rings.ask_after(team, asked, weights, tid, COUNT, GROUPS, HALVES)
    shared_memory.wait_for_copies(tid, DEPTH - 1)
    shared_memory.meet(tid * 0 + ALL, 2 * TEAM)  # activations and the first scales are others' copies
    slot = zero
    for turn in tl.range(0, tl.cdiv(parts.blocks_of(weights[5], 16), 2 * tl.num_programs(1))):
        tile = rings.tile_of(turn, tid, weights[5])
        shared_memory.leave(tile >= parts.blocks_of(weights[5], 16))
        sums = chains.zeros_for(tid, 4)
        for step in tl.range(0, STEPS):
            here = ring + slot * (1024 * COUNT)
            words, grids = rings.take(team, here, turn, step, tid, DEPTH - 1, DTYPE, COUNT, GROUPS, HALVES)
            rings.ask(here, asked, weights, tid, COUNT, GROUPS)
            asked = rings.ask_after(team, asked, weights, tid, COUNT, GROUPS, HALVES)
            slot = (slot + 1) % DEPTH
            group = step * 16 + tid % TEAM // 32 * 2
            now = group_of(words, grids, 0)
            following = group_of(words, grids, 1)
            if STEPS > 2:
                # Half as many instructions where a tile is long; the compiler must not know that the grid is one wide.
                for which in tl.range(0, tl.num_programs(0) + 1):
                    sums = add_group(
                        sums,
                        base,
                        group + which,
                        now,
                        tid,
                        (shrinks, most),
                        COUNT,
                        ALIKE,
                        WIDTHS,
                        GROUP,
                        LAYOUT,
                        K_PADDED,
                        ACTIVATION,
                    )
                    now = following
            else:
                for which in tl.static_range(2):
                    sums = add_group(
                        sums,
                        base,
                        group + which,
                        now if which == 0 else following,
                        tid,
                        (shrinks, most),
                        COUNT,
                        ALIKE,
                        WIDTHS,
                        GROUP,
                        LAYOUT,
                        K_PADDED,
                        ACTIVATION,
                    )
        room = team + rings.laid_out("sums_at", GROUPS, SIZE, HALVES, COUNT) + turn % SIDES * SUMS
        total = add_chains(sums, room, tid, SIDES)
        store_tile(total, tile, weights, tokens, tid, HAS_BIAS)
    shared_memory.wait_for_copies(tid, 0)
