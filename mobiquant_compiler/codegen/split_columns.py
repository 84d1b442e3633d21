"""The last wave of programs, split along the columns: who has which part, and how parts become one sum (Gluon, sm_90).

Where programs do not fill their last wave over the multiprocessors, each of that wave becomes several, with a part of
the columns each. All but the last part leave their sums in memory and say so; the last one waits for them, adds
them to its own and writes the result.

A thread reads back what the thread of the same number of the same warpgroup wrote, so marks are of threads, and no
barrier is needed. A last part waits for parts before it alone, which wait for nobody. So nothing waits for ever as long
as programs begin in the order of their numbers, on however few multiprocessors: CUDA does not promise that order, but
every GPU keeps it.

Names: share is (first step, steps, part, parts, programs that are split before this one), scratch is (sums, marks).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

SLOT = gl.constexpr(256 * 128)  # sums of a part of the largest tile; `fused` makes room for as many
_RELEASE = gl.constexpr("{ red.release.gpu.global.add.s32 [$1], 1; mov.b32 $0, 0; }")
_ACQUIRE = gl.constexpr(
    "{ .reg .pred p; again: ld.acquire.gpu.global.s32 $0, [$1]; setp.lt.s32 p, $0, $2; @p bra again; }"
)


@gluon.jit
def share_of(program, programs, at_once, steps, MOST_PARTS: gl.constexpr):
    """Return which of `programs` whole ones a program is, or is a part of, and its share.

    Those of full waves are whole. The rest are cut into as many parts as run at a time then, at most MOST_PARTS. Where
    they are more than half of a wave, two waves of thirds hold up to two thirds of one; more stay whole, as finer parts
    take longer to add up than they save. The last part has no more steps than others.
    """
    whole = programs // at_once * at_once
    rest = programs - whole
    parts = gl.minimum(at_once // gl.maximum(rest, 1), MOST_PARTS)
    if MOST_PARTS >= 3:
        parts = gl.where((parts == 1) & (3 * rest <= 2 * at_once), 3, parts)
    parts = gl.where(program < whole, 1, parts)
    behind = (program - whole) // parts
    number = whole + behind
    part = program - whole - behind * parts
    first = (steps * part + parts - 1) // parts
    share = (first, (steps * (part + 1) + parts - 1) // parts - first, part, parts, behind)
    return number, share


@gluon.constexpr_function
def flat_layout():
    """Return how a warpgroup's sums lie in memory: four of a thread side by side, then those of the next thread."""
    return gl.BlockedLayout([4], [32], [4], [0])


@gluon.constexpr_function
def halvings_of(tokens):
    """Return how often sums of 64 rows are halved to pieces of 32 registers a thread, so that few are loaded ahead."""
    return (tokens // 64).bit_length() - 1


@gluon.jit
def flattened(sums):
    """Return sums [64, TOKENS] in one dimension, in the order of memory; no value changes threads."""
    FLAT: gl.constexpr = flat_layout()
    apart = gl.reshape(sums, [4, 2, 8, sums.shape[1] // 8, 4, 2])  # warp, half, row, eight tokens, lane, token
    flat = gl.reshape(gl.permute(apart, (3, 0, 2, 4, 1, 5)), [64 * sums.shape[1]])
    return gl.convert_layout(flat, FLAT, assert_trivial=True)


@gluon.jit
def unflattened(flat, TOKENS: gl.constexpr, LAYOUT: gl.constexpr):
    """Undo `flattened`."""
    apart = gl.reshape(flat, [TOKENS // 8, 4, 8, 4, 2, 2])
    sums = gl.reshape(gl.permute(apart, (1, 4, 2, 0, 3, 5)), [64, TOKENS])
    return gl.convert_layout(sums, LAYOUT, assert_trivial=True)


@gluon.jit
def pieces_of(flat, HALVINGS: gl.constexpr):
    """Cut sums in one dimension into equal pieces, which are other registers of all threads."""
    pieces = (flat,)
    for halving in gl.static_range(HALVINGS):
        halves = ()
        for index in gl.static_range(1 << halving):
            apart = gl.reshape(pieces[index], [2, pieces[index].shape[0] // 2])
            first, second = gl.split(gl.permute(apart, (1, 0)))
            halves = halves + (first, second)
        pieces = halves
    return pieces


@gluon.jit
def joined(pieces, HALVINGS: gl.constexpr):
    """Undo `pieces_of`."""
    for halving in gl.static_range(HALVINGS):
        pairs = ()
        for index in gl.static_range(1 << (HALVINGS - 1 - halving)):
            both = gl.permute(gl.join(pieces[2 * index], pieces[2 * index + 1]), (1, 0))
            pairs = pairs + (gl.reshape(both, [2 * pieces[0].shape[0]]),)
        pieces = pairs
    return pieces[0]


@gluon.jit
def marks_at(scratch, share, WHO: gl.constexpr):
    """Return where the marks of a warpgroup's threads are: how many parts have left their sums."""
    thread = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    return scratch[1] + (share[4] * 256 + 128 * WHO) + thread


@gluon.jit
def sums_at(scratch, share, part, WHO: gl.constexpr, TOKENS: gl.constexpr):
    """Return where a warpgroup's sums of a part begin."""
    slot = share[4] * (share[3] - 1) + part
    return scratch[0] + slot.to(gl.int64) * SLOT + 64 * TOKENS * WHO


@gluon.jit
def leave_sums(sums, scratch, share, WHO: gl.constexpr, TOKENS: gl.constexpr):
    """Leave the sums of a part for the last one, and let each thread say that its own are there."""
    at = sums_at(scratch, share, share[2], WHO, TOKENS) + gl.arange(0, 64 * TOKENS, flat_layout())
    gl.store(at, flattened(sums))
    marks = marks_at(scratch, share, WHO)
    gl.inline_asm_elementwise(_RELEASE, "=r,l", [marks], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def await_others(scratch, share, WHO: gl.constexpr):
    """Wait, each thread for itself, until all other parts have left their sums; leave marks as they were before."""
    marks = marks_at(scratch, share, WHO)
    others = gl.zeros([128], gl.int32, gl.BlockedLayout([1], [32], [4], [0])) + (share[3] - 1)
    gl.inline_asm_elementwise(_ACQUIRE, "=&r,l,r", [marks, others], dtype=gl.int32, is_pure=False, pack=1)
    gl.store(marks, others * 0)


@gluon.jit
def add_others(sums, scratch, share, WHO: gl.constexpr, TOKENS: gl.constexpr):
    """Add the sums of all other parts to those of the last one, in their order; of a whole program there are none.

    In pieces: where all are loaded at once, triton 3.6 and its ptxas spill two registers of the largest tiles.
    """
    FLAT: gl.constexpr = flat_layout()
    HALVINGS: gl.constexpr = halvings_of(TOKENS)
    SIZE: gl.constexpr = 64 * TOKENS >> HALVINGS
    LAYOUT: gl.constexpr = sums.type.layout
    if share[3] > 1:
        await_others(scratch, share, WHO)
    cut = pieces_of(flattened(sums), HALVINGS)
    pieces = ()
    for piece in gl.static_range(1 << HALVINGS):
        pieces = pieces + (gl.convert_layout(cut[piece], FLAT, assert_trivial=True),)
    for part in range(share[3] - 1):
        at = sums_at(scratch, share, part, WHO, TOKENS) + gl.arange(0, SIZE, FLAT)
        more = ()
        for piece in gl.static_range(1 << HALVINGS):
            more = more + (pieces[piece] + gl.load(at + SIZE * piece),)
        pieces = more
    return unflattened(joined(pieces, HALVINGS), TOKENS, LAYOUT)
