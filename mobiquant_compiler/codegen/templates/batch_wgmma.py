"""Blocks of tokens times sliced weights on the integer tensor cores of warpgroups (sm_90): the bits of `sliced_mma`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from mobiquant_compiler.codegen import batches


@gluon.jit
def blocks_of(n_rows, BLOCK_N: gl.constexpr):
    """Return how many blocks a weight's rows are cut into."""
    return (n_rows + BLOCK_N - 1) // BLOCK_N


@gluon.jit
def which_part(block, n_rows, n1_rows, n2_rows, PARTS: gl.constexpr, BLOCK_N: gl.constexpr):
    """Return which weight a program works on, and which of that weight's blocks of rows."""
    part = gl.to_tensor(0)
    if PARTS > 1:
        start = blocks_of(n_rows=n_rows, BLOCK_N=BLOCK_N)
        part += (block >= start).to(gl.int32)
        begin = gl.where(block >= start, start, 0)
        if PARTS > 2:
            start += blocks_of(n_rows=n1_rows, BLOCK_N=BLOCK_N)
            part += (block >= start).to(gl.int32)
            begin = gl.where(block >= start, start, begin)
        if PARTS > 3:
            start += blocks_of(n_rows=n2_rows, BLOCK_N=BLOCK_N)
            part += (block >= start).to(gl.int32)
            begin = gl.where(block >= start, start, begin)
        block -= begin
    return part, block


@gluon.jit
def of_part(part, p0, p1, p2, p3, PARTS: gl.constexpr):
    """Return the argument of the weight `part`."""
    if PARTS > 1:
        p0 = gl.where(part == 1, p1, p0)
    if PARTS > 2:
        p0 = gl.where(part == 2, p2, p0)
    if PARTS > 3:
        p0 = gl.where(part == 3, p3, p0)
    return p0


@gluon.jit(
    do_not_specialize=("placed_ptr", "bias_ptr", "bias1_ptr", "bias2_ptr", "bias3_ptr", "tokens")
    + ("scale_ptr", "scale1_ptr", "scale2_ptr", "scale3_ptr", "zero_ptr", "zero1_ptr", "zero2_ptr", "zero3_ptr")
    + ("row_units", "row1_units", "row2_units", "row3_units")
)
def batch_wgmma(
    acts_desc,
    facts_desc,
    sums_desc,
    slices_desc,
    slices1_desc,
    slices2_desc,
    slices3_desc,
    placed_ptr,
    scale_ptr,
    scale1_ptr,
    scale2_ptr,
    scale3_ptr,
    zero_ptr,
    zero1_ptr,
    zero2_ptr,
    zero3_ptr,
    bias_ptr,
    bias1_ptr,
    bias2_ptr,
    bias3_ptr,
    y_ptr,
    y1_ptr,
    y2_ptr,
    y3_ptr,
    tokens,
    row_units,
    row1_units,
    row2_units,
    row3_units,
    WIDTHS: gl.constexpr,
    NUM_SLICES: gl.constexpr,
    GROUP: gl.constexpr,
    LAYOUT: gl.constexpr,
    K_PADDED: gl.constexpr,
    ACTIVATION: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PARTS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    NUM_WARPS: gl.constexpr,
    NUM_STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    ROW_UNIT: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """Multiply tokens by one to four weights, of as many slices as each token's count says, read on the device.

    A program multiplies BLOCK_M tokens by BLOCK_N rows of one weight. One warp copies, of slices up to the largest
    count of a token; CONSUMERS warpgroups multiply, each its share of the eight chains.

    Shapes: acts int8 [spans of 128 columns times halves, T rounded up to 8, 128], facts float32 [groups, tokens, 2],
        sums int32 [groups, tokens] and placed int32 [2, T] as `route_quantize` writes them with TOKEN_ROWS; per weight
        i slices int32 [NUM_SLICES N_i, K_PADDED / 16], scale, zero [N_i, K_PADDED / GROUP], bias [N_i], y [T, N_i],
        written; N_i is ``row_units ROW_UNIT``: with a unit of 8, rows are written 16 bytes at a time. Grid: (T /
        BLOCK_M, sum of N_i / BLOCK_N), each rounded up.
    Numerics: those of `sliced_mma`, to the last bit, within the bounds of `batch_products.grid_of`. Codes of eight bits
        are multiplied less 128, which 128 times the sum of the activations makes up for, exactly.
    Source: docs/architecture.md, "CUDA path"; codes of several slices are one integer ("Slices").
    """
    gl.static_assert(LAYOUT == "slice_major", "slices are packed whole")
    gl.static_assert(WIDTHS == (2,) * NUM_SLICES and NUM_SLICES <= 4, "one to four slices of two bits")
    gl.static_assert(GROUP == 64 or GROUP == 128, "a group has 64 or 128 columns")
    gl.static_assert(ACTIVATION == "a16" or ACTIVATION == "a8", "activations have 16 or 8 bits")
    gl.static_assert(PARTS >= 1 and PARTS <= 4, "one launch serves 1 to 4 weights")
    gl.static_assert(BLOCK_M == 16 or BLOCK_M == 32, "a program has 16 or 32 tokens")
    gl.static_assert(BLOCK_N == 64 and NUM_WARPS == 4, "a consumer is a warpgroup, which multiplies 64 rows")
    gl.static_assert(CONSUMERS == 1 or CONSUMERS == 2, "one warpgroup multiplies, or two")
    gl.static_assert(NUM_STAGES >= 3, "one stage less where stages are large, and one is read while others are written")
    HALVES: gl.constexpr = 2 if ACTIVATION == "a16" else 1
    part, block = which_part(
        block=gl.program_id(1),
        n_rows=row_units * ROW_UNIT,
        n1_rows=row1_units * ROW_UNIT,
        n2_rows=row2_units * ROW_UNIT,
        PARTS=PARTS,
        BLOCK_N=BLOCK_N,
    )
    units = of_part(part=part, p0=row_units, p1=row1_units, p2=row2_units, p3=row3_units, PARTS=PARTS)
    n_rows = units * ROW_UNIT
    scale_ptr = of_part(part=part, p0=scale_ptr, p1=scale1_ptr, p2=scale2_ptr, p3=scale3_ptr, PARTS=PARTS)
    zero_ptr = of_part(part=part, p0=zero_ptr, p1=zero1_ptr, p2=zero2_ptr, p3=zero3_ptr, PARTS=PARTS)
    y_ptr = of_part(part=part, p0=y_ptr, p1=y1_ptr, p2=y2_ptr, p3=y3_ptr, PARTS=PARTS)
    if HAS_BIAS:
        bias_ptr = of_part(part=part, p0=bias_ptr, p1=bias1_ptr, p2=bias2_ptr, p3=bias3_ptr, PARTS=PARTS)
    slices_descs = (slices_desc,)
    if PARTS > 1:
        slices_descs = slices_descs + (slices1_desc,)
    if PARTS > 2:
        slices_descs = slices_descs + (slices2_desc,)
    if PARTS > 3:
        slices_descs = slices_descs + (slices3_desc,)
    descs = (acts_desc, facts_desc, (sums_desc,) if NUM_SLICES == 4 else (), slices_descs)
    place = (gl.program_id(0) * BLOCK_M, block * BLOCK_N, n_rows, part)
    if OVERLAP:
        gdc_wait()
    most, least = batches.counts_between(placed_ptr, place[0], tokens, NUM_SLICES, BLOCK_M, NUM_WARPS)
    for count in gl.static_range(1, NUM_SLICES + 1):
        # Tokens of one count multiply once and tell nothing apart, those of two counts side by side multiply twice.
        for spread in gl.static_range(3 if count > 2 else count):
            if (most == count) & (gl.minimum(most - least, 2) == spread):
                batches.multiply_program(
                    descs,
                    placed_ptr,
                    (scale_ptr, zero_ptr, bias_ptr if HAS_BIAS else y_ptr),
                    y_ptr,
                    tokens,
                    place,
                    count - spread if spread < 2 else 1,
                    count,
                    GROUP,
                    K_PADDED,
                    HALVES,
                    BLOCK_M,
                    BLOCK_N,
                    HAS_BIAS,
                    OVERLAP,
                    CONSUMERS,
                    NUM_STAGES - 1 if count > 2 else NUM_STAGES,
                )
