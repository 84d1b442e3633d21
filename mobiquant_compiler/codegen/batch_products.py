"""Integer products of a pair of groups by a warpgroup, and what they add to its sums, for `batches` (Gluon, sm_90).

The first LEAST slices are one integer. Of the others every one is multiplied by itself, raised to the grid of the
largest count and added by the tensor cores to the slices before it, and each token keeps the dot product that is there
after its own last slice: its own one, times a power of four.

Names are those of `batch_copies`. Every token uses LEAST slices, none more than COUNT; own is what
`counts_of` returns, or nothing where tokens are alike.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from mobiquant_compiler.codegen import batch_operands, operands


@gluon.constexpr_function
def shrink_of(count):
    """Return by what power of two the step of `count` slices is smaller than the base step."""
    return 1.0 / operands.power_of(count)


@gluon.jit
def counts_of(counts_ptr, first, tokens, COUNT: gl.constexpr, TOKENS: gl.constexpr, LAYOUT: gl.constexpr):
    """Return what tells a program's tokens apart: their counts, taken to be 1 to COUNT, the middles of their grids, T.

    A grid's middle is that of its codes, raised to the grid of COUNT slices. Shapes: int32 and float32 [1, TOKENS].
    """
    token = gl.minimum(first + gl.arange(0, TOKENS, LAYOUT), tokens - 1)
    own = gl.minimum(gl.maximum(gl.load(counts_ptr + token), 1), COUNT)[None, :]
    half_a_cell = (((126 + 2 * COUNT) << 23) - (own << 24)).to(gl.float32, bitcast=True)  # 4 ** (COUNT - own) / 2
    return own, 0.5 * operands.power_of(COUNT) - half_a_cell, tokens


@gluon.jit
def begin_product(
    words,
    acts,
    slot,
    sums,
    WHICH: gl.constexpr,
    MORE: gl.constexpr,
    LEAST: gl.constexpr,
    COUNT: gl.constexpr,
    GROUP: gl.constexpr,
    HALVES: gl.constexpr,
    TOKENS: gl.constexpr,
    ROWS: gl.constexpr,
):
    """Begin to multiply all tokens by codes of one group: of LEAST slices as one, or of the MOREth slice after those.

    High and low halves are columns of one product, side by side as they lie in acts: [stages, planes, TOKENS, 128], for
    each 128 columns of the pair high halves and, of a16, low ones. Returns their sums, on their way; those of a single
    slice are added to the sums of the slices before it.
    """
    BOTH: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [ROWS // 16, 1], [16, HALVES * TOKENS, 32])
    PLANE: gl.constexpr = HALVES * WHICH if GROUP == 128 else 0
    START: gl.constexpr = 0 if GROUP == 128 else 64 * WHICH
    if MORE == 0 and LEAST > 1:
        codes = batch_operands.codes_of(words, slot, WHICH, LEAST, COUNT, GROUP, ROWS // 16)
    else:
        codes = batch_operands.slice_of(words, slot, WHICH, LEAST + MORE - 1, COUNT, GROUP, ROWS // 16)
    weight = batch_operands.operand(codes, GROUP, gl.DotOperandLayout(0, BOTH, 4))
    planes = acts.index(slot).reshape([acts.shape[1] * TOKENS, 128])
    x = planes.slice(PLANE * TOKENS, HALVES * TOKENS, 0).slice(START, GROUP, 1).permute((1, 0))
    if MORE == 0:
        sums = gl.zeros([ROWS, HALVES * TOKENS], gl.int32, BOTH)
    return warpgroup_mma(weight, x, sums, use_acc=MORE > 0, is_async=True)


@gluon.jit
def factor_of(tokens, MORE: gl.constexpr, FACTOR: gl.constexpr):
    """Return FACTOR, for each MORE as an expression of its own that the compiler cannot know; T is below 2^28."""
    return (tokens >> (31 - MORE)) ^ FACTOR


@gluon.constexpr_function
def keep_assembly(more, least):
    """Return instructions that take ``high factor + low`` for tokens of so many slices, what was kept for others."""
    if more == 0:
        return "mad.lo.s32 $0, $3, $4, $5;"
    return f"{{ .reg .pred p; setp.ge.s32 p, $1, {least + more}; mov.b32 $0, $2; @p mad.lo.s32 $0, $3, $4, $5; }}"


@gluon.jit
def halves_of(dots, HALVES: gl.constexpr, PRODUCT: gl.constexpr):
    """Return the dot products of high and of low halves; of a8 there are none of the latter."""
    if HALVES == 2:
        both = gl.permute(gl.reshape(dots, [dots.shape[0], 2, dots.shape[1] // 2]), (0, 2, 1))
        high, low = gl.split(both)
        high = gl.convert_layout(high, PRODUCT, assert_trivial=True)
        low = gl.convert_layout(low, PRODUCT, assert_trivial=True)
    else:
        high = gl.convert_layout(dots, PRODUCT, assert_trivial=True)
        low = gl.full_like(high, 0)
    return high, low


@gluon.jit
def kept_sums(kept, dots, own, MORE: gl.constexpr, LEAST: gl.constexpr, HALVES: gl.constexpr):
    """Return the dot products after a product, int32, of tokens that use its slices, and what was kept of the others.

    The next product is added to the same registers. They are read where it says so here, since a compiler that reads
    them later copies all of them before. ptxas takes sums of the same registers before and after a product for one; a
    factor that it cannot know to be the same keeps them apart (`test_every_slice_is_read`).
    """
    PRODUCT: gl.constexpr = kept.type.layout
    FACTOR: gl.constexpr = 256 if HALVES == 2 else 1
    high, low = halves_of(dots, HALVES, PRODUCT)
    if len(own) == 0:
        kept = high * FACTOR + low
    else:
        factor = gl.full_like(kept, 0) + factor_of(own[2], MORE, FACTOR)
        KEEP: gl.constexpr = keep_assembly(MORE, LEAST)
        args = [gl.full_like(kept, 0) + own[0], kept, high, factor, low]
        kept = gl.inline_asm_elementwise(KEEP, "=&r,r,r,r,r,r", args, dtype=gl.int32, is_pure=False, pack=1)
    return kept


@gluon.jit
def load_scales(scale_ptr, zero_ptr, group_at, pair, GROUPS: gl.constexpr):
    """Load scales of a pair of groups, then zero points; of a group that is not there those of the last."""
    first = gl.minimum(2 * pair, GROUPS - 1)
    second = gl.minimum(2 * pair + 1, GROUPS - 1)
    return (
        gl.load(scale_ptr + group_at + first),
        gl.load(scale_ptr + group_at + second),
        gl.load(zero_ptr + group_at + first),
        gl.load(zero_ptr + group_at + second),
    )


@gluon.jit
def grid_of(scale, zero, own, COUNT: gl.constexpr):
    """Return steps of the grid of COUNT slices as `scaling.grid_at` does, and centres of each token's codes on it.

    Numerics: a token's centre and dot product are those of its own grid times a power of four, and the step is that of
        its own grid over it: the same bits, as long as nothing leaves float32's normal numbers. With scales and zero
        points of 16 bits nothing does whose group's largest activation is zero or between 2^-112 and 2^112.
    """
    GROW: gl.constexpr = 1.0 * operands.power_of(COUNT)
    size = (scale * shrink_of(COUNT))[:, None]
    if len(own) == 0:
        centre = gl.fma(zero, GROW, 0.5 * GROW - 0.5)[:, None]
    else:
        centre = gl.fma(zero[:, None], GROW, own[1])
    return size, centre


@gluon.jit
def multiply_pair(
    sums,
    stages,
    slot,
    scales,
    own,
    LEAST: gl.constexpr,
    COUNT: gl.constexpr,
    GROUP: gl.constexpr,
    HALVES: gl.constexpr,
    TOKENS: gl.constexpr,
    ROWS: gl.constexpr,
):
    """Add a pair of groups to the sums of a chain; both groups in turns, a product of each.

    The next product is begun before the last one is waited for.
    """
    acts, facts, totals, words = stages
    WARPS: gl.constexpr = ROWS // 16
    PRODUCT: gl.constexpr = sums.type.layout
    TOKEN: gl.constexpr = gl.SliceLayout(0, PRODUCT)
    JOBS: gl.constexpr = 2 * (COUNT - LEAST + 1)
    dots = (gl.zeros([ROWS, TOKENS], gl.int32, PRODUCT), gl.zeros([ROWS, TOKENS], gl.int32, PRODUCT))
    begun = begin_product(words, acts, slot, 0, 0, 0, LEAST, COUNT, GROUP, HALVES, TOKENS, ROWS)
    done = begun
    for job in gl.static_range(JOBS):
        if job + 1 < JOBS:
            later = begin_product(
                words, acts, slot, done, (job + 1) % 2, (job + 1) // 2, LEAST, COUNT, GROUP, HALVES, TOKENS, ROWS
            )
            done = warpgroup_mma_wait(num_outstanding=1, deps=[begun])
            begun = later
        else:
            done = warpgroup_mma_wait(num_outstanding=0, deps=[begun])
        more = kept_sums(dots[0], done, own, job // 2, LEAST, HALVES)
        dots = (dots[1], more)
        if job + 2 >= JOBS:
            if len(totals) > 0:
                more += 128 * batch_operands.totals_of(totals[0], slot, job % 2, TOKENS, WARPS, TOKEN)
            step, shift = batch_operands.facts_of(facts, slot, job % 2, TOKENS, WARPS, TOKEN)
            scale, zero = scales[job % 2].to(gl.float32), scales[2 + job % 2].to(gl.float32)
            size, centre = grid_of(scale, zero, own, COUNT)
            sums = gl.fma(size, gl.fma(more.to(gl.float32), step, shift * centre), sums)
    return sums
