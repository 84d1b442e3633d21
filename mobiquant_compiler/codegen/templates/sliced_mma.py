"""Tokens times sliced weights on integer tensor cores: one token or many, every token with its own slice count."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mobiquant_compiler.codegen import device, fragments, one_token, parts, tiles


@triton.jit
def counts_between(counts_ptr, tokens, BLOCK_M: tl.constexpr, NUM_SLICES: tl.constexpr):
    """Return the largest and the least count of the program's tokens."""
    if BLOCK_M == 1:
        most = tl.minimum(tl.maximum(tl.load(counts_ptr), 1), NUM_SLICES)
        least = most
    else:
        offs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        counts = tl.minimum(tl.maximum(tl.load(counts_ptr + offs, mask=offs < tokens, other=1), 1), NUM_SLICES)
        most = tl.max(counts, axis=0)
        least = tl.min(tl.where(offs < tokens, counts, NUM_SLICES), axis=0)
    return most, least


@triton.jit
def of_each(p0, p1, p2, p3, PARTS: tl.constexpr):
    """Return the arguments of the launch's weights as a tuple."""
    found = (p0,)
    if PARTS > 1:
        found = found + (p1,)
    if PARTS > 2:
        found = found + (p2,)
    if PARTS > 3:
        found = found + (p3,)
    return found


@triton.jit
def multiply_by_count(
    acts,
    weight,
    tile,
    WIDTHS: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    GROUP: tl.constexpr,
    LAYOUT: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_TILES: tl.constexpr,
    OVERLAP: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Take the body for the largest count of the program's tokens.

    weight is (slices, scale, zero, bias), and tile (pointer to counts, output, first row, thread numbers, tokens, rows
    in all).
    """
    # A body per largest count where that is little code: its loads then stand in one row, with no branch between them.
    BODIES: tl.constexpr = NUM_SLICES <= 4
    # ptxas keeps what tells bodies apart in local memory, whose first read comes from far away, unless nothing stands
    # behind a body. Chains of three to eight steps are left as they are: their loops then have more loads from there
    # than that is worth. (Longer ones were measured with groups of 128.)
    LONG: tl.constexpr = GROUP == 128 and K_PADDED > 128 * GROUP
    LAST: tl.constexpr = BODIES and BLOCK_M == 8 and (K_PADDED <= 32 * GROUP or LONG) and not EMULATE
    counts_ptr, y_ptr, program_row, tid, tokens, n_rows = tile
    most, least = counts_between(counts_ptr=counts_ptr, tokens=tokens, BLOCK_M=BLOCK_M, NUM_SLICES=NUM_SLICES)
    for count in tl.static_range(1 if BODIES else NUM_SLICES, NUM_SLICES + 1):
        # Tokens of one count, the usual case, get a body that multiplies once and tells nothing apart.
        for alike in tl.static_range(1 if BODIES and (BLOCK_M == 1 or count == 1) else 0, 2 if BODIES else 1):
            taken = most == count if BODIES else True
            if BODIES and BLOCK_M > 1 and count > 1:
                taken = taken & ((least == most) == (alike == 1))
            if taken:
                tiles.multiply_program(
                    acts,
                    weight,
                    (counts_ptr, y_ptr, program_row, tid, most, tokens, n_rows),
                    (BLOCK_M + 7) // 8,
                    BLOCK_N // (16 * ROW_TILES),
                    ROW_TILES,
                    count,
                    BODIES,
                    alike == 1,
                    WIDTHS,
                    GROUP,
                    LAYOUT,
                    K_PADDED,
                    ACTIVATION,
                    HAS_BIAS,
                    OVERLAP and BLOCK_M > 8,
                    EMULATE,
                )
                if LAST:
                    fragments.end_program(most)


@triton.jit
def multiply_tokens(
    acts,
    weight,
    tile,
    WIDTHS: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    GROUP: tl.constexpr,
    LAYOUT: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_TILES: tl.constexpr,
    ONE: tl.constexpr,
    OVERLAP: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Multiply a program's tokens by its rows; one token in its own way, where a quad multiplies two groups at once.

    weight and tile are those of `multiply_by_count`. One token needs no share of words between lanes then.
    """
    if ONE:
        one_token.multiply_program(
            acts, weight, tile, WIDTHS, NUM_SLICES, GROUP, LAYOUT, K_PADDED, ACTIVATION, HAS_BIAS, EMULATE
        )
    else:
        multiply_by_count(
            acts=acts,
            weight=weight,
            tile=tile,
            WIDTHS=WIDTHS,
            NUM_SLICES=NUM_SLICES,
            GROUP=GROUP,
            LAYOUT=LAYOUT,
            K_PADDED=K_PADDED,
            ACTIVATION=ACTIVATION,
            HAS_BIAS=HAS_BIAS,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            ROW_TILES=ROW_TILES,
            OVERLAP=OVERLAP,
            EMULATE=EMULATE,
        )


# Arguments of which no value changes an instruction here are left out of what Triton makes variants of.
@triton.jit(
    do_not_specialize=("counts_ptr", "bias_ptr", "bias1_ptr", "bias2_ptr", "bias3_ptr", "tokens")
    + ("n_rows", "n1_rows", "n2_rows", "n3_rows")
)
def sliced_mma(
    high_ptr,
    low_ptr,
    affine_ptr,
    counts_ptr,
    slices_ptr,
    slices1_ptr,
    slices2_ptr,
    slices3_ptr,
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
    n_rows,
    n1_rows,
    n2_rows,
    n3_rows,
    WIDTHS: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    GROUP: tl.constexpr,
    LAYOUT: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_TILES: tl.constexpr,
    ONE: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    OVERLAP: tl.constexpr,
    PREFETCH: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Multiply tokens by one to four weights, of as many slices as each token's count says, read on the device.

    A program multiplies BLOCK_M tokens by BLOCK_N rows (of ONE, weights have as many) by slices up to the largest count
    among them. A warp has one or two tiles of 16 rows, all tokens, and its share of the eight chains.

    Shapes: high, low int32 words and affine float32 as `route_quantize` writes them; counts int32 [T]; per weight i
        slices int32 [total_bits, N_i, K_PADDED / 32], scale, zero [N_i, K_PADDED / GROUP], bias [N_i], y [T, N_i],
        written. Grid: (T / BLOCK_M, sum of N_i / BLOCK_N), each rounded up: programs of the same rows run together.
    Numerics: dot products of a group are exact int32; groups are summed in float32 in an order that depends on the
        number of columns only (`codegen/chains.py`): a token's result is the same bits alone and in any batch.
    Source: docs/architecture.md, "CUDA path"; codes of several slices are one integer ("Slices").
    """
    tl.static_assert(NUM_SLICES >= 1 and NUM_SLICES <= 8, "a code has 1 to 8 slices")
    tl.static_assert(GROUP == 32 or GROUP == 64 or GROUP == 128, "a group has 32, 64 or 128 columns")
    tl.static_assert(LAYOUT == "slice_major" or LAYOUT == "bit_major", "slices are packed whole or by plane")
    tl.static_assert(ACTIVATION == "a16" or ACTIVATION == "a8", "activations have 16 or 8 bits")
    tl.static_assert(PARTS >= 1 and PARTS <= 4, "one launch serves 1 to 4 weights")
    tl.static_assert(BLOCK_M == 1 or BLOCK_M % 8 == 0, "a program has one token, or blocks of eight")
    tl.static_assert(BLOCK_N % (16 * ROW_TILES) == 0 and (ROW_TILES == 1 or BLOCK_M > 1), "a warp has tiles of 16 rows")
    tl.static_assert(
        2 * ROW_TILES * NUM_WARPS <= BLOCK_N and 8 * ROW_TILES * NUM_WARPS >= BLOCK_N, "2 to 8 warps share"
    )
    tl.static_assert(BLOCK_M > 1 or BLOCK_N == 16, "a program has 16 rows of one token")
    tl.static_assert(K_PADDED % GROUP == 0, "columns are padded to whole groups")
    rows = of_each(p0=n_rows, p1=n1_rows, p2=n2_rows, p3=n3_rows, PARTS=PARTS)
    slices_ptrs = of_each(p0=slices_ptr, p1=slices1_ptr, p2=slices2_ptr, p3=slices3_ptr, PARTS=PARTS)
    scale_ptrs = of_each(p0=scale_ptr, p1=scale1_ptr, p2=scale2_ptr, p3=scale3_ptr, PARTS=PARTS)
    zero_ptrs = of_each(p0=zero_ptr, p1=zero1_ptr, p2=zero2_ptr, p3=zero3_ptr, PARTS=PARTS)
    y_ptrs = of_each(p0=y_ptr, p1=y1_ptr, p2=y2_ptr, p3=y3_ptr, PARTS=PARTS)
    bias_ptrs = y_ptrs
    if HAS_BIAS:
        bias_ptrs = of_each(p0=bias_ptr, p1=bias1_ptr, p2=bias2_ptr, p3=bias3_ptr, PARTS=PARTS)
    part, rows_block = parts.which_part(tl.program_id(1), rows, BLOCK_N)
    weight = (
        parts.of_part(part, slices_ptrs),
        parts.of_part(part, scale_ptrs),
        parts.of_part(part, zero_ptrs),
        parts.of_part(part, bias_ptrs),
    )
    rows_here = parts.of_part(part, rows)
    tid = tl.arange(0, 32 * NUM_WARPS)
    program_row = rows_block * BLOCK_N
    if ONE:
        # The last program of a weight begins where it has all its rows: the one before writes some as well.
        program_row = tl.minimum(program_row, rows_here - BLOCK_N)
    if OVERLAP:
        # Let the next kernel begin, or, where programs have many tokens, later: what comes early would take turns with
        # them. Have the base slice come near while the kernel before ends; only then read its work.
        if BLOCK_M <= 8:
            gdc_launch_dependents()
        if PREFETCH > 0:
            device.prefetch_base(
                weight[0], program_row, tid, rows_here, WIDTHS, LAYOUT, K_PADDED, BLOCK_N, PREFETCH, EMULATE
            )
        gdc_wait()
    multiply_tokens(
        acts=(high_ptr, low_ptr, affine_ptr),
        weight=weight,
        tile=(counts_ptr, parts.of_part(part, y_ptrs), program_row, tid, tokens, rows_here),
        WIDTHS=WIDTHS,
        NUM_SLICES=NUM_SLICES,
        GROUP=GROUP,
        LAYOUT=LAYOUT,
        K_PADDED=K_PADDED,
        ACTIVATION=ACTIVATION,
        HAS_BIAS=HAS_BIAS,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        ROW_TILES=ROW_TILES,
        ONE=ONE,
        OVERLAP=OVERLAP,
        EMULATE=EMULATE,
    )
