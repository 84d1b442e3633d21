"""Blocks of tokens by integer products of warpgroups: one warp copies, one or two warpgroups multiply (Gluon, sm_90).

A program has 64 output rows of one weight and 16 or 32 tokens. Pairs of groups are dealt to eight chains and chains are
summed as `chains` does: a token gets the same bits as from `sliced_mma`. Of two consumers each has every other chain.

Names are those of `batch_copies`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mobiquant_compiler.codegen import batch_copies, batch_operands, operands
from mobiquant_compiler.codegen.batch_copies import produce


@gluon.constexpr_function
def shrink_of(count):
    """Return by what power of two the step of `count` slices is smaller than the base step."""
    return 1.0 / operands.power_of(count)


@gluon.constexpr_function
def consumer_registers(consumers):
    """Return how many registers a thread of a consumer gets, and one of the producer: of a multiprocessor, or half."""
    return (232, 40) if consumers == 2 else (216, 40)


@gluon.jit
def counts_between(counts_ptr, first, tokens, NUM_SLICES: gl.constexpr, BLOCK_M: gl.constexpr, NUM_WARPS: gl.constexpr):
    """Return the largest and the least count of the program's tokens."""
    offs = first + gl.arange(0, BLOCK_M, gl.BlockedLayout([1], [32], [NUM_WARPS], [0]))
    counts = gl.load(counts_ptr + offs, mask=offs < tokens, other=1)
    counts = gl.minimum(gl.maximum(counts, 1), NUM_SLICES)
    return gl.max(counts, axis=0), gl.min(gl.where(offs < tokens, counts, NUM_SLICES), axis=0)


@gluon.jit
def begin_products(
    words,
    acts,
    slot,
    JOB: gl.constexpr,
    JOBS: gl.constexpr,
    COUNT: gl.constexpr,
    GROUP: gl.constexpr,
    HALVES: gl.constexpr,
    TOKENS: gl.constexpr,
    ROWS: gl.constexpr,
):
    """Begin to multiply all tokens by codes of one group, of all COUNT slices, or of one where there are JOBS a group.

    High and low halves are columns of one product, side by side as they lie in acts: [stages, planes, TOKENS, 128], for
    each 128 columns of the pair high halves and, of a16, low ones. Returns their sums, on their way.
    """
    BOTH: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [ROWS // 16, 1], [16, HALVES * TOKENS, 32])
    WHICH: gl.constexpr = JOB // JOBS
    JOINED: gl.constexpr = COUNT if JOBS == 1 else 1
    PLANE: gl.constexpr = HALVES * WHICH if GROUP == 128 else 0
    START: gl.constexpr = 0 if GROUP == 128 else 64 * WHICH
    codes = batch_operands.codes_of(words, slot, WHICH, JOB % JOBS, JOINED, COUNT, GROUP, ROWS // 16)
    weight = batch_operands.operand(codes, GROUP, gl.DotOperandLayout(0, BOTH, 4))
    planes = acts.index(slot).reshape([acts.shape[1] * TOKENS, 128])
    x = planes.slice(PLANE * TOKENS, HALVES * TOKENS, 0).slice(START, GROUP, 1).permute((1, 0))
    return warpgroup_mma(weight, x, gl.zeros([ROWS, HALVES * TOKENS], gl.int32, BOTH), use_acc=False, is_async=True)


@gluon.jit
def end_products(sums, HALVES: gl.constexpr, LATER: gl.constexpr, PRODUCT: gl.constexpr):
    """Wait for products, LATER of which were begun after them; returns dot products, int32."""
    dots = warpgroup_mma_wait(num_outstanding=LATER, deps=[sums])
    if HALVES == 2:
        ROWS: gl.constexpr = dots.shape[0]
        high, low = gl.split(gl.permute(gl.reshape(dots, [ROWS, 2, dots.shape[1] // 2]), (0, 2, 1)))
        high = gl.convert_layout(high, PRODUCT, assert_trivial=True)
        low = gl.convert_layout(low, PRODUCT, assert_trivial=True)
        dots = (high << 8) + low
    return dots


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
def grows_of(counts_ptr, first, tokens, COUNT: gl.constexpr, TOKENS: gl.constexpr, LAYOUT: gl.constexpr):
    """Return by what power of two tokens' steps are smaller, and one over it; counts are taken to be 1 to COUNT."""
    token = gl.minimum(first + gl.arange(0, TOKENS, LAYOUT), tokens - 1)
    own = gl.minimum(gl.maximum(gl.load(counts_ptr + token), 1), COUNT)
    # Their exponents: cheaper to make again than to choose, where registers run out.
    grow = ((own << 24) + (125 << 23)).to(gl.float32, bitcast=True)
    shrink = ((129 << 23) - (own << 24)).to(gl.float32, bitcast=True)
    return grow[None, :], shrink[None, :]


@gluon.jit
def grid_of(scale, zero, grows, COUNT: gl.constexpr, ALIKE: gl.constexpr):
    """Return steps and centres as `scaling.grid_at` does, for every row, and token where tokens differ."""
    if ALIKE:
        GROW: gl.constexpr = 1.0 * operands.power_of(COUNT)
        size, centre = (scale * shrink_of(COUNT))[:, None], gl.fma(zero, GROW, 0.5 * GROW - 0.5)[:, None]
    else:
        grow, shrink = grows
        size, centre = scale[:, None] * shrink, gl.fma(zero[:, None], grow, 0.5 * grow - 0.5)
    return size, centre


@gluon.jit
def multiply_pair(
    sums,
    stages,
    slot,
    scales,
    grows,
    COUNT: gl.constexpr,
    ALIKE: gl.constexpr,
    GROUP: gl.constexpr,
    HALVES: gl.constexpr,
    TOKENS: gl.constexpr,
    ROWS: gl.constexpr,
):
    """Add a pair of groups to the sums of a chain.

    Codes of tokens that are ALIKE are one integer; of others every slice is multiplied and appended where it is used.
    The next product is begun before the last one is waited for.
    """
    acts, facts, totals, words = stages
    WARPS: gl.constexpr = ROWS // 16
    PRODUCT: gl.constexpr = sums.type.layout
    TOKEN: gl.constexpr = gl.SliceLayout(0, PRODUCT)
    JOBS: gl.constexpr = 1 if ALIKE else COUNT  # products a group
    begun = begin_products(words, acts, slot, 0, JOBS, COUNT, GROUP, HALVES, TOKENS, ROWS)
    dots = gl.zeros([ROWS, TOKENS], gl.int32, PRODUCT)
    for job in gl.static_range(2 * JOBS):
        if job + 1 < 2 * JOBS:
            later = begin_products(words, acts, slot, job + 1, JOBS, COUNT, GROUP, HALVES, TOKENS, ROWS)
            more = end_products(begun, HALVES, 1, PRODUCT)
            begun = later
        else:
            more = end_products(begun, HALVES, 0, PRODUCT)
        if job % JOBS == 0:
            dots = more
        else:
            dots = gl.where(grows[0] >= operands.power_of(job % JOBS + 1), (dots << 2) + more, dots)
        if job % JOBS == JOBS - 1:
            if len(totals) > 0:
                dots += 128 * batch_operands.totals_of(totals[0], slot, job // JOBS, TOKENS, WARPS, TOKEN)
            step, shift = batch_operands.facts_of(facts, slot, job // JOBS, TOKENS, WARPS, TOKEN)
            scale, zero = scales[job // JOBS].to(gl.float32), scales[2 + job // JOBS].to(gl.float32)
            size, centre = grid_of(scale, zero, grows, COUNT, ALIKE)
            sums = gl.fma(size, gl.fma(dots.to(gl.float32), step, shift * centre), sums)
    return sums


@gluon.jit
def consume(
    memory,
    given,
    WHO: gl.constexpr,
    COUNT: gl.constexpr,
    ALIKE: gl.constexpr,
    GROUP: gl.constexpr,
    K_PADDED: gl.constexpr,
    HALVES: gl.constexpr,
    TOKENS: gl.constexpr,
    ROWS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):
    """Sum a consumer's chains and leave the sums in levels: a single consumer as `fragments.sum_neighbours` would.

    Of two consumers one has the even chains and one the odd ones: what they read at a time lies side by side.

    memory is (stages, levels, ready, empty); levels are room for sums of one chain, of two and of four, or, where there
    are two consumers, of every chain. given is (pointers to counts, scales and zero points, tokens in all, place).
    """
    stages, levels, ready, empty = memory
    counts_ptr, scale_ptr, zero_ptr, tokens, place = given
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [ROWS // 16, 1], [16, TOKENS, 32])
    GROUPS: gl.constexpr = K_PADDED // GROUP
    PAIRS: gl.constexpr = (GROUPS + 1) // 2
    first, first_row, n_rows, _ = place
    row = gl.minimum(first_row + gl.arange(0, ROWS, gl.SliceLayout(1, PRODUCT)), n_rows - 1)
    group_at = row.to(gl.int64) * GROUPS
    grows = ()
    if not ALIKE:
        grows = grows_of(counts_ptr, first, tokens, COUNT, TOKENS, gl.SliceLayout(0, PRODUCT))
    it = gl.to_tensor(0)
    pair = gl.to_tensor(WHO)
    scales = load_scales(scale_ptr, zero_ptr, group_at, pair, GROUPS)
    for index in range(8 // CONSUMERS):
        chain = CONSUMERS * index + WHO
        sums = gl.zeros([ROWS, TOKENS], gl.float32, PRODUCT)
        for _step in range((PAIRS + 7 - chain) // 8):
            slot = WHO * NUM_STAGES + it % NUM_STAGES
            these = scales
            pair = batch_copies.next_pair(pair, PAIRS, CONSUMERS)
            scales = load_scales(scale_ptr, zero_ptr, group_at, pair, GROUPS)
            mbarrier.wait(ready.index(slot), (it // NUM_STAGES) & 1)
            sums = multiply_pair(sums, stages, slot, these, grows, COUNT, ALIKE, GROUP, HALVES, TOKENS, ROWS)
            # Loads of facts may still be under way, behind scales that come slowly, and a copy that a barrier lets in
            # does not wait for them: without the fence some warps read the facts of the pair that is copied next.
            fence_async_shared()
            mbarrier.arrive(empty.index(slot), count=1)
            it += 1
        if CONSUMERS == 2:
            levels.index(chain).store(sums)
        else:
            if chain % 2 == 1:
                sums = levels.index(0).load(PRODUCT) + sums
            if chain % 4 == 3:
                sums = levels.index(1).load(PRODUCT) + sums
            if chain == 7:
                sums = levels.index(2).load(PRODUCT) + sums
            levels.index(gl.where(chain % 4 == 3, 2, chain % 2)).store(sums)


@gluon.jit
def sum_of_four(levels, FIRST: gl.constexpr, LAYOUT: gl.constexpr):
    """Return the sum of four chains, as `fragments.sum_neighbours` adds them."""
    first = levels.index(FIRST).load(LAYOUT) + levels.index(FIRST + 1).load(LAYOUT)
    second = levels.index(FIRST + 2).load(LAYOUT) + levels.index(FIRST + 3).load(LAYOUT)
    return first + second


@gluon.jit
def write_tile(sums, bias_ptr, y_ptr, tokens, place, HAS_BIAS: gl.constexpr, TOKENS: gl.constexpr, ROWS: gl.constexpr):
    """Add the bias and write a tile of sums, rows side by side."""
    WARPS: gl.constexpr = ROWS // 16
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [ROWS // 8, 256 // ROWS], [1, WARPS], [0, 1])
    DTYPE: gl.constexpr = y_ptr.dtype.element_ty
    first, first_row, n_rows, _ = place
    if HAS_BIAS:
        row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, sums.type.layout))
        sums += gl.load(bias_ptr + row, mask=row < n_rows, other=0.0).to(gl.float32)[:, None]
    # Through shared memory in one piece: a conversion of layouts would take small ones, with barriers between them.
    STAGED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, ROWS], DTYPE)
    staged = gl.allocate_shared_memory(DTYPE, [TOKENS, ROWS], STAGED)
    staged.permute((1, 0)).store(sums.to(DTYPE))
    y = staged.permute((1, 0)).load(OUT)
    token = first + gl.arange(0, TOKENS, gl.SliceLayout(0, OUT))
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
    inside = (token < tokens)[None, :] & (row < n_rows)[:, None]
    gl.store(y_ptr + token.to(gl.int64)[None, :] * n_rows + row[:, None], y, mask=inside)


@gluon.jit
def multiply_program(
    descs,
    counts_ptr,
    weight,
    y_ptr,
    tokens,
    place,
    COUNT: gl.constexpr,
    ALIKE: gl.constexpr,
    GROUP: gl.constexpr,
    K_PADDED: gl.constexpr,
    HALVES: gl.constexpr,
    TOKENS: gl.constexpr,
    ROWS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):
    """Multiply a program's TOKENS tokens by its ROWS rows and write the result; weight: scale, zero point, bias.

    No token uses more than COUNT slices, and one uses as many; of tokens that are ALIKE all do.
    """
    scale_ptr, zero_ptr, bias_ptr = weight
    WARPS: gl.constexpr = ROWS // 16
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TOKENS, 32])
    PLANES: gl.constexpr = HALVES * GROUP // 64
    STAGES: gl.constexpr = CONSUMERS * NUM_STAGES
    REGISTERS: gl.constexpr = consumer_registers(CONSUMERS)
    acts = gl.allocate_shared_memory(gl.int8, [STAGES, PLANES, TOKENS, 128], descs[0].layout)
    facts = gl.allocate_shared_memory(gl.float32, [STAGES, 2, 2 * TOKENS], descs[1].layout)
    words = gl.allocate_shared_memory(gl.int32, [STAGES * COUNT, ROWS, GROUP // 8], descs[3][0].layout)
    totals = ()
    if operands.is_wide(COUNT) and ALIKE:
        totals = (gl.allocate_shared_memory(gl.int32, [STAGES, 2, TOKENS], descs[2][0].layout),)
    stages = (acts, facts, totals, words)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    LEVELS: gl.constexpr = 8 if CONSUMERS == 2 else 3
    levels = gl.allocate_shared_memory(gl.float32, [LEVELS, ROWS, TOKENS], batch_operands.sums_layout(TOKENS, WARPS))
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    memory = (stages, levels, ready, empty)
    given = (counts_ptr, scale_ptr, zero_ptr, tokens, place)
    # Constants are spelled out: one that goes by way of a variable is none any more.
    # fmt: off
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (memory, given, 0, COUNT, ALIKE, GROUP, K_PADDED, HALVES, TOKENS, ROWS, 2, NUM_STAGES)),
                (consume, (memory, given, 1, COUNT, ALIKE, GROUP, K_PADDED, HALVES, TOKENS, ROWS, 2, NUM_STAGES)),
                (produce, (descs, memory, given, COUNT, GROUP, K_PADDED, PLANES, TOKENS, ROWS, 2, NUM_STAGES)),
            ],
            [WARPS, 1],
            [REGISTERS[0], REGISTERS[1]],
        )
        sums = sum_of_four(levels, 0, PRODUCT) + sum_of_four(levels, 4, PRODUCT)
    else:
        gl.warp_specialize(
            [
                (consume, (memory, given, 0, COUNT, ALIKE, GROUP, K_PADDED, HALVES, TOKENS, ROWS, 1, NUM_STAGES)),
                (produce, (descs, memory, given, COUNT, GROUP, K_PADDED, PLANES, TOKENS, ROWS, 1, NUM_STAGES)),
            ],
            [1],
            [REGISTERS[1]],
        )
        sums = levels.index(2).load(PRODUCT)
    # fmt: on
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(stage))
        mbarrier.invalidate(empty.index(stage))
    write_tile(sums, bias_ptr, y_ptr, tokens, place, HAS_BIAS, TOKENS, ROWS)
