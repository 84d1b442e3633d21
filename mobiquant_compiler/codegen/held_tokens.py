"""Activations of eight tokens in shared memory: of all columns, or of the steps that are multiplied next.

Where all have room they are copied once, a step at a time, and stay. Else they pass through PLACES for a step each,
again for every tile of rows, and the copy engine fills a place again when all warps have read it. Nobody waits for
that: the warp that is done last begins the copies of what comes next.

Names are those of `rings`. ready is the address of a program's barriers (`resident_layout`): one a step or place, which
says that activations are there; and one a place, at which warps arrive when they have read it. Of GROUPS groups THERE
are there at a time.
"""

import triton
import triton.language as tl

from mobiquant_compiler.codegen import copy_engine, parts, products, rings, shared_memory
from mobiquant_compiler.codegen.resident_layout import TAKEN_AT

TEAM = rings.TEAM
TAKEN = tl.constexpr(TAKEN_AT)


@triton.constexpr_function
def steps_of(groups):
    """Return how many steps a tile has."""
    return (groups + 15) // 16


@triton.constexpr_function
def pass_through(places, groups):
    """Say whether activations of not all steps have a place."""
    return 16 * places < groups


@triton.constexpr_function
def early(places, groups):
    """Return of how many steps activations are asked for before slice counts are known: all that have a place, or one.

    One where all stay, of more than two steps: they would stand before the words of the first.
    """
    return places if pass_through(places, groups) or places <= 2 else 1


@triton.constexpr_function
def last_groups(groups):
    """Return how many groups the last step of a tile has; all others have 16."""
    return (groups - 1) % 16 + 1


@triton.jit
def begin_barriers(ready, tid, PLACES: tl.constexpr, GROUPS: tl.constexpr):
    """Begin the barriers of activations; nothing is copied before."""
    for place in tl.static_range(PLACES):
        copy_engine.begin_barrier(ready + place * 8, tid == 0)
        if pass_through(PLACES, GROUPS):
            copy_engine.begin_barrier(ready + TAKEN + place * 8, tid == 0, 2 * TEAM // 32)


@triton.jit
def ask(
    base,
    ready,
    acts,
    tid,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    THERE: tl.constexpr,
    GROUPS: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Begin to copy steps FIRST to LAST - 1: high halves, low ones, steps and shifts, as they lie."""
    STEPS: tl.constexpr = steps_of(GROUPS)
    for step in tl.static_range(FIRST, LAST):
        copy_engine.copy_step(
            base + step * 16384,
            base + HALVES * (THERE * 1024) + step * 1024,
            ready + step * 8,
            acts,
            step + tid * 0,
            tid < 32,
            THERE * 1024,
            last_groups(GROUPS),
            STEPS - 1,
            HALVES,
        )


@triton.jit
def wait_for(ready, turn, step, tid, PLACES: tl.constexpr, GROUPS: tl.constexpr):
    """Wait for the activations of a turn's step; returns the number that `read_group` wants of a warp's first group."""
    number, parity = step, turn * 0
    if pass_through(PLACES, GROUPS):
        number = turn * steps_of(GROUPS) + step
        parity = number // PLACES % 2
        number = number % PLACES
    copy_engine.wait_for(ready + number * 8 + tid * 0, parity)
    return number * 16 + tid % TEAM // 32 * 2


@triton.jit
def read_group(base, group, lane, THERE: tl.constexpr, HALVES: tl.constexpr):
    """Read what there is of eight tokens and a group of 128 columns, as `products.load_all` loads it."""
    group = products.existing(group, THERE)
    at = base + group * 1024 + lane * 16
    high = shared_memory.read_four(at) + shared_memory.read_four(at + 512)
    low = high
    if HALVES == 2:
        low = shared_memory.read_four(at + THERE * 1024) + shared_memory.read_four(at + (THERE * 1024 + 512))
    facts = shared_memory.read_four(base + HALVES * (THERE * 1024) + group * 64 + lane % 4 * 16)
    return high, low, products.as_floats(facts)


@triton.jit
def give_back(
    base, ready, acts, turn, step, rows, tid, PLACES: tl.constexpr, GROUPS: tl.constexpr, HALVES: tl.constexpr
):
    """Say that a warp has read a turn's step; the last one to do so asks for what comes in its place.

    Of a step that has fewer groups than others the rest of a place is as it was, to be multiplied by scales of zero.
    """
    if pass_through(PLACES, GROUPS):
        STEPS: tl.constexpr = steps_of(GROUPS)
        place = (turn * STEPS + step) % PLACES
        # All turns but the last are both teams'.
        alone = rings.tile_of(turn, 1, rows) >= parts.blocks_of(rows, 16)
        over = (step + PLACES >= STEPS).to(tl.int32)
        more = rings.tile_of(turn + over, 0, rows) < parts.blocks_of(rows, 16)
        copy_engine.pass_on(
            ready + TAKEN + place * 8 + tid * 0,
            tl.where(alone, 2, 1),
            base + place * 16384,
            base + HALVES * (PLACES * 16384) + place * 1024,
            ready + place * 8,
            acts,
            step + PLACES - over * STEPS,
            more,
            PLACES * 16384,
            last_groups(GROUPS),
            STEPS - 1,
            HALVES,
        )
