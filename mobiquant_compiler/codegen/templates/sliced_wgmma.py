"""Many tokens, grouped by slice count, times a sliced weight whose bfloat16 values are made in registers (sm_90)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from mobiquant_compiler.codegen import operands


@gluon.jit
def find_tile(offsets_ptr, tile, NUM_SLICES: gl.constexpr, BLOCK_M: gl.constexpr):
    """Return slice count, first token and end of the group of a tile of tokens; count 0 where there is no such tile.

    A group is cut into tiles of BLOCK_M tokens. Those that are more than half full come first, so that the shortest
    programs are the last ones.
    """
    found = gl.to_tensor(0)
    first = gl.to_tensor(0)
    end = gl.to_tensor(0)
    for narrow in gl.static_range(2):
        for index in gl.static_range(NUM_SLICES):
            start = gl.load(offsets_ptr + (NUM_SLICES - 1 - index))
            stop = gl.load(offsets_ptr + (NUM_SLICES - index))
            wide = (stop - start + BLOCK_M // 2 - 1) // BLOCK_M
            if narrow:
                here = (stop - start + BLOCK_M - 1) // BLOCK_M - wide
                start += wide * BLOCK_M
            else:
                here = wide
            if (tile >= 0) & (tile < here):
                found = NUM_SLICES - index
                first = start + tile * BLOCK_M
                end = stop
            tile -= here
    return found, first, end


@gluon.jit
def copy_step(x_desc, stages, ready, step, first, wanted, TOKENS: gl.constexpr, NUM_STAGES: gl.constexpr):
    """Ask for a step's columns of TOKENS tokens, in its stage; `ready` tells when they are there.

    Predicated rather than branched around: with branches in the loop ptxas lets no two products overlap.
    """
    stage = step % NUM_STAGES
    mbarrier.expect(ready.index(stage), 2 * 128 * TOKENS, pred=wanted)
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(
            x_desc,
            [first, 128 * step + 64 * half],
            ready.index(stage),
            stages.index(2 * stage + half),
            pred=wanted,
        )


@gluon.jit
def multiply(
    x_desc,
    slices_ptr,
    scale_ptr,
    zero_ptr,
    first,
    first_row,
    n_rows,
    COUNT: gl.constexpr,
    TOKENS: gl.constexpr,
    GROUP: gl.constexpr,
    K_PADDED: gl.constexpr,
    BLOCK_N: gl.constexpr,
    NUM_STAGES: gl.constexpr,
):
    """Return ``W_COUNT`` of BLOCK_N rows times TOKENS tokens, float32 [BLOCK_N, TOKENS].

    A step is 128 columns: eight products of 16 columns. While one runs, the operand of the next is made. Activations
    come through shared memory, a step a stage; words, scales and zero points are loaded a step ahead, into registers.
    """
    WARPS: gl.constexpr = BLOCK_N // 16
    DTYPE: gl.constexpr = x_desc.dtype
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TOKENS, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 2)

    # A number of steps that the compiler does not know: it would unroll a single one, and cannot do without the loop.
    steps = (K_PADDED + 127) // 128 + (n_rows >> 31)
    stages = gl.allocate_shared_memory(DTYPE, [2 * NUM_STAGES, TOKENS, 64], x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(ready.index(stage), count=1)
    for early in gl.static_range(NUM_STAGES - 1):
        copy_step(
            x_desc=x_desc,
            stages=stages,
            ready=ready,
            step=early,
            first=first,
            wanted=early < steps,
            TOKENS=TOKENS,
            NUM_STAGES=NUM_STAGES,
        )
    words_at = slices_ptr + operands.word_offsets(first_row, n_rows, K_PADDED, WARPS)
    unit = n_rows.to(gl.int64) * (K_PADDED // 16)
    group_at = operands.group_offsets(first_row, n_rows, GROUP, K_PADDED, WARPS)
    words = operands.load_words(words_at, unit, 0, K_PADDED, COUNT, WARPS)
    scale = operands.load_groups(scale_ptr + group_at, 0, GROUP, K_PADDED, WARPS)
    zero = operands.load_groups(zero_ptr + group_at, 0, GROUP, K_PADDED, WARPS)
    exponent = operands.exponent_of(n_rows, words[0][0], COUNT)
    sums = gl.zeros([BLOCK_N, TOKENS], gl.float32, PRODUCT)
    before = gl.zeros([BLOCK_N, 16], DTYPE, OPERAND)
    for step in range(steps):
        these = words
        size = scale.to(gl.float32) * (1.0 / operands.power_of(COUNT))
        centre = operands.centre_of(zero.to(gl.float32), COUNT)
        for place in gl.static_range(8):
            codes = operands.join_words(these[place // 4], COUNT)[place % 4]
            weight = operands.operand(codes, exponent, size, centre, OPERAND, COUNT, DTYPE)
            if place == 0:
                mbarrier.wait(ready.index(step % NUM_STAGES), (step // NUM_STAGES) & 1)
            x = stages.index(2 * (step % NUM_STAGES) + place // 4).slice(16 * (place % 4), 16, 1).permute((1, 0))
            sums = warpgroup_mma(weight, x, sums, is_async=True)
            if place == 0:
                later = gl.minimum(step + 1, steps - 1)
                words = operands.load_words(words_at, unit, later, K_PADDED, COUNT, WARPS)
                scale = operands.load_groups(scale_ptr + group_at, later, GROUP, K_PADDED, WARPS)
                zero = operands.load_groups(zero_ptr + group_at, later, GROUP, K_PADDED, WARPS)
            # The product before has read its operand, whose registers the next one takes.
            sums, before = warpgroup_mma_wait(num_outstanding=1, deps=[sums, before])
            before = weight
            if place == 0:
                # In every warp the products of the step before are done: Triton puts a barrier between these reads of
                # shared memory and the copy, whose stage they were the last to read.
                copy_step(
                    x_desc=x_desc,
                    stages=stages,
                    ready=ready,
                    step=step + NUM_STAGES - 1,
                    first=first,
                    wanted=step + NUM_STAGES - 1 < steps,
                    TOKENS=TOKENS,
                    NUM_STAGES=NUM_STAGES,
                )
    sums, before = warpgroup_mma_wait(num_outstanding=0, deps=[sums, before])
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.invalidate(ready.index(stage))
    stages._keep_alive()
    return sums


@gluon.jit
def write_tile(
    sums,
    rows_ptr,
    bias_ptr,
    y_ptr,
    first,
    end,
    first_row,
    n_rows,
    TOKENS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """Write a tile of sums, each token to the place that it had before sorting, rows side by side."""
    WARPS: gl.constexpr = BLOCK_N // 16
    ROWS: gl.constexpr = gl.BlockedLayout([8, 1], [BLOCK_N // 8, 256 // BLOCK_N], [1, WARPS], [0, 1])
    if HAS_BIAS:
        row = first_row + gl.arange(0, BLOCK_N, gl.SliceLayout(1, sums.type.layout))
        sums += gl.load(bias_ptr + row, mask=row < n_rows, other=0.0).to(gl.float32)[:, None]
    # Through shared memory in one piece: a conversion of layouts would take small ones, with barriers between them.
    DTYPE: gl.constexpr = y_ptr.dtype.element_ty
    STAGED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, BLOCK_N], DTYPE)
    staged = gl.allocate_shared_memory(DTYPE, [TOKENS, BLOCK_N], STAGED)
    staged.permute((1, 0)).store(sums.to(DTYPE))
    y = staged.permute((1, 0)).load(ROWS)
    token = first + gl.arange(0, TOKENS, gl.SliceLayout(0, ROWS))
    place = gl.load(rows_ptr + token, mask=token < end, other=0)
    row = first_row + gl.arange(0, BLOCK_N, gl.SliceLayout(1, ROWS))
    inside = (token < end)[None, :] & (row < n_rows)[:, None]
    gl.store(y_ptr + place.to(gl.int64)[None, :] * n_rows + row[:, None], y, mask=inside)


@gluon.jit(do_not_specialize=("scale_ptr", "zero_ptr", "bias_ptr", "tokens", "row_units"))
def sliced_wgmma(
    x_desc,
    x_half_desc,
    x_quarter_desc,
    rows_ptr,
    offsets_ptr,
    slices_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    tokens,
    row_units,
    WIDTHS: gl.constexpr,
    NUM_SLICES: gl.constexpr,
    GROUP: gl.constexpr,
    LAYOUT: gl.constexpr,
    K_PADDED: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_W: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    ROW_UNIT: gl.constexpr,
):
    """Multiply tokens, grouped by slice count, by a weight of which each uses the slices that its count says.

    A program has up to BLOCK_M tokens of one count, which it finds in the offsets, and BLOCK_N output rows. Programs
    that follow one another share BLOCK_W tiles of tokens, which stay in the L2 cache while weights stream by. A tile of
    few tokens takes products of fewer columns.

    Shapes: x [T, K_PADDED rounded up to 128], tokens in the order of their counts, columns as `operands.column_of`
        says, described in boxes of BLOCK_M, a half and a quarter of it, by 64 columns; rows int32 [T], where each came
        from; offsets int32 [NUM_SLICES + 1]; slices int32 [total_bits, n_rows, K_PADDED / 32]; scale, zero [n_rows,
        K_PADDED / GROUP]; bias [n_rows]; y [T, n_rows], written; n_rows is ``row_units ROW_UNIT``: with a unit of 8,
        rows are written 16 bytes at a time. Grid: ((ceil(T / BLOCK_M) + NUM_SLICES - 1) ceil(n_rows / BLOCK_N),).
    Numerics: weights are ``W_c = s_c (Q_c - Z_c)`` in float32, rounded once to the dtype of x (`operands.centre_of`);
        sums are float32, and rounded once with the bias.
    """
    gl.static_assert(LAYOUT == "slice_major", "slices are packed whole")
    gl.static_assert(WIDTHS == (2,) * NUM_SLICES and NUM_SLICES <= 4, "one to four slices of two bits")
    gl.static_assert(GROUP == 32 or GROUP == 64 or GROUP == 128, "a group has 32, 64 or 128 columns")
    gl.static_assert(BLOCK_M == 128 or BLOCK_M == 256, "a tile has 128 or 256 tokens")
    gl.static_assert(BLOCK_N == 64 or BLOCK_N == 128, "one or two warpgroups of 64 rows")
    gl.static_assert(NUM_STAGES >= 2, "one stage is read while others are written")
    n_rows = row_units * ROW_UNIT
    tiles = (tokens + BLOCK_M - 1) // BLOCK_M + NUM_SLICES - 1
    blocks = (n_rows + BLOCK_N - 1) // BLOCK_N
    band = gl.program_id(0) // (BLOCK_W * blocks)
    inside = gl.program_id(0) - band * (BLOCK_W * blocks)
    across = gl.minimum(tiles - band * BLOCK_W, BLOCK_W)
    first_row = inside // across * BLOCK_N
    found, first, end = find_tile(
        offsets_ptr=offsets_ptr, tile=band * BLOCK_W + inside % across, NUM_SLICES=NUM_SLICES, BLOCK_M=BLOCK_M
    )
    left = end - first
    halvings = (left <= BLOCK_M // 2).to(gl.int32) + (left <= BLOCK_M // 4).to(gl.int32)
    for shrink in gl.static_range(3):
        for count in gl.static_range(1, NUM_SLICES + 1):
            if (halvings == shrink) & (found == count):
                sums = multiply(
                    x_desc=x_desc if shrink == 0 else (x_half_desc if shrink == 1 else x_quarter_desc),
                    slices_ptr=slices_ptr,
                    scale_ptr=scale_ptr,
                    zero_ptr=zero_ptr,
                    first=first,
                    first_row=first_row,
                    n_rows=n_rows,
                    COUNT=count,
                    TOKENS=BLOCK_M >> shrink,
                    GROUP=GROUP,
                    K_PADDED=K_PADDED,
                    BLOCK_N=BLOCK_N,
                    NUM_STAGES=NUM_STAGES,
                )
                write_tile(
                    sums=sums,
                    rows_ptr=rows_ptr,
                    bias_ptr=bias_ptr,
                    y_ptr=y_ptr,
                    first=first,
                    end=end,
                    first_row=first_row,
                    n_rows=n_rows,
                    TOKENS=BLOCK_M >> shrink,
                    HAS_BIAS=HAS_BIAS,
                    BLOCK_N=BLOCK_N,
                )
