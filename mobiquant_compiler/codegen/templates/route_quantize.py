"""Slice counts of tokens, and their activations in fixed point, in one launch; either half can stand alone."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mobiquant_compiler.codegen import activations


@triton.jit
def fixed_point(x, ACTIVATION: tl.constexpr):
    """Turn groups of activations into integers, ``x = step xi``; a group that is not finite gets the step NaN.

    Shapes: x float32 [B, GROUP]; returns xi int32 [B, GROUP] and step float32 [B].
    Numerics: the step of a16 is a power of two, so that bfloat16 values are exact within 2**7 of their group's largest
        and scaling never rounds; that of a8 is largest / 127. Rounds half to even.
    """
    finite = tl.abs(x) < float("inf")
    x = tl.where(finite, x, 0.0)
    largest = tl.max(tl.abs(x), axis=1)
    if ACTIVATION == "a16":
        # The exponent of the largest value, bumped where its integer would not fit: |xi| <= 32637 < 127.5 * 256.
        exponent = tl.maximum((largest * 1.004).to(tl.int32, bitcast=True) >> 23, 15)
        step = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
        xi = x * ((268 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    else:
        step = tl.where(largest > 0.0, largest / 127.0, 1.0)
        xi = x / step[:, None]
    # Adding and taking off 1.5 * 2**23 rounds to the nearest integer, half to even.
    xi = ((xi + 12582912.0) - 12582912.0).to(tl.int32)
    poison = tl.sum(tl.where(finite, 0, 1), axis=1) > 0
    return xi, tl.where(poison, float("nan"), step)


@triton.jit
def choose(
    error, token, gain_ptr, thresholds_ptr, hist_ptr, mask_ptr, counts_ptr, tokens, capacity, NUM_SLICES: tl.constexpr
):
    """Turn a token's predicted error into its slice count, and count it unless it is padding."""
    used = error == error
    count = 1
    for index in tl.static_range(NUM_SLICES - 1):
        # Nested: a slice is used only where the one before it is. NaN compares false and leaves the base slice.
        used = used & (error * tl.load(gain_ptr + index) >= tl.load(thresholds_ptr + index))
        count += used.to(tl.int32)
    tl.store(counts_ptr + token, count)
    # The mask speaks only for calls of as many tokens as it describes; others are counted whole.
    masked = (tl.load(mask_ptr) == tokens) & (tokens < capacity)
    real = tl.load(mask_ptr + 1 + token, mask=masked, other=1)
    tl.atomic_add(hist_ptr + count - 1, real.to(tl.int64), mask=real != 0, sem="relaxed")


# One variant for every call: alignment or a token count of 1 or 16 must not compile anew inside a graph capture.
@triton.jit(
    do_not_specialize=(
        "x_ptr",
        "energy_ptr",
        "gain_ptr",
        "thresholds_ptr",
        "hist_ptr",
        "mask_ptr",
        "counts_ptr",
        "tokens",
        "columns",
        "capacity",
    )
)
def route_quantize(
    x_ptr,
    energy_ptr,
    gain_ptr,
    thresholds_ptr,
    hist_ptr,
    mask_ptr,
    counts_ptr,
    high_ptr,
    low_ptr,
    affine_ptr,
    tokens,
    columns,
    capacity,
    NUM_SLICES: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROUTE: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK_W: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Choose a slice count per token, count it into the histogram, and write the token in fixed point per group.

    Shapes: x [T, columns]; energy [columns] and gain [E - 1] float32; thresholds float32 [E - 1]; hist int64 [E]; mask
        int32 [capacity], first the number of tokens it describes; counts int32 [T], written; high, low int8 and affine
        float32 [K_PADDED / GROUP, T rounded up to 8, 2] (step, step times the sum of the integers), written in the
        order of `activations.activation_places`. Grid: (T,). Columns from `columns` on are written as zero.
    Numerics: ``xi = 256 high + low`` (a16) or ``xi = high`` (a8), see `fixed_point`. Scores in float32; the order of
        their sum over columns differs from the reference's.
    Source: design section 5 and 7; `reference.energy_scores`, `reference.record`.
    """
    tl.static_assert(NUM_SLICES >= 1 and NUM_SLICES <= 8, "a code has 1 to 8 slices")
    tl.static_assert(GROUP == 32 or GROUP == 64 or GROUP == 128, "a group has 32, 64 or 128 columns")
    tl.static_assert(ACTIVATION == "a16" or ACTIVATION == "a8", "activations have 16 or 8 bits")
    tl.static_assert(BLOCK_W % GROUP == 0 and BLOCK_W <= 32768, "whole groups, at most 32768 columns a step")
    tl.static_assert(K_PADDED % GROUP == 0, "columns are padded to whole groups")
    GROUPS: tl.constexpr = K_PADDED // GROUP
    BLOCK_G: tl.constexpr = BLOCK_W // GROUP
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()

    token = tl.program_id(0)
    x_ptr += token.to(tl.int64) * columns
    blocks = tl.cdiv(tokens, 8)
    error = 0.0
    for start in tl.static_range(0, K_PADDED, BLOCK_W):
        offs_g = start // GROUP + tl.arange(0, BLOCK_G)
        offs_k = offs_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x = tl.load(x_ptr + offs_k, mask=offs_k < columns, other=0.0).to(tl.float32)
        if ROUTE:
            energy = tl.load(energy_ptr + offs_k, mask=offs_k < columns, other=0.0)
            error += tl.sum(x * x * energy)
        if QUANTIZE:
            in_g = offs_g < GROUPS
            xi, step = fixed_point(x=x, ACTIVATION=ACTIVATION)
            places = activations.activation_places(offs_g, token, blocks, GROUP)
            high = xi
            if ACTIVATION == "a16":
                high = (xi + 128) >> 8
                tl.store(low_ptr + places, (xi - (high << 8)).to(tl.int8), mask=in_g[:, None])
            tl.store(high_ptr + places, high.to(tl.int8), mask=in_g[:, None])
            facts = affine_ptr + (offs_g * blocks * 8 + token) * 2
            tl.store(facts, step, mask=in_g)
            tl.store(facts + 1, tl.sum(xi, axis=1).to(tl.float32) * step, mask=in_g)
    if ROUTE:
        choose(
            error=error,
            token=token,
            gain_ptr=gain_ptr,
            thresholds_ptr=thresholds_ptr,
            hist_ptr=hist_ptr,
            mask_ptr=mask_ptr,
            counts_ptr=counts_ptr,
            tokens=tokens,
            capacity=capacity,
            NUM_SLICES=NUM_SLICES,
        )
