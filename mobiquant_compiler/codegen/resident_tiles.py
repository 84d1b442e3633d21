"""Two to eight tokens in shared memory times tile after tile of 16 rows, whose words come ahead.

A program has the whole of a multiprocessor: two teams of eight warps, a chain a warp (`chains`), that share
activations (`held_tokens`), and each go from tile to tile. Warps of a team wait for one another at the end of a
tile, when the sums of chains are added. Words come by rings (`rings`), and take no registers before they are
multiplied.

Names are those of `rings`; base is the address of a program's shared memory (`resident_layout`), ready that of its
barriers: those of activations, then two for each warp's ring.
"""

import triton
import triton.language as tl

from mobiquant_compiler.codegen import (
    chains,
    copy_engine,
    fragments,
    held_tokens,
    parts,
    rings,
    shared_memory,
    steps,
    tiles,
)
from mobiquant_compiler.codegen.resident_layout import RINGS_AT
from mobiquant_compiler.codegen.resident_layout import SUMS as SUMS_BYTES

TEAM = rings.TEAM
ALL = tl.constexpr(3)  # the barrier where both teams meet; their own are 1 and 2
SUMS = tl.constexpr(SUMS_BYTES)
RINGS = tl.constexpr(RINGS_AT)


@triton.constexpr_function
def both_at_once(count, alike, groups):
    """Say whether both groups of a step are multiplied at once, so that products of one fill the waits of the other.

    Else they are in a loop, of half as many instructions. On an H200 (sweeps, not kept) that was as fast where codes of
    more than two slices are one integer, and faster where tiles of two steps have more than two slices.
    """
    return count <= 2 or (not alike and held_tokens.steps_of(groups) > 2)


@triton.jit
def begin_barriers(ready, tid, PLACES: tl.constexpr, GROUPS: tl.constexpr):
    """Begin all barriers; nothing is copied before."""
    held_tokens.begin_barriers(ready, tid, PLACES, GROUPS)
    for slot in tl.static_range(2):
        copy_engine.begin_barrier(ready + RINGS + tid // 32 * 16 + slot * 8, tid % 32 == 0)
    copy_engine.barriers_are_begun(tid)
    shared_memory.meet(tid * 0 + ALL, 2 * TEAM)


@triton.jit
def ask_first(acts, weights, base, ready, tid, SLICES: tl.constexpr, GROUPS: tl.constexpr, HALVES: tl.constexpr):
    """Ask for what comes first, whatever the slice counts, which are under way.

    Those are the first activations (`held_tokens.early`), the base slice of the first step, and scales of the first
    tile.
    """
    SIZE: tl.constexpr = weights[0][0].dtype.element_ty.primitive_bitwidth // 8
    PLACES: tl.constexpr = rings.laid_out("places", GROUPS, SIZE, HALVES)
    THERE: tl.constexpr = rings.laid_out("held_groups", GROUPS, SIZE, HALVES)
    EARLY: tl.constexpr = held_tokens.early(PLACES, GROUPS)
    held_tokens.ask(base, ready, acts, tid, 0, EARLY, THERE, GROUPS, HALVES)
    ring = rings.ring_of(base, tid, SIZE, GROUPS, HALVES, SLICES)
    rings.ask_base(ring, ready + RINGS + tid // 32 * 16, weights, tid)
    facts = rings.facts_of(base, tid, SIZE, GROUPS, HALVES)
    rings.ask_facts(facts, tl.program_id(1) * 0, weights, tid, GROUPS, HALVES)


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
    THERE: tl.constexpr,
    COUNT: tl.constexpr,
    ALIKE: tl.constexpr,
    WIDTHS: tl.constexpr,
    GROUP: tl.constexpr,
    LAYOUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Add a group to the sums, given what `group_of` returns, steps of the tokens and the largest count."""
    HALVES: tl.constexpr = 2 if ACTIVATION == "a16" else 1
    now = held_tokens.read_group(base, group, tid % 32, THERE, HALVES)
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
    part, own = parts.which_part(tile, weights[4], 16)
    y_ptr, n_rows = parts.of_part(part, weights[2]), parts.of_part(part, weights[4])
    number, lane = tid // 32 % 4, tid % 32
    row = own * 16 + rings.row_of(lane) + number // 2 * 8
    token = lane % 4 * 2 + number % 2
    mine = (row < n_rows) & (token < tokens) & (tid % TEAM < 128)
    if HAS_BIAS:
        total += tl.load(parts.of_part(part, weights[3]) + row, mask=mine, other=0.0).to(tl.float32)
    at = token.to(tl.int64) * n_rows + row
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=mine)


@triton.jit
def multiply_step(
    sums,
    base,
    group,
    words,
    grids,
    tid,
    given,
    following,
    THERE: tl.constexpr,
    COUNT: tl.constexpr,
    ALIKE: tl.constexpr,
    WIDTHS: tl.constexpr,
    GROUP: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Add a step to the sums, and have the words of another one come to where its own were.

    They are asked for between groups where those are multiplied at once: the copy engine has to wait for what lanes
    read, and by then it is there. Of one slice products take so little that words would come late: they are asked for
    before.

    group: the first of a warp's pair; following: what `rings.refill` wants of the other step.
    """
    slot, full, next_turn, next_step, weights = following
    now = group_of(words, grids, 0)
    second = group_of(words, grids, 1)
    AT_ONCE: tl.constexpr = both_at_once(COUNT, ALIKE, GROUPS)
    BETWEEN: tl.constexpr = AT_ONCE and COUNT > 1
    if not BETWEEN:
        rings.refill(slot, full, next_turn, next_step, weights, tid, COUNT, GROUPS)
    if AT_ONCE:
        sums = add_group(sums, base, group, now, tid, given, THERE, COUNT, ALIKE, WIDTHS, GROUP, LAYOUT, ACTIVATION)
        if BETWEEN:
            rings.refill(slot, full, next_turn, next_step, weights, tid, COUNT, GROUPS)
        group += 1
        sums = add_group(sums, base, group, second, tid, given, THERE, COUNT, ALIKE, WIDTHS, GROUP, LAYOUT, ACTIVATION)
    else:
        # The compiler must not know that the grid is one wide.
        for which in tl.range(0, tl.num_programs(0) + 1):
            sums = add_group(
                sums, base, group + which, now, tid, given, THERE, COUNT, ALIKE, WIDTHS, GROUP, LAYOUT, ACTIVATION
            )
            now = second
    return sums


@triton.jit
def multiply_tiles(
    acts,
    weights,
    given,
    base,
    ready,
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

    What `ask_first` asks for is under way.

    Args: acts are the pointers (high, low, affine); given is (pointer to counts, thread numbers, the largest count,
        tokens).
    """
    counts_ptr, tid, most, tokens = given
    HALVES: tl.constexpr = 2 if ACTIVATION == "a16" else 1
    GROUPS: tl.constexpr = K_PADDED // GROUP
    DTYPE: tl.constexpr = weights[0][0].dtype.element_ty
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    STEPS: tl.constexpr = rings.laid_out("steps", GROUPS, SIZE, HALVES)
    SLICES: tl.constexpr = len(WIDTHS)
    PLACES: tl.constexpr = rings.laid_out("places", GROUPS, SIZE, HALVES)
    THERE: tl.constexpr = rings.laid_out("held_groups", GROUPS, SIZE, HALVES)
    EARLY: tl.constexpr = held_tokens.early(PLACES, GROUPS)
    DEPTH: tl.constexpr = rings.laid_out("depth", GROUPS, SIZE, HALVES, COUNT)
    SIDES: tl.constexpr = rings.laid_out("sides", GROUPS, SIZE, HALVES, COUNT)
    SUMS_FROM: tl.constexpr = rings.laid_out("sums_at", GROUPS, SIZE, HALVES, COUNT)
    SLOT: tl.constexpr = COUNT * rings.SLICE
    shrinks = ()
    if not ALIKE:
        shrinks = tiles.shrinks_of(counts_ptr, 0, tid % 4, tokens, 1, WIDTHS, False)
    ring = rings.ring_of(base, tid, SIZE, GROUPS, HALVES, SLICES)
    full = ready + RINGS + tid // 32 * 16
    facts = rings.facts_of(base, tid, SIZE, GROUPS, HALVES)
    zero = tl.program_id(1) * 0
    rings.ask(ring, full, zero, zero, weights, tid, 1, COUNT, GROUPS)
    if EARLY < PLACES:
        # What the first step needs is not to stand in line behind all other activations.
        copy_engine.wait_for(full, zero)
        held_tokens.ask(base, ready, acts, tid, EARLY, STEPS, THERE, GROUPS, HALVES)
    for ahead in tl.static_range(1, DEPTH):
        rings.ask(ring + ahead * SLOT, full + ahead * 8, zero, zero + ahead, weights, tid, 0, COUNT, GROUPS)
    shared_memory.wait_for_copies(tid)
    shared_memory.meet(1 + tid // TEAM, TEAM)  # the first scales are others' copies
    slot, parity = zero, zero
    for turn in tl.range(0, parts.blocks_of(weights[4], 16)):
        tile = rings.tile_of(turn, tid // TEAM, weights[4])
        shared_memory.leave(tile >= parts.blocks_of(weights[4], 16))
        sums = chains.zeros_for(tid, 4)
        rings.ask_facts(facts, turn + 1, weights, tid, GROUPS, HALVES)
        for step in tl.range(0, STEPS):
            here, its = ring + slot * SLOT, full + slot * 8
            copy_engine.wait_for(its, parity)
            group = held_tokens.wait_for(ready, turn, step, tid, PLACES, GROUPS)
            words, grids = rings.take(facts, here, turn, step, tid, DTYPE, COUNT, GROUPS, HALVES)
            over = (step + DEPTH >= STEPS).to(tl.int32)
            following = (here, its, turn + over, step + DEPTH - over * STEPS, weights)
            slot = (slot + 1) % DEPTH
            parity = tl.where(slot == 0, 1 - parity, parity)
            sums = multiply_step(
                sums,
                base,
                group,
                words,
                grids,
                tid,
                (shrinks, most),
                following,
                THERE,
                COUNT,
                ALIKE,
                WIDTHS,
                GROUP,
                LAYOUT,
                GROUPS,
                ACTIVATION,
            )
            held_tokens.give_back(base, ready, acts, turn, step, weights[4], tid, PLACES, GROUPS, HALVES)
        # The first team without another tile speaks for both: the other one is at its last but one at the earliest.
        fragments.begin_next(rings.tile_of(turn + 1, tid // TEAM, weights[4]) >= parts.blocks_of(weights[4], 16))
        shared_memory.wait_for_copies(tid)
        again = fragments.thread_again(tid, False)
        room = rings.ring_of(base, again // TEAM * TEAM, SIZE, GROUPS, HALVES, SLICES) + SUMS_FROM + turn % SIDES * SUMS
        total = add_chains(sums, room, again, SIDES)
        store_tile(total, tile, weights, tokens, again, HAS_BIAS)
