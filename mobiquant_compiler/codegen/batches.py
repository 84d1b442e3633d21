"""Blocks of tokens by integer products of warpgroups: one warp copies, one or two warpgroups multiply (Gluon, sm_90).

A program has 64 output rows of one weight and 16 or 32 tokens. Pairs of groups are dealt to eight chains and chains are
summed as `chains` does: a token gets the same bits as from `sliced_mma`. Of two consumers each has every other chain.

Names are those of `batch_copies`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents

from mobiquant_compiler.codegen import batch_copies, batch_operands, batch_products, operands
from mobiquant_compiler.codegen.batch_copies import produce


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
def consume(
    memory,
    given,
    WHO: gl.constexpr,
    LEAST: gl.constexpr,
    COUNT: gl.constexpr,
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
    own = ()
    if LEAST < COUNT:
        own = batch_products.counts_of(counts_ptr, first, tokens, COUNT, TOKENS, gl.SliceLayout(0, PRODUCT))
    it = gl.to_tensor(0)
    pair = gl.to_tensor(WHO)
    scales = batch_products.load_scales(scale_ptr, zero_ptr, group_at, pair, GROUPS)
    for index in range(8 // CONSUMERS):
        chain = CONSUMERS * index + WHO
        sums = gl.zeros([ROWS, TOKENS], gl.float32, PRODUCT)
        for _step in range((PAIRS + 7 - chain) // 8):
            slot = WHO * NUM_STAGES + it % NUM_STAGES
            these = scales
            pair = batch_copies.next_pair(pair, PAIRS, CONSUMERS)
            scales = batch_products.load_scales(scale_ptr, zero_ptr, group_at, pair, GROUPS)
            mbarrier.wait(ready.index(slot), (it // NUM_STAGES) & 1)
            sums = batch_products.multiply_pair(
                sums, stages, slot, these, own, LEAST, COUNT, GROUP, HALVES, TOKENS, ROWS
            )
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


@gluon.constexpr_function
def written_layout(rows):
    """Return the layout in which a tile of sums is written, rows of a token side by side."""
    return gl.BlockedLayout([8, 1], [rows // 8, 256 // rows], [1, rows // 16], [0, 1])


@gluon.jit
def write_tile(
    sums, order, bias_ptr, y_ptr, tokens, place, HAS_BIAS: gl.constexpr, TOKENS: gl.constexpr, ROWS: gl.constexpr
):
    """Add the bias and write a tile of sums to where its tokens belong, rows side by side."""
    OUT: gl.constexpr = written_layout(ROWS)
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
    at = first + gl.arange(0, TOKENS, gl.SliceLayout(0, OUT))
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
    inside = (at < tokens)[None, :] & (row < n_rows)[:, None]
    gl.store(y_ptr + order.to(gl.int64)[None, :] * n_rows + row[:, None], y, mask=inside)


@gluon.jit
def multiply_program(
    descs,
    placed_ptr,
    weight,
    y_ptr,
    tokens,
    place,
    LEAST: gl.constexpr,
    COUNT: gl.constexpr,
    GROUP: gl.constexpr,
    K_PADDED: gl.constexpr,
    HALVES: gl.constexpr,
    TOKENS: gl.constexpr,
    ROWS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    OVERLAP: gl.constexpr,
    CONSUMERS: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):
    """Multiply a program's TOKENS tokens by its ROWS rows and write the result; weight: scale, zero point, bias.

    No token uses more than COUNT slices, or fewer than LEAST.
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
    if operands.is_wide(COUNT):
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
    given = (placed_ptr, scale_ptr, zero_ptr, tokens, place)
    # Asked for now, so that nothing waits for it when the tile is written.
    at = place[0] + gl.arange(0, TOKENS, gl.SliceLayout(0, written_layout(ROWS)))
    order = gl.load(placed_ptr + tokens + at, mask=at < tokens, other=0)
    # Constants are spelled out: one that goes by way of a variable is none any more.
    # fmt: off
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (memory, given, 0, LEAST, COUNT, GROUP, K_PADDED, HALVES, TOKENS, ROWS, 2, NUM_STAGES)),
                (consume, (memory, given, 1, LEAST, COUNT, GROUP, K_PADDED, HALVES, TOKENS, ROWS, 2, NUM_STAGES)),
                (produce, (descs, memory, given, COUNT, GROUP, K_PADDED, PLANES, TOKENS, ROWS, 2, NUM_STAGES)),
            ],
            [WARPS, 1],
            [REGISTERS[0], REGISTERS[1]],
        )
        sums = sum_of_four(levels, 0, PRODUCT) + sum_of_four(levels, 4, PRODUCT)
    else:
        gl.warp_specialize(
            [
                (consume, (memory, given, 0, LEAST, COUNT, GROUP, K_PADDED, HALVES, TOKENS, ROWS, 1, NUM_STAGES)),
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
    if OVERLAP:
        # Not before: programs of the next kernel would all come to the few multiprocessors that this one leaves free.
        gdc_launch_dependents()
    write_tile(sums, order, bias_ptr, y_ptr, tokens, place, HAS_BIAS, TOKENS, ROWS)
