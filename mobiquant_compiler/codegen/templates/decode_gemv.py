"""One token times a sliced weight: exact integer dot products per group, reading only the slices the token uses."""

import triton
import triton.language as tl

from mobiquant_compiler.codegen import device


@triton.jit
def rows_times_token(
    high_ptr,
    low_ptr,
    step_ptr,
    total_ptr,
    slices_ptr,
    scale_ptr,
    zero_ptr,
    offs_n,
    in_n,
    n_rows,
    COUNT: tl.constexpr,
    WIDTHS: tl.constexpr,
    GROUP: tl.constexpr,
    LAYOUT: tl.constexpr,
    SPAN: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Multiply BLOCK_N rows of the weight of COUNT slices by the token; returns float32 [BLOCK_N]."""
    POSITIONS: tl.constexpr = K_PADDED // SPAN
    PER_GROUP: tl.constexpr = GROUP // SPAN
    BLOCK_G: tl.constexpr = BLOCK_W // PER_GROUP
    GROUPS: tl.constexpr = K_PADDED // GROUP
    shrink = tl.full([1, 1], 1.0 / (1 << device.residual_bits(WIDTHS, COUNT)), tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
    for start in tl.range(0, POSITIONS, BLOCK_W, num_stages=NUM_STAGES):
        offs_w = start + tl.arange(0, BLOCK_W)
        in_w = offs_w < POSITIONS
        mask = in_n[:, None] & in_w[None, :]
        dots = tl.zeros([BLOCK_N, BLOCK_W], tl.int32)
        lows = tl.zeros([BLOCK_N, BLOCK_W], tl.int32)
        for place in tl.static_range(SPAN // 4):
            quads = device.load_quads(
                slices_ptr, offs_n, offs_w, mask, n_rows, place, COUNT, WIDTHS, LAYOUT, SPAN, K_PADDED
            )
            high = tl.load(high_ptr + place * POSITIONS + offs_w, mask=in_w, other=0)
            dots = device.dot4(quads, high[None, :], dots, EMULATE)
            if ACTIVATION == "a16":
                low = tl.load(low_ptr + place * POSITIONS + offs_w, mask=in_w, other=0)
                lows = device.dot4(quads, low[None, :], lows, EMULATE)
        if ACTIVATION == "a16":
            dots = (dots << 8) + lows
        # Integer sums are exact, so the group's positions are summed before anything is rounded.
        dots = tl.sum(tl.reshape(dots, [BLOCK_N, BLOCK_G, PER_GROUP]), axis=2)
        offs_g = start // PER_GROUP + tl.arange(0, BLOCK_G)
        in_g = offs_g < GROUPS
        offs_ng = offs_n[:, None] * GROUPS + offs_g[None, :]
        mask_ng = in_n[:, None] & in_g[None, :]
        scale = tl.load(scale_ptr + offs_ng, mask=mask_ng, other=0.0).to(tl.float32)
        zero = tl.load(zero_ptr + offs_ng, mask=mask_ng, other=0.0).to(tl.float32)
        step = tl.load(step_ptr + offs_g, mask=in_g, other=0.0)
        total = tl.load(total_ptr + offs_g, mask=in_g, other=0)
        acc = device.add_group(acc, dots, total[None, :], scale, zero, step[None, :], shrink)
    return tl.sum(acc, axis=1)


@triton.jit(do_not_specialize=("counts_ptr", "bias_ptr", "n_rows"))
def decode_gemv(
    high_ptr,
    low_ptr,
    step_ptr,
    total_ptr,
    counts_ptr,
    slices_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    n_rows,
    WIDTHS: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    GROUP: tl.constexpr,
    LAYOUT: tl.constexpr,
    SPAN: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Multiply one token by the weight of as many slices as ``counts[0]`` says, read on the device.

    Shapes: high, low int32 [K_PADDED / 4], bytes in the order "places" of `quantize_activation`; step float32 and total
        int32 [K_PADDED / GROUP]; counts int32 [1]; slices int32 [total_bits, N, K_PADDED / 32]; scale, zero
        [N, K_PADDED / GROUP]; bias [N]; y [N], written. Grid: (N / BLOCK_N,). BLOCK_W counts positions of SPAN columns.
    Numerics: dot products of a group are exact int32 (at most 128 * 255 * 32637 < 2**31); groups are summed in float32.
    Source: design section 7, integer slices; codes of several slices are one integer, design section 3.
    """
    tl.static_assert(NUM_SLICES >= 1 and NUM_SLICES <= 8, "a code has 1 to 8 slices")
    tl.static_assert(GROUP == 32 or GROUP == 64 or GROUP == 128, "a group has 32, 64 or 128 columns")
    tl.static_assert(LAYOUT == "slice_major" or LAYOUT == "bit_major", "slices are packed whole or by plane")
    tl.static_assert(ACTIVATION == "a16" or ACTIVATION == "a8", "activations have 16 or 8 bits")
    tl.static_assert(SPAN == 8 or SPAN == 16 or SPAN == 32, "a word holds 8, 16 or 32 codes")
    tl.static_assert(BLOCK_W * SPAN % GROUP == 0, "a step reads whole groups")
    tl.static_assert(K_PADDED % GROUP == 0, "columns are padded to whole groups")

    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offs_n < n_rows
    offs_n = offs_n.to(tl.int64)
    used = tl.minimum(tl.maximum(tl.load(counts_ptr), 1), NUM_SLICES)
    for count in tl.static_range(1, NUM_SLICES + 1):
        # One straight body per count: its loads do not wait for one another behind branches.
        if used == count:
            y = rows_times_token(
                high_ptr=high_ptr,
                low_ptr=low_ptr,
                step_ptr=step_ptr,
                total_ptr=total_ptr,
                slices_ptr=slices_ptr,
                scale_ptr=scale_ptr,
                zero_ptr=zero_ptr,
                offs_n=offs_n,
                in_n=in_n,
                n_rows=n_rows,
                COUNT=count,
                WIDTHS=WIDTHS,
                GROUP=GROUP,
                LAYOUT=LAYOUT,
                SPAN=SPAN,
                K_PADDED=K_PADDED,
                ACTIVATION=ACTIVATION,
                BLOCK_N=BLOCK_N,
                BLOCK_W=BLOCK_W,
                NUM_STAGES=NUM_STAGES,
                EMULATE=EMULATE,
            )
            if HAS_BIAS:
                y += tl.load(bias_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)
            tl.store(y_ptr + offs_n, y.to(y_ptr.dtype.element_ty), mask=in_n)
