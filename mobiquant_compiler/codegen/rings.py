"""Words of weights that come ahead of the products, by the copy engine, with scales and zero points.

A ring is its warp's own: no other waits for it, and it goes on from one tile of 16 rows to the next. A slot has a pair
of groups of 16 rows, a box for each slice, SLICE bytes apart, and a barrier whose phase ends when all of them are
there. Scales and zero points of the next tile come meanwhile, all of them at once, copied by the warps of a team; so
those know the tile's facts after they have met at the end of the one before.

Names are those of `products`. A step is a pair of groups for each of eight chains. facts is the address of a team's
scales (`resident_layout`), tid the numbers of a program's threads. weights are what each weight of the launch has:
scales, zero points, outputs, biases (or outputs), rows.
"""

import triton
import triton.language as tl

from mobiquant_compiler.codegen import copy_engine, fragments, parts, shared_memory
from mobiquant_compiler.codegen.resident_layout import BOXES, ResidentLayout

TEAM = tl.constexpr(256)  # threads
SLICE = tl.constexpr(BOXES)
KERNEL = tl.constexpr("resident_mma")  # whose parameters begin with descriptors of the words


@triton.constexpr_function
def laid_out(name, groups, size, halves, count=0):
    """Return a number of `ResidentLayout` by its name; count: of slices, where it depends on that."""
    found = getattr(ResidentLayout(groups, size, halves), name)
    return found(count) if count else found


@triton.jit
def tile_of(turn, team, rows):
    """Return the tile of a team (0 or 1) and a turn, of the tiles of all weights: teams of a program side by side.

    In the last turn, where there are fewer tiles than teams, each program has one before any has two.
    """
    turns = 2 * tl.num_programs(1)
    near = team + 2 * tl.program_id(1)
    far = team * tl.num_programs(1) + tl.program_id(1)
    return turn * turns + tl.where((turn + 1) * turns <= parts.blocks_of(rows, 16), near, far)


@triton.jit
def row_of(lane):
    """Return which of eight rows a lane multiplies as row g.

    The copy engine changes the order of a box's 16 bytes from one pair of rows to the next. With rows 0, 1, 4, 5, 2, 3,
    6, 7 lanes that read at a time meet no bank twice.
    """
    g = lane // 4
    return (g & 1) + (g & 2) * 2 + (g & 4) // 2


@triton.jit
def facts_of(base, tid, SIZE: tl.constexpr, GROUPS: tl.constexpr, HALVES: tl.constexpr):
    """Return where the scales and zero points of a thread's team are."""
    ROW: tl.constexpr = laid_out("facts_bytes", GROUPS, SIZE, HALVES)
    return base + laid_out("acts_bytes", GROUPS, SIZE, HALVES) + tid // TEAM * (2 * 32 * ROW)


@triton.jit
def ring_of(base, tid, SIZE: tl.constexpr, GROUPS: tl.constexpr, HALVES: tl.constexpr, SLICES: tl.constexpr):
    """Return where the base slice of a warp's first slot is; SLICES: of the weights."""
    FROM: tl.constexpr = laid_out("teams_at", GROUPS, SIZE, HALVES)
    OWN: tl.constexpr = laid_out("team_bytes", GROUPS, SIZE, HALVES, SLICES)
    return base + FROM + tid // TEAM * OWN + tid % TEAM // 32 * 1024


@triton.jit
def ask_facts(facts, turn, weights, tid, GROUPS: tl.constexpr, HALVES: tl.constexpr):
    """Ask for scales and zero points of a turn's tile: those of even turns on one side, of odd ones on the other."""
    tile = tile_of(turn, tid // TEAM, weights[4])
    part, own = parts.which_part(tile, weights[4], 16)
    n_rows = parts.of_part(part, weights[4])
    scale_ptr, zero_ptr = parts.of_part(part, weights[0]), parts.of_part(part, weights[1])
    SIZE: tl.constexpr = weights[0][0].dtype.element_ty.primitive_bitwidth // 8
    EACH: tl.constexpr = GROUPS * SIZE // 16  # copies a row
    tl.static_assert(GROUPS * SIZE % 16 == 0, "a row of scales is whole copies")
    ROW: tl.constexpr = laid_out("facts_bytes", GROUPS, SIZE, HALVES)
    here = tile < parts.blocks_of(weights[4], 16)
    for start in tl.static_range(0, 32 * EACH, TEAM):
        # Rows 0 to 15 are scales, the others zero points.
        number = start + tid % TEAM
        row = number // EACH
        at = tl.minimum(own * 16 + row % 16, n_rows - 1) * GROUPS + number % EACH * (16 // SIZE)
        to = facts + (turn % 2 * 32 + row) * ROW + number % EACH * 16
        shared_memory.copy(to, tl.where(row < 16, scale_ptr, zero_ptr) + at, here & (row < 32))


@triton.jit
def descriptors(tid, PARTS: tl.constexpr):
    """Return the addresses of the descriptors of the words of each weight, a tuple."""
    found = ()
    for number in tl.static_range(PARTS):
        found = found + (copy_engine.descriptor(tid, KERNEL, number),)
    return found


@triton.jit
def ask_base(slot, full, weights, tid):
    """Ask for the base slice of the first step of the first tile, before counts are known; `ask` announces it."""
    tile = tile_of(tl.program_id(1) * 0, tid // TEAM, weights[4])
    part, own = parts.which_part(tile, weights[4], 16)
    where = parts.of_part(part, descriptors(tid, len(weights[4])))
    here = tile < parts.blocks_of(weights[4], 16)
    copy_engine.copy_box(slot, where, tid % TEAM // 32 * 16, own * 16, full, here)


@triton.jit
def ask(slot, full, turn, step, weights, tid, FIRST: tl.constexpr, COUNT: tl.constexpr, GROUPS: tl.constexpr):
    """Ask for the words of a step of a turn's tile, of COUNT slices; behind the last tile nothing comes.

    full: the slot's barrier. FIRST: the slice to begin with; those before have been asked for. Rows behind the
    weight's last are those of its next slice, or zeros; none is written. Where to find them is computed anew each time:
    registers that hold it would be missing where groups are multiplied.
    """
    tile = tile_of(turn, tid // TEAM, weights[4])
    part, own = parts.which_part(tile, weights[4], 16)
    where = parts.of_part(part, descriptors(tid, len(weights[4])))
    chain = tid % TEAM // 32
    here = tile < parts.blocks_of(weights[4], 16)
    if GROUPS % 16 != 0:
        # A chain may end before others do; of an even number of groups a pair is there or is not.
        here = here & (step * 8 + chain < GROUPS // 2)
    column, n_rows = step * 128 + chain * 16, parts.of_part(part, weights[4])
    size = tl.where(here, COUNT * 1024, 0)
    copy_engine.copy_boxes(slot, where, column, own * 16, n_rows, full, size, FIRST, COUNT, SLICE)


@triton.jit
def take(
    facts,
    slot,
    turn,
    step,
    tid,
    DTYPE: tl.constexpr,
    COUNT: tl.constexpr,
    GROUPS: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Read a step that is there: words as `device.split_words` returns them, and scales as `load_chunk` does."""
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    ROW: tl.constexpr = laid_out("facts_bytes", GROUPS, SIZE, HALVES)
    lane = tid % 32
    row = row_of(lane)
    quarter = fragments.quarter_of_lane(lane % 4)
    # Of a row's four times 16 bytes two are of the first group; in a box place c of rows 2 i and 2 i + 1 is c ^ i.
    at = slot + row * 64 + quarter % 2 * 8
    first = at + (quarter // 2 ^ row // 2) * 16
    second = at + (quarter // 2 + 2 ^ row // 2) * 16
    words = ()
    grids = ()
    for half in tl.static_range(2):
        for index in tl.static_range(COUNT):
            box = index * SLICE + half * 512
            words = words + ((shared_memory.read_two(first + box), shared_memory.read_two(second + box)),)
    pair = step * 8 + tid % TEAM // 32
    here = pair < GROUPS // 2
    if GROUPS % 16 != 0:
        pair = tl.minimum(pair, GROUPS // 2 - 1)
    for half in tl.static_range(2):
        fact = facts + (turn % 2 * 32 + row + 8 * half) * ROW + pair * (2 * SIZE)
        grid = shared_memory.read_pair(fact, DTYPE) + shared_memory.read_pair(fact + 16 * ROW, DTYPE)
        if GROUPS % 16 != 0:
            # A group that is not there adds nothing, whatever words are in the slot.
            grid = (tl.where(here, grid[0], 0.0), tl.where(here, grid[1], 0.0), grid[2], grid[3])
        grids = grids + (grid,)
    return words, grids


@triton.jit
def refill(slot, full, turn, step, weights, tid, COUNT: tl.constexpr, GROUPS: tl.constexpr):
    """Ask for the words of a step of a turn's tile where those that `take` read have been."""
    copy_engine.give_back(tid)
    ask(slot, full, turn, step, weights, tid, 0, COUNT, GROUPS)
