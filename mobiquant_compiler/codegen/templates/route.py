"""Slice counts of tokens from their predicted output error, counted into the telemetry histogram; one launch."""

import triton
import triton.language as tl


@triton.jit(
    # One variant for every call: alignment or a token count of 1 or 16 must not compile anew inside a graph capture.
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
def route(
    x_ptr,
    energy_ptr,
    gain_ptr,
    thresholds_ptr,
    hist_ptr,
    mask_ptr,
    counts_ptr,
    tokens,
    columns,
    capacity,
    NUM_SLICES: tl.constexpr,
    K_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Choose a slice count per token and add the counts of tokens that are not padding to the histogram.

    Shapes: x [T, columns]; energy [columns] and gain [E - 1] float32; thresholds float32 [E - 1]; hist int64 [E];
        mask int32 [capacity], first the number of tokens it describes; counts int32 [T], written. Grid: (T / BLOCK_M,).
    Numerics: float32; the order of the sum over columns differs from the reference's.
    Source: design section 5; `reference.energy_scores`, `reference.record`.
    """
    tl.static_assert(NUM_SLICES >= 1 and NUM_SLICES <= 8, "a code has 1 to 8 slices")
    tl.static_assert(BLOCK_M >= 1 and BLOCK_M <= 64, "64 tokens a program at most")
    tl.static_assert(BLOCK_W >= 32 and BLOCK_W <= 8192, "steps of 32 to 8192 columns")

    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = offs_m < tokens
    row = offs_m.to(tl.int64)[:, None] * columns
    partial = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    for start in range(0, K_PADDED, BLOCK_W):
        offs_k = start + tl.arange(0, BLOCK_W)
        in_k = offs_k < columns
        x = tl.load(x_ptr + row + offs_k[None, :], mask=in_m[:, None] & in_k[None, :], other=0.0).to(tl.float32)
        energy = tl.load(energy_ptr + offs_k, mask=in_k, other=0.0)
        partial += x * x * energy[None, :]
    error = tl.sum(partial, axis=1)

    used = in_m
    counts = tl.full([BLOCK_M], 1, tl.int32)
    for index in tl.static_range(NUM_SLICES - 1):
        # Nested: a slice is used only where the one before it is. NaN compares false and leaves the base slice.
        used = used & (error * tl.load(gain_ptr + index) >= tl.load(thresholds_ptr + index))
        counts += used.to(tl.int32)
    tl.store(counts_ptr + offs_m, counts, mask=in_m)

    # The mask speaks only for calls of as many tokens as it describes; others are counted whole.
    masked = (tl.load(mask_ptr) == tokens) & (tokens < capacity)
    real = tl.load(mask_ptr + 1 + offs_m, mask=in_m & masked, other=1)
    real = tl.where(in_m, real, 0)
    for index in tl.static_range(NUM_SLICES):
        seen = tl.sum(tl.where(counts == index + 1, real, 0), axis=0)
        tl.atomic_add(hist_ptr + index, seen.to(tl.int64), mask=seen != 0, sem="relaxed")
