"""Tiles of tokens of one slice count: one warp copies their activations, one or two warpgroups multiply (Gluon, sm_90).

A consumer has 64 output rows and all tokens of the tile. While four products of 16 columns run, it makes the operands
of the next four. Nothing but the barriers of the stages holds two consumers together.

Names: memory is (stages of 64 columns of activations, ready, empty, outputs on their way), ready and empty barriers of
the stages; weight is (slices, scale, zero, bias) and given (weight, origins of tokens, outputs); place is (first token,
end of the group, first row, rows in all).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from mobiquant_compiler.codegen import operands
from mobiquant_compiler.codegen.batches import consumer_registers


@gluon.jit
def steps_of(place, K_PADDED: gl.constexpr):
    """Return the number of steps of 128 columns, which the compiler does not know: it would unroll a single one."""
    return (K_PADDED + 127) // 128 + (place[3] >> 31)


@gluon.jit
def produce(x_desc, memory, place, K_PADDED: gl.constexpr, TOKENS: gl.constexpr, NUM_STAGES: gl.constexpr):
    """Fill stages as they are emptied."""
    stages, ready, empty, _ = memory
    for stage in range(2 * steps_of(place, K_PADDED)):
        slot = stage % NUM_STAGES
        mbarrier.wait(empty.index(slot), ((stage // NUM_STAGES) & 1) ^ 1)
        mbarrier.expect(ready.index(slot), 128 * TOKENS)
        tma.async_copy_global_to_shared(x_desc, [place[0], 64 * stage], ready.index(slot), stages.index(slot))


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
def multiply_stage(sums, weights, memory, stage, NUM_STAGES: gl.constexpr):
    """Begin to add the products of a stage, once it is there."""
    stages, ready, _, _ = memory
    slot = stage % NUM_STAGES
    mbarrier.wait(ready.index(slot), (stage // NUM_STAGES) & 1)
    for place in gl.static_range(4):
        x = stages.index(slot).slice(16 * place, 16, 1).permute((1, 0))
        sums = warpgroup_mma(weights[place], x, sums, is_async=True)
    return sums


@gluon.jit
def end_stage(sums, weights, memory, stage, NUM_STAGES: gl.constexpr):
    """Wait for the products of a stage and give it back; nothing but products reads it, so no fence is needed."""
    sums, _, _, _, _ = warpgroup_mma_wait(
        num_outstanding=0, deps=[sums, weights[0], weights[1], weights[2], weights[3]]
    )
    mbarrier.arrive(memory[2].index(stage % NUM_STAGES), count=1)
    return sums


@gluon.jit
def load_step(at, step, GROUP: gl.constexpr, K_PADDED: gl.constexpr, COUNT: gl.constexpr):
    """Load the words of a step, and its scales and zero points."""
    words_at, unit, scale_at, zero_at = at
    return (
        operands.load_words(words_at, unit, step, K_PADDED, COUNT, 4),
        operands.load_groups(scale_at, step, GROUP, K_PADDED, 4),
        operands.load_groups(zero_at, step, GROUP, K_PADDED, 4),
    )


@gluon.jit
def consume(
    memory,
    given,
    place,
    WHO: gl.constexpr,
    COUNT: gl.constexpr,
    TOKENS: gl.constexpr,
    GROUP: gl.constexpr,
    K_PADDED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):
    """Multiply 64 rows by TOKENS tokens and write the result."""
    weight, rows_ptr, y_ptr = given
    slices_ptr, scale_ptr, zero_ptr, bias_ptr = weight
    first_row, n_rows = place[2] + 64 * WHO, place[3]
    DTYPE: gl.constexpr = memory[0].dtype
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 2)
    steps = steps_of(place, K_PADDED)
    words_at = slices_ptr + operands.word_offsets(first_row, n_rows, K_PADDED, 4)
    group_at = operands.group_offsets(first_row, n_rows, GROUP, K_PADDED, 4)
    at = (words_at, n_rows.to(gl.int64) * (K_PADDED // 16), scale_ptr + group_at, zero_ptr + group_at)
    exponent = operands.exponents_of(first_row, n_rows, DTYPE, 4)
    words, scale, zero = load_step(at, 0, GROUP, K_PADDED, COUNT)
    grid = operands.grid_of(scale, zero, COUNT, DTYPE)
    near = four_operands(words[0], exponent, grid, OPERAND, COUNT, DTYPE)
    far_words = words[1]
    words, scale, zero = load_step(at, gl.minimum(1, steps - 1), GROUP, K_PADDED, COUNT)
    sums = gl.zeros([64, TOKENS], gl.float32, PRODUCT)
    for step in range(steps):
        sums = multiply_stage(sums, near, memory, 2 * step, NUM_STAGES)
        far = four_operands(far_words, exponent, grid, OPERAND, COUNT, DTYPE)
        sums = end_stage(sums, near, memory, 2 * step, NUM_STAGES)
        sums = multiply_stage(sums, far, memory, 2 * step + 1, NUM_STAGES)
        # Of the next step, which was loaded a step ago; behind the last one come its own numbers again, for nothing.
        grid = operands.grid_of(scale, zero, COUNT, DTYPE)
        near = four_operands(words[0], exponent, grid, OPERAND, COUNT, DTYPE)
        far_words = words[1]
        words, scale, zero = load_step(at, gl.minimum(step + 2, steps - 1), GROUP, K_PADDED, COUNT)
        sums = end_stage(sums, far, memory, 2 * step + 1, NUM_STAGES)
    if HAS_BIAS:
        row = first_row + gl.arange(0, 64, gl.SliceLayout(1, PRODUCT))
        sums += gl.load(bias_ptr + row, mask=row < n_rows, other=0.0).to(gl.float32)[:, None]
    write_tile(sums, memory[3].index(WHO), rows_ptr, y_ptr, place, first_row, TOKENS)


@gluon.jit
def write_tile(sums, staged, rows_ptr, y_ptr, place, first_row, TOKENS: gl.constexpr):
    """Write a tile of sums, each token to the place that it had before sorting, rows side by side."""
    ROWS: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    first, end, _, n_rows = place
    # Through shared memory in one piece: a conversion of layouts would take small ones, with barriers between them.
    staged.permute((1, 0)).store(sums.to(y_ptr.dtype.element_ty))
    y = staged.permute((1, 0)).load(ROWS)
    token = first + gl.arange(0, TOKENS, gl.SliceLayout(0, ROWS))
    origin = gl.load(rows_ptr + token, mask=token < end, other=0)
    row = first_row + gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    inside = (token < end)[None, :] & (row < n_rows)[:, None]
    gl.store(y_ptr + origin.to(gl.int64)[None, :] * n_rows + row[:, None], y, mask=inside)


@gluon.jit
def multiply_tile(
    x_desc,
    weight,
    rows_ptr,
    y_ptr,
    place,
    COUNT: gl.constexpr,
    TOKENS: gl.constexpr,
    GROUP: gl.constexpr,
    K_PADDED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):
    """Multiply a tile of up to TOKENS tokens of COUNT slices by 64 rows a consumer, and write the result."""
    DTYPE: gl.constexpr = x_desc.dtype
    OUT: gl.constexpr = y_ptr.dtype.element_ty
    REGISTERS: gl.constexpr = consumer_registers(CONSUMERS)
    STAGED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, 64], OUT)
    stages = gl.allocate_shared_memory(DTYPE, [NUM_STAGES, TOKENS, 64], x_desc.layout)
    staged = gl.allocate_shared_memory(OUT, [CONSUMERS, TOKENS, 64], STAGED)
    ready = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    memory = (stages, ready, empty, staged)
    given = (weight, rows_ptr, y_ptr)
    # Constants are spelled out: one that goes by way of a variable is none any more.
    # fmt: off
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (memory, given, place, 0, COUNT, TOKENS, GROUP, K_PADDED, HAS_BIAS, NUM_STAGES)),
                (consume, (memory, given, place, 1, COUNT, TOKENS, GROUP, K_PADDED, HAS_BIAS, NUM_STAGES)),
                (produce, (x_desc, memory, place, K_PADDED, TOKENS, NUM_STAGES)),
            ],
            [4, 1],
            [REGISTERS[0], REGISTERS[1]],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (memory, given, place, 0, COUNT, TOKENS, GROUP, K_PADDED, HAS_BIAS, NUM_STAGES)),
                (produce, (x_desc, memory, place, K_PADDED, TOKENS, NUM_STAGES)),
            ],
            [1],
            [REGISTERS[1]],
        )
    # fmt: on
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.invalidate(ready.index(stage))
        mbarrier.invalidate(empty.index(stage))
