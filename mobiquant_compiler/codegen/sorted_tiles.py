"""Tiles of tokens of one slice count: one warp copies, two warpgroups multiply (Gluon, sm_90).

A consumer has 64 output rows and all tokens of the tile. It makes operands of four products of 16 columns at a time,
mostly while the other consumer's products run. Nothing but the barriers of the rings holds the two together.

Activations and words come by the copy engine. A warp that loads its words itself touches eight lines with every load,
for 32 bytes of each, and the path from the L1 cache that it keeps busy is the one by which products read activations.

Names: memory is (acts, words, staged). acts and words are rings of stages in shared memory, (stages, ready, empty): 64
columns of activations, and a step's words, 128 columns of COUNT slices; staged are outputs on their way. weight is
(scale, zero, bias) and given (weight, origins of tokens, outputs, scratch); place is (first token, end of the group,
first row, rows in all). share and scratch are those of `split_columns`, () where no program is split; turns of rings
and steps of loops are counted from the first step of the share.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mobiquant_compiler.codegen import operands, split_columns
from mobiquant_compiler.codegen.batches import consumer_registers

WORD_STAGES = gl.constexpr(2)  # steps whose words are there at a time; `configs` counts their bytes


@gluon.jit
def all_steps(n_rows, K_PADDED: gl.constexpr):
    """Return the number of steps of 128 columns, which the compiler does not know: it would unroll a single one."""
    return (K_PADDED + 127) // 128 + (n_rows >> 31)


@gluon.jit
def steps_of(place, share, K_PADDED: gl.constexpr):
    """Return the number of steps of a share; that they are not many saves instructions for turns of rings."""
    if len(share) == 0:
        steps = all_steps(place[3], K_PADDED)
    else:
        steps = gl.minimum(share[1], (K_PADDED + 127) // 128 + 1)
    return steps


@gluon.jit
def await_empty(ring, turn, STAGES: gl.constexpr):
    """Wait until the stage of a turn is free; returns its number."""
    _, _, empty = ring
    slot = turn % STAGES
    mbarrier.wait(empty.index(slot), ((turn // STAGES) & 1) ^ 1)
    return slot


@gluon.jit
def await_ready(ring, turn, STAGES: gl.constexpr):
    """Wait until the stage of a turn is filled; returns its number."""
    _, ready, _ = ring
    slot = turn % STAGES
    mbarrier.wait(ready.index(slot), (turn // STAGES) & 1)
    return slot


@gluon.jit
def produce(
    descs,
    memory,
    place,
    share,
    COUNT: gl.constexpr,
    TOKENS: gl.constexpr,
    K_PADDED: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):
    """Fill stages as they are emptied.

    Of a step words come first: consumers read them before they give back stages that its activations wait for.
    """
    x_desc, slices_desc = descs
    acts, words, _ = memory
    x_stages, x_ready, _ = acts
    word_stages, words_ready, _ = words
    first, _, first_row, n_rows = place
    begin = share[0] if len(share) > 0 else 0
    for step in range(steps_of(place, share, K_PADDED)):
        slot = await_empty(words, step, WORD_STAGES)
        bar = words_ready.index(slot)
        mbarrier.expect(bar, COUNT * 128 * 32)
        for index in gl.static_range(COUNT):
            target = word_stages.index(slot * COUNT + index)
            tma.async_copy_global_to_shared(slices_desc, [index * n_rows + first_row, 8 * (begin + step)], bar, target)
        for half in gl.static_range(2):
            stage = 2 * step + half
            slot = await_empty(acts, stage, NUM_STAGES)
            bar = x_ready.index(slot)
            mbarrier.expect(bar, 128 * TOKENS)
            tma.async_copy_global_to_shared(x_desc, [first, 128 * begin + 64 * stage], bar, x_stages.index(slot))


@gluon.jit
def four_operands(words, exponent, grid, LAYOUT: gl.constexpr, COUNT: gl.constexpr, DTYPE: gl.constexpr):
    """Return the weights of 64 columns as four operands, from a word of each of COUNT slices a lane."""
    fields = operands.join_fields(words, COUNT, DTYPE)
    return (
        operands.operand(fields[0], exponent, grid, LAYOUT, COUNT, DTYPE),
        operands.operand(fields[1], exponent, grid, LAYOUT, COUNT, DTYPE),
        operands.operand(fields[2], exponent, grid, LAYOUT, COUNT, DTYPE),
        operands.operand(fields[3], exponent, grid, LAYOUT, COUNT, DTYPE),
    )


@gluon.jit
def multiply_stage(sums, weights, acts, stage, NUM_STAGES: gl.constexpr):
    """Begin to add the products of a stage, once it is there."""
    slot = await_ready(acts, stage, NUM_STAGES)
    for index in gl.static_range(4):
        x = acts[0].index(slot).slice(16 * index, 16, 1).permute((1, 0))
        sums = warpgroup_mma(weights[index], x, sums, is_async=True)
    return sums


@gluon.jit
def end_stage(sums, weights, acts, stage, NUM_STAGES: gl.constexpr):
    """Wait for the products of a stage and give it back; nothing but products reads it, so no fence is needed."""
    sums, _, _, _, _ = warpgroup_mma_wait(
        num_outstanding=0, deps=[sums, weights[0], weights[1], weights[2], weights[3]]
    )
    mbarrier.arrive(acts[2].index(stage % NUM_STAGES), count=1)
    return sums


@gluon.jit
def read_words(words, step, WHO: gl.constexpr, COUNT: gl.constexpr):
    """Read a consumer's words of a step, once they are there: those of its first stage and of its second."""
    slot = await_ready(words, step, WORD_STAGES)
    first = ()
    second = ()
    for index in gl.static_range(COUNT):
        found = words[0].index(slot * COUNT + index).slice(64 * WHO, 64).load(operands.word_layout(8, 4))
        even, odd = operands.split_words(found, 4)
        first = first + (even,)
        second = second + (odd,)
    return first, second


@gluon.jit
def give_words_back(words, step):
    """Give the words of a step back; loads of them that are under way would not be waited for without the fence."""
    fence_async_shared()
    mbarrier.arrive(words[2].index(step % WORD_STAGES), count=1)


@gluon.jit
def load_facts(at, step, GROUP: gl.constexpr, K_PADDED: gl.constexpr):
    """Load scales and zero points of a step's columns."""
    scale_at, zero_at = at
    scale = operands.load_groups(scale_at, step, GROUP, K_PADDED, 4)
    return scale, operands.load_groups(zero_at, step, GROUP, K_PADDED, 4)


@gluon.jit
def consume(
    memory,
    given,
    place,
    share,
    WHO: gl.constexpr,
    COUNT: gl.constexpr,
    TOKENS: gl.constexpr,
    GROUP: gl.constexpr,
    K_PADDED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):
    """Multiply 64 rows by TOKENS tokens, over the columns of a share, and write the result or leave it as a part."""
    acts, words, staged = memory
    weight, rows_ptr, y_ptr, scratch = given
    scale_ptr, zero_ptr, bias_ptr = weight
    first_row, n_rows = place[2] + 64 * WHO, place[3]
    DTYPE: gl.constexpr = acts[0].dtype
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 2)
    begin = share[0] if len(share) > 0 else 0
    last = steps_of(place, share, K_PADDED) - 1
    group_at = operands.group_offsets(first_row, n_rows, GROUP, K_PADDED, 4)
    at = (scale_ptr + group_at, zero_ptr + group_at)
    exponent = operands.exponents_of(first_row, n_rows, DTYPE, 4)
    scale, zero = load_facts(at, begin, GROUP, K_PADDED)
    grid = operands.grid_of(scale, zero, COUNT, DTYPE)
    near_words, far_words = read_words(words, 0, WHO, COUNT)
    near = four_operands(near_words, exponent, grid, OPERAND, COUNT, DTYPE)
    give_words_back(words, 0)
    scale, zero = load_facts(at, begin + gl.minimum(1, last), GROUP, K_PADDED)
    sums = gl.zeros([64, TOKENS], gl.float32, PRODUCT)
    for step in range(last + 1):
        sums = multiply_stage(sums, near, acts, 2 * step, NUM_STAGES)
        far = four_operands(far_words, exponent, grid, OPERAND, COUNT, DTYPE)
        sums = end_stage(sums, near, acts, 2 * step, NUM_STAGES)
        sums = multiply_stage(sums, far, acts, 2 * step + 1, NUM_STAGES)
        # Of the next step. Behind the last one come its own numbers again, for nothing: their stage is never filled
        # again, so it still is ready, and nobody waits for it to be empty.
        following = gl.minimum(step + 1, last)
        grid = operands.grid_of(scale, zero, COUNT, DTYPE)
        near_words, far_words = read_words(words, following, WHO, COUNT)
        near = four_operands(near_words, exponent, grid, OPERAND, COUNT, DTYPE)
        scale, zero = load_facts(at, begin + gl.minimum(step + 2, last), GROUP, K_PADDED)
        sums = end_stage(sums, far, acts, 2 * step + 1, NUM_STAGES)
        give_words_back(words, following)
    if len(share) == 0:
        write_tile(sums, staged.index(WHO), bias_ptr, rows_ptr, y_ptr, place, first_row, HAS_BIAS, TOKENS)
    elif share[2] + 1 < share[3]:
        split_columns.leave_sums(sums, scratch, share, WHO, TOKENS)
    else:
        sums = split_columns.add_others(sums, scratch, share, WHO, TOKENS)
        write_tile(sums, staged.index(WHO), bias_ptr, rows_ptr, y_ptr, place, first_row, HAS_BIAS, TOKENS)


@gluon.jit
def write_tile(
    sums,
    staged,
    bias_ptr,
    rows_ptr,
    y_ptr,
    place,
    first_row,
    HAS_BIAS: gl.constexpr,
    TOKENS: gl.constexpr,
):
    """Add the bias and write a tile of sums, each token to the place that it had before sorting, rows side by side."""
    ROWS: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    first, end, _, n_rows = place
    if HAS_BIAS:
        row = first_row + gl.arange(0, 64, gl.SliceLayout(1, sums.type.layout))
        sums += gl.load(bias_ptr + row, mask=row < n_rows, other=0.0).to(gl.float32)[:, None]
    # Through shared memory in one piece: a conversion of layouts would take small ones, with barriers between them.
    staged.permute((1, 0)).store(sums.to(y_ptr.dtype.element_ty))
    y = staged.permute((1, 0)).load(ROWS)
    token = first + gl.arange(0, TOKENS, gl.SliceLayout(0, ROWS))
    origin = gl.load(rows_ptr + token, mask=token < end, other=0)
    row = first_row + gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    inside = (token < end)[None, :] & (row < n_rows)[:, None]
    gl.store(y_ptr + origin.to(gl.int64)[None, :] * n_rows + row[:, None], y, mask=inside)


@gluon.jit
def barriers_of(STAGES: gl.constexpr):
    """Return ready and empty barriers of a ring: one warp fills a stage, two consumers empty it."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    return ready, empty


@gluon.jit
def invalidate(ring, STAGES: gl.constexpr):
    """Let the memory of a ring's barriers be used for something else."""
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(ring[1].index(stage))
        mbarrier.invalidate(ring[2].index(stage))


@gluon.jit
def multiply_tile(
    descs,
    weight,
    rows_ptr,
    y_ptr,
    place,
    share,
    scratch,
    COUNT: gl.constexpr,
    TOKENS: gl.constexpr,
    GROUP: gl.constexpr,
    K_PADDED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):
    """Multiply a tile of up to TOKENS tokens of COUNT slices by 128 rows, and write the result or a part of it."""
    x_desc, slices_desc = descs
    DTYPE: gl.constexpr = x_desc.dtype
    OUT: gl.constexpr = y_ptr.dtype.element_ty
    REGISTERS: gl.constexpr = consumer_registers(2)
    STAGED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, 64], OUT)
    stages = gl.allocate_shared_memory(DTYPE, [NUM_STAGES, TOKENS, 64], x_desc.layout)
    word_stages = gl.allocate_shared_memory(gl.int32, [WORD_STAGES * COUNT, 128, 8], slices_desc.layout)
    staged = gl.allocate_shared_memory(OUT, [2, TOKENS, 64], STAGED)
    ready, empty = barriers_of(NUM_STAGES)
    words_ready, words_empty = barriers_of(WORD_STAGES)
    acts = (stages, ready, empty)
    words = (word_stages, words_ready, words_empty)
    memory = (acts, words, staged)
    given = (weight, rows_ptr, y_ptr, scratch)
    # Constants are spelled out: one that goes by way of a variable is none any more.
    gl.warp_specialize(
        [
            (consume, (memory, given, place, share, 0, COUNT, TOKENS, GROUP, K_PADDED, HAS_BIAS, NUM_STAGES)),
            (consume, (memory, given, place, share, 1, COUNT, TOKENS, GROUP, K_PADDED, HAS_BIAS, NUM_STAGES)),
            (produce, (descs, memory, place, share, COUNT, TOKENS, K_PADDED, NUM_STAGES)),
        ],
        [4, 1],
        [REGISTERS[0], REGISTERS[1]],
    )
    invalidate(acts, NUM_STAGES)
    invalidate(words, WORD_STAGES)
