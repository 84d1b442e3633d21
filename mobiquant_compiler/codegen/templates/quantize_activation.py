"""Activations to fixed point per group: 16 bits as two int8 halves, or 8 bits."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("x_ptr", "columns"))
def quantize_activation(
    x_ptr,
    high_ptr,
    low_ptr,
    step_ptr,
    total_ptr,
    columns,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write ``x = step * xi`` per group with integers xi, ``xi = 256 high + low`` (a16) or ``xi = high`` (a8).

    A group that holds a value that is not finite gets the step NaN, which reaches every output of its token.

    Shapes: x [T, columns] float; high, low int8 [T, K_PADDED]; step float32 and total int32 (sum of xi)
        [T, K_PADDED / GROUP]. Grid: (T, K_PADDED / BLOCK_W). Columns from `columns` on are written as zero.
    Numerics: the step of a16 is a power of two, so that bfloat16 values are exact within 2**7 of their group's largest
        and scaling never rounds; that of a8 is largest / 127. Rounds half to even.
    Source: design section 7, integer slices.
    """
    tl.static_assert(GROUP == 32 or GROUP == 64 or GROUP == 128, "a group has 32, 64 or 128 columns")
    tl.static_assert(ACTIVATION == "a16" or ACTIVATION == "a8", "activations have 16 or 8 bits")
    tl.static_assert(ORDER == "columns" or ORDER == "places", "bytes in column order or by place")
    tl.static_assert(BLOCK_W % GROUP == 0 and BLOCK_W <= 8192, "whole groups, at most 8192 columns")
    tl.static_assert(K_PADDED % GROUP == 0 and GROUP % SPAN == 0, "whole groups and positions")
    GROUPS: tl.constexpr = K_PADDED // GROUP
    BLOCK_G: tl.constexpr = BLOCK_W // GROUP

    token = tl.program_id(0).to(tl.int64)
    offs_g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    offs_k = offs_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    in_g = offs_g < GROUPS
    x = tl.load(x_ptr + token * columns + offs_k, mask=offs_k < columns, other=0.0).to(tl.float32)
    finite = tl.abs(x) < float("inf")
    x = tl.where(finite, x, 0.0)
    largest = tl.max(tl.abs(x), axis=1)
    poison = tl.sum(tl.where(finite, 0, 1), axis=1) > 0

    if ACTIVATION == "a16":
        # The exponent of the largest value, bumped where its integer would not fit: |xi| <= 32637 < 127.5 * 256.
        exponent = (largest * 1.004).to(tl.int32, bitcast=True) >> 23
        exponent = tl.maximum(exponent, 15)
        step = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
        inverse = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
        xi = x * inverse[:, None]
    else:
        step = tl.where(largest > 0.0, largest / 127.0, 1.0)
        xi = x / step[:, None]
    # Adding and taking off 1.5 * 2**23 rounds to the nearest integer, half to even.
    xi = ((xi + 12582912.0) - 12582912.0).to(tl.int32)

    if ORDER == "places":
        # Quads (4 columns) of equal place in their words lie together, by position.
        position = offs_k // SPAN
        inside = offs_k % SPAN
        offs_out = ((inside // 4) * (K_PADDED // SPAN) + position) * 4 + inside % 4
    else:
        offs_out = offs_k
    offs_out = token * K_PADDED + offs_out
    if ACTIVATION == "a16":
        high = (xi + 128) >> 8
        tl.store(low_ptr + offs_out, (xi - (high << 8)).to(tl.int8), mask=in_g[:, None])
    else:
        high = xi
    tl.store(high_ptr + offs_out, high.to(tl.int8), mask=in_g[:, None])
    tl.store(step_ptr + token * GROUPS + offs_g, tl.where(poison, float("nan"), step), mask=in_g)
    tl.store(total_ptr + token * GROUPS + offs_g, tl.sum(xi, axis=1), mask=in_g)
