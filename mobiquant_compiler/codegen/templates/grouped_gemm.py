"""Many tokens times a sliced weight: integer tensor-core products per group, each token with its own slice count."""

import triton
import triton.language as tl

from mobiquant_compiler.codegen import device


@triton.jit
def integer_product(high, low, codes, total, BITS: tl.constexpr, ACTIVATION: tl.constexpr):
    """Multiply activations [M, GROUP] by unsigned codes [N, GROUP] of BITS bits, exactly; returns int32 [M, N]."""
    if BITS == 8:
        codes = codes ^ -128  # tensor cores take signed bytes: read code - 128, and add 128 sum(xi) back
    turned = tl.trans(codes)
    product = tl.dot(high, turned, out_dtype=tl.int32)
    if ACTIVATION == "a16":
        product = (product << 8) + tl.dot(low, turned, out_dtype=tl.int32)
    if BITS == 8:
        product += total[:, None] << 7
    return product


@triton.jit
def tile_product(
    high_ptr,
    low_ptr,
    step_ptr,
    total_ptr,
    slices_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    rows,
    in_m,
    counts,
    most,
    offs_n,
    n_rows,
    COUNT: tl.constexpr,
    MIXED: tl.constexpr,
    WIDTHS: tl.constexpr,
    GROUP: tl.constexpr,
    LAYOUT: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Multiply a tile of tokens of which none uses more than COUNT slices, and write its rows of the output.

    Without MIXED every token uses COUNT slices. With it, tokens differ, and slices after the first `most` are not read.
    """
    GROUPS: tl.constexpr = K_PADDED // GROUP
    offs_k = tl.arange(0, GROUP)
    in_n = offs_n < n_rows
    shrink = tl.full([BLOCK_M], 1.0 / (1 << device.residual_bits(WIDTHS, COUNT)), tl.float32)
    if MIXED:
        for index in tl.static_range(COUNT - 1):
            here = 1.0 / (1 << device.residual_bits(WIDTHS, index + 1))
            shrink = tl.where(counts == index + 1, here, shrink)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for group in tl.range(0, GROUPS, num_stages=NUM_STAGES):
        offs_x = rows[:, None] * K_PADDED + (group * GROUP + offs_k)[None, :]
        high = tl.load(high_ptr + offs_x, mask=in_m[:, None], other=0)
        low = high
        if ACTIVATION == "a16":
            low = tl.load(low_ptr + offs_x, mask=in_m[:, None], other=0)
        total = tl.load(total_ptr + rows * GROUPS + group, mask=in_m, other=0)
        step = tl.load(step_ptr + rows * GROUPS + group, mask=in_m, other=0.0)
        dots = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        codes = tl.zeros([BLOCK_N, GROUP], tl.int8)
        for index in tl.static_range(COUNT):
            needed = in_n
            if MIXED:
                # Predicated rather than branched around: no load waits for the slice before it.
                needed = in_n & (index < most)
            codes = device.append_codes(
                codes, slices_ptr, offs_n, needed, n_rows, group, index, WIDTHS, LAYOUT, GROUP, K_PADDED
            )
            if MIXED:
                # No branch around products that no token needs: Triton 3.6 pipelines such loops wrongly on sm_90.
                product = integer_product(
                    high=high,
                    low=low,
                    codes=codes,
                    total=total,
                    BITS=device.bits_before(WIDTHS, index + 1),
                    ACTIVATION=ACTIVATION,
                )
                dots = tl.where(counts[:, None] == index + 1, product, dots)
        if not MIXED:
            dots = integer_product(
                high=high,
                low=low,
                codes=codes,
                total=total,
                BITS=device.bits_before(WIDTHS, COUNT),
                ACTIVATION=ACTIVATION,
            )
        offs_s = offs_n * GROUPS + group
        scale = tl.load(scale_ptr + offs_s, mask=in_n, other=0.0).to(tl.float32)
        zero = tl.load(zero_ptr + offs_s, mask=in_n, other=0.0).to(tl.float32)
        acc = device.add_group(acc, dots, total[:, None], scale[None, :], zero[None, :], step[:, None], shrink[:, None])
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    offs_y = rows[:, None] * n_rows + offs_n[None, :]
    tl.store(y_ptr + offs_y, acc.to(y_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit(do_not_specialize=("counts_ptr", "rows_ptr", "bias_ptr", "tokens", "n_rows"))
def grouped_gemm(
    high_ptr,
    low_ptr,
    step_ptr,
    total_ptr,
    counts_ptr,
    rows_ptr,
    slices_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    tokens,
    n_rows,
    WIDTHS: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    GROUP: tl.constexpr,
    LAYOUT: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SORTED_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Multiply tokens by the weight of as many slices as each token's count says.

    A tile reads slices up to the largest count among its tokens. With SORTED_ROWS, tile m takes the tokens
    ``rows[m BLOCK_M : (m + 1) BLOCK_M]`` of a permutation that groups equal counts; results go to the tokens' own rows.

    Shapes: high, low int8 [T, K_PADDED] in column order; step float32 and total int32 [T, K_PADDED / GROUP]; counts
        int32 [T]; rows int64 [T]; slices int32 [total_bits, N, K_PADDED / 32]; scale, zero [N, K_PADDED / GROUP];
        bias [N]; y [T, N], written. Grid: (T / BLOCK_M, N / BLOCK_N).
    Numerics: dot products of a group are exact int32; groups are summed in float32 in order, so that a token's result
        does not depend on the tokens it shares a tile with.
    Source: design section 7; codes of several slices are one integer, design section 3.
    """
    tl.static_assert(NUM_SLICES >= 1 and NUM_SLICES <= 8, "a code has 1 to 8 slices")
    tl.static_assert(GROUP == 32 or GROUP == 64 or GROUP == 128, "a group has 32, 64 or 128 columns")
    tl.static_assert(LAYOUT == "slice_major" or LAYOUT == "bit_major", "slices are packed whole or by plane")
    tl.static_assert(ACTIVATION == "a16" or ACTIVATION == "a8", "activations have 16 or 8 bits")
    tl.static_assert(BLOCK_M >= 16 and BLOCK_M <= 256, "tensor cores take tiles of 16 to 256 tokens")
    tl.static_assert(BLOCK_N >= 16 and BLOCK_N <= 256, "tensor cores take tiles of 16 to 256 output rows")
    tl.static_assert(K_PADDED % GROUP == 0, "columns are padded to whole groups")

    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_m = offs_m < tokens
    if SORTED_ROWS:
        rows = tl.load(rows_ptr + offs_m, mask=in_m, other=0)
    else:
        rows = offs_m.to(tl.int64)
    counts = tl.load(counts_ptr + rows, mask=in_m, other=1)
    counts = tl.minimum(tl.maximum(counts, 1), NUM_SLICES)
    least = tl.min(tl.where(in_m, counts, NUM_SLICES), axis=0)
    most = tl.max(tl.where(in_m, counts, 1), axis=0)
    if SORTED_ROWS:
        # Nearly all tiles hold one count: a body for each, and one for the rest.
        for count in tl.static_range(1, NUM_SLICES + 1):
            if (least == count) & (most == count):
                tile_product(
                    high_ptr=high_ptr,
                    low_ptr=low_ptr,
                    step_ptr=step_ptr,
                    total_ptr=total_ptr,
                    slices_ptr=slices_ptr,
                    scale_ptr=scale_ptr,
                    zero_ptr=zero_ptr,
                    bias_ptr=bias_ptr,
                    y_ptr=y_ptr,
                    rows=rows,
                    in_m=in_m,
                    counts=counts,
                    most=most,
                    offs_n=offs_n,
                    n_rows=n_rows,
                    COUNT=count,
                    MIXED=False,
                    WIDTHS=WIDTHS,
                    GROUP=GROUP,
                    LAYOUT=LAYOUT,
                    K_PADDED=K_PADDED,
                    ACTIVATION=ACTIVATION,
                    HAS_BIAS=HAS_BIAS,
                    BLOCK_M=BLOCK_M,
                    BLOCK_N=BLOCK_N,
                    NUM_STAGES=NUM_STAGES,
                )
    if not SORTED_ROWS or least != most:
        tile_product(
            high_ptr=high_ptr,
            low_ptr=low_ptr,
            step_ptr=step_ptr,
            total_ptr=total_ptr,
            slices_ptr=slices_ptr,
            scale_ptr=scale_ptr,
            zero_ptr=zero_ptr,
            bias_ptr=bias_ptr,
            y_ptr=y_ptr,
            rows=rows,
            in_m=in_m,
            counts=counts,
            most=most,
            offs_n=offs_n,
            n_rows=n_rows,
            COUNT=NUM_SLICES,
            MIXED=True,
            WIDTHS=WIDTHS,
            GROUP=GROUP,
            LAYOUT=LAYOUT,
            K_PADDED=K_PADDED,
            ACTIVATION=ACTIVATION,
            HAS_BIAS=HAS_BIAS,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            NUM_STAGES=NUM_STAGES,
        )
