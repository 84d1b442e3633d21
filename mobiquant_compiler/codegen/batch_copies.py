"""What one warp of a program does while others multiply: copy pairs of groups to shared memory (Gluon, sm_90).

Names: descs are the descriptors of activations, of their facts, of their sums (or none) and of the parts' slices;
stages are the rings of stages in shared memory that they are copied to, NUM_STAGES pairs of groups a consumer; ready
and empty are the stages' barriers. place is (first token, first row, rows in all, part).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.constexpr_function
def pairs_of(who, consumers, pairs):
    """Return how many pairs of groups the chains of a consumer have."""
    return sum(len(range(chain, pairs, 8)) for chain in range(who, 8, consumers))


@gluon.constexpr_function
def stage_bytes(count, totals, group, planes, tokens, rows):
    """Return how many bytes a stage is filled with: activations, facts, sums, words."""
    return planes * tokens * 128 + 2 * tokens * (12 if totals else 8) + count * rows * group // 2


@gluon.jit
def next_pair(pair, PAIRS: gl.constexpr, CONSUMERS: gl.constexpr):
    """Return the pair of groups after this one: the next of its chain, or the first of the consumer's next chain."""
    return gl.where(pair + 8 >= PAIRS, pair % 8 + CONSUMERS, pair + 8)


@gluon.jit
def prefetch_rows(ptr, place, GROUPS: gl.constexpr, ROWS: gl.constexpr):
    """Ask for the scales (or zero points) of a program's rows, which follow one another, by one warp."""
    SIZE: gl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    LINES: gl.constexpr = (ROWS * GROUPS * SIZE + 127) // 128
    at = ptr + place[1].to(gl.int64) * GROUPS
    last = gl.minimum(place[2] - place[1], ROWS) * GROUPS - 1
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    for start in gl.static_range(0, LINES, 32):
        line = at + gl.minimum((start + lane) * (128 // SIZE), last)
        gl.inline_asm_elementwise(
            "mov.b32 $0, 0; prefetch.global.L2 [$1];",
            "=r,l",
            [line.to(gl.int64)],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )


@gluon.jit
def copy_pair(
    descs,
    stages,
    ready,
    slot,
    pair,
    place,
    wanted,
    COUNT: gl.constexpr,
    GROUP: gl.constexpr,
    PLANES: gl.constexpr,
    TOKENS: gl.constexpr,
    ROWS: gl.constexpr,
):
    """Ask for a pair of groups: activations, facts, and words of COUNT slices of the program's part."""
    acts_desc, facts_desc, sums_descs, slices_descs = descs
    acts, facts, totals, words = stages
    first, first_row, n_rows, part = place
    bar = ready.index(slot)
    mbarrier.expect(bar, stage_bytes(COUNT, len(totals) > 0, GROUP, PLANES, TOKENS, ROWS), pred=wanted)
    tma.async_copy_global_to_shared(acts_desc, [pair * PLANES, first, 0], bar, acts.index(slot), pred=wanted)
    tma.async_copy_global_to_shared(facts_desc, [2 * pair, 2 * first], bar, facts.index(slot), pred=wanted)
    for index in gl.static_range(len(totals)):
        tma.async_copy_global_to_shared(
            sums_descs[index], [2 * pair, first], bar, totals[index].index(slot), pred=wanted
        )
    for index in gl.static_range(COUNT):
        at = [index * n_rows + first_row, pair * (GROUP // 8)]
        target = words.index(slot * COUNT + index)
        for number in gl.static_range(len(slices_descs)):
            own = wanted & (part == number) if len(slices_descs) > 1 else wanted
            tma.async_copy_global_to_shared(slices_descs[number], at, bar, target, pred=own)


@gluon.jit
def produce(
    descs,
    memory,
    given,
    COUNT: gl.constexpr,
    GROUP: gl.constexpr,
    K_PADDED: gl.constexpr,
    PLANES: gl.constexpr,
    TOKENS: gl.constexpr,
    ROWS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):
    """Fill the stages of all consumers, as they are emptied; memory and given are those of `batches.consume`."""
    stages, _, ready, empty = memory
    _, scale_ptr, zero_ptr, _, place = given
    GROUPS: gl.constexpr = K_PADDED // GROUP
    PAIRS: gl.constexpr = (GROUPS + 1) // 2
    prefetch_rows(scale_ptr, place, GROUPS, ROWS)
    prefetch_rows(zero_ptr, place, GROUPS, ROWS)
    pairs = (gl.to_tensor(0), gl.to_tensor(1))
    for it in range(pairs_of(0, CONSUMERS, PAIRS)):
        following = ()
        for who in gl.static_range(CONSUMERS):
            slot = who * NUM_STAGES + it % NUM_STAGES
            wanted = it < pairs_of(who, CONSUMERS, PAIRS)
            mbarrier.wait(empty.index(slot), ((it // NUM_STAGES) & 1) ^ 1, pred=wanted)
            copy_pair(descs, stages, ready, slot, pairs[who], place, wanted, COUNT, GROUP, PLANES, TOKENS, ROWS)
            following = following + (next_pair(pairs[who], PAIRS, CONSUMERS),)
        if CONSUMERS == 1:
            following = following + (pairs[1],)
        pairs = following
