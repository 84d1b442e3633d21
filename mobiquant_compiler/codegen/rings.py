"""Words of weights that come ahead of the products, by copies to shared memory, with scales and zero points.

A ring is its warp's own: no other waits for it, and it goes on from one tile of 16 rows to the next. A slot has a pair
of groups of 16 rows. Scales and zero points of the next tile come meanwhile, all of them at once, copied by the warps
of a team; so those know the tile's facts after they have met at the end of the one before.

Names are those of `products`. A step is a pair of groups for each of eight chains. team is the address of a team's
shared memory (`resident_layout`), tid the numbers of a program's threads. weights are what each weight of the launch
has: slices, scales, zero points, outputs, biases (or outputs), rows. asked is what is asked for next: (turn, tile,
step, pointers to a lane's words of row g and of row g + 8, words of a slice).
"""

import triton
import triton.language as tl

from mobiquant_compiler.codegen import fragments, parts, shared_memory
from mobiquant_compiler.codegen.resident_layout import ResidentLayout

TEAM = tl.constexpr(256)  # threads


@triton.constexpr_function
def laid_out(name, groups, size, halves, count=0):
    """Return a number of `ResidentLayout` by its name; count: of slices, where it depends on that."""
    found = getattr(ResidentLayout(groups, size, halves), name)
    return found(count) if count else found


@triton.jit
def tile_of(turn, tid, rows):
    """Return a team's tile of a turn, of the tiles of all weights: teams of a program side by side.

    In the last turn, where there are fewer tiles than teams, each program has one before any has two.
    """
    turns = 2 * tl.num_programs(1)
    near = tid // TEAM + 2 * tl.program_id(1)
    far = tid // TEAM * tl.num_programs(1) + tl.program_id(1)
    return turn * turns + tl.where((turn + 1) * turns <= parts.blocks_of(rows, 16), near, far)


@triton.jit
def begin_tile(team, turn, tile, weights, tid, COUNT: tl.constexpr, GROUPS: tl.constexpr, HALVES: tl.constexpr):
    """Ask for a tile's scales and zero points, those of even turns on one side and those of odd ones on the other.

    Returns where a lane's words of its first step are, of row g and of row g + 8, and how many words a slice has.
    """
    part, own = parts.which_part(tile, weights[5], 16)
    slices_ptr, n_rows, first_row = parts.of_part(part, weights[0]), parts.of_part(part, weights[5]), own * 16
    scale_ptr, zero_ptr = parts.of_part(part, weights[1]), parts.of_part(part, weights[2])
    SIZE: tl.constexpr = weights[1][0].dtype.element_ty.primitive_bitwidth // 8
    EACH: tl.constexpr = GROUPS * SIZE // 16  # copies a row
    tl.static_assert(GROUPS * SIZE % 16 == 0, "a row of scales is whole copies")
    FACTS: tl.constexpr = laid_out("facts_at", GROUPS, SIZE, HALVES, COUNT)
    ROW: tl.constexpr = laid_out("facts_bytes", GROUPS, SIZE, HALVES)
    here = tile < parts.blocks_of(weights[5], 16)
    for start in tl.static_range(0, 32 * EACH, TEAM):
        # Rows 0 to 15 are scales, the others zero points.
        number = start + tid % TEAM
        row = number // EACH
        at = tl.minimum(first_row + row % 16, n_rows - 1) * GROUPS + number % EACH * (16 // SIZE)
        to = team + FACTS + (turn % 2 * 32 + row) * ROW + number % EACH * 16
        shared_memory.copy_where(to, tl.where(row < 16, scale_ptr, zero_ptr) + at, here & (row < 32))
    lane, chain = tid % 32, tid % TEAM // 32
    row = first_row + lane // 4
    word = chain * 16 + lane % 4 * 4
    upper = slices_ptr + (tl.minimum(row, n_rows - 1).to(tl.int64) * (GROUPS * 8) + word)
    lower = slices_ptr + (tl.minimum(row + 8, n_rows - 1).to(tl.int64) * (GROUPS * 8) + word)
    return upper, lower, tl.cast(n_rows, tl.int64) * (GROUPS * 8)


@triton.jit
def ask(slot, asked, weights, tid, COUNT: tl.constexpr, GROUPS: tl.constexpr):
    """Ask for the words of a step, of COUNT slices; behind the last tile nothing comes.

    A row's words of the first group stand before those of the second, or, in every other pair of rows, behind them:
    lanes that read one group then meet no bank twice.
    """
    _, tile, step, upper, lower, words = asked
    lane = tid % 32
    here = tile < parts.blocks_of(weights[5], 16)
    if GROUPS % 16 != 0:
        # A chain may end before others do; of an even number of groups a pair is there or is not.
        here = here & (step * 8 + tid % TEAM // 32 < GROUPS // 2)
    to = slot + lane // 4 * 64 + (lane % 4 ^ lane // 8 % 2 * 2) * 16
    for half in tl.static_range(2):
        source = upper if half == 0 else lower
        for index in tl.static_range(COUNT):
            shared_memory.copy(to + (half * COUNT + index) * 512, source + index * words, here)


@triton.jit
def ask_after(team, asked, weights, tid, COUNT: tl.constexpr, GROUPS: tl.constexpr, HALVES: tl.constexpr):
    """Return what to ask for behind a step: the next of the same tile, or the first of the team's next.

    What was asked for since the last call is a group of copies.
    """
    turn, tile, step, upper, lower, words = asked
    step += 1
    upper += 128
    lower += 128
    if step == (GROUPS + 15) // 16:
        step = step * 0
        turn += 1
        tile = tile_of(turn, tid, weights[5])
        upper, lower, words = begin_tile(team, turn, tile, weights, tid, COUNT, GROUPS, HALVES)
    shared_memory.end_group(tid)
    return turn, tile, step, upper, lower, words


@triton.jit
def take(
    team,
    slot,
    turn,
    step,
    tid,
    PENDING: tl.constexpr,
    DTYPE: tl.constexpr,
    COUNT: tl.constexpr,
    GROUPS: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Read a step, once it is there: words as `device.split_words` returns them, and scales as `load_chunk` does."""
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    ROW: tl.constexpr = laid_out("facts_bytes", GROUPS, SIZE, HALVES)
    FACTS: tl.constexpr = laid_out("facts_at", GROUPS, SIZE, HALVES, COUNT)
    lane = tid % 32
    shared_memory.wait_for_copies(tid, PENDING)
    words = ()
    grids = ()
    swapped = lane // 8 % 2 * 32
    at = slot + lane // 4 * 64 + fragments.quarter_of_lane(lane % 4) * 8
    for half in tl.static_range(2):
        for index in tl.static_range(COUNT):
            row = at + (half * COUNT + index) * 512
            own = (shared_memory.read_two(row + swapped), shared_memory.read_two(row + (32 - swapped)))
            words = words + (own,)
    pair = step * 8 + tid % TEAM // 32
    here = pair < GROUPS // 2
    if GROUPS % 16 != 0:
        pair = tl.minimum(pair, GROUPS // 2 - 1)
    for half in tl.static_range(2):
        fact = team + FACTS + (turn % 2 * 32 + lane // 4 + 8 * half) * ROW + pair * (2 * SIZE)
        grid = shared_memory.read_pair(fact, DTYPE) + shared_memory.read_pair(fact + 16 * ROW, DTYPE)
        if GROUPS % 16 != 0:
            # A group that is not there adds nothing.
            grid = (tl.where(here, grid[0], 0.0), tl.where(here, grid[1], 0.0), grid[2], grid[3])
        grids = grids + (grid,)
    fragments.hold_loads(tid)  # now the words may be written over
    return words, grids
