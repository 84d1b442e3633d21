"""Slice counts of tokens, and their activations in fixed point, in one launch; either half can stand alone."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mobiquant_compiler.codegen import activations, networks


@triton.jit
def record(count, token, tokens, masked, hist_ptr, mask_ptr, counts_ptr):
    """Write a token's slice count, and count it unless it is padding; nothing for a token that is not there."""
    there = token < tokens
    tl.store(counts_ptr + token, count, mask=there)
    real = tl.load(mask_ptr + 1 + token, mask=masked & there, other=1)
    tl.atomic_add(hist_ptr + count - 1, real.to(tl.int64), mask=there & (real != 0), sem="relaxed")


@triton.jit
def route_token(
    x_ptr,
    energy_ptr,
    gain_ptr,
    thresholds_ptr,
    hist_ptr,
    mask_ptr,
    counts_ptr,
    token,
    tokens,
    capacity,
    NUM_SLICES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Predict the error of one token and choose its slice count.

    Nothing here depends on groups: kernels that only route and those that quantize too score alike to the last bit.
    """
    # What does not depend on the token's columns is asked for first, so that nothing waits for it after the sum.
    limits = ()
    for index in tl.static_range(NUM_SLICES - 1):
        limits = limits + (tl.load(gain_ptr + index), tl.load(thresholds_ptr + index))
    # The mask speaks only for calls of as many tokens as it describes; others are counted whole.
    masked = (tl.load(mask_ptr) == tokens) & (tokens < capacity)
    x_ptr += token.to(tl.int64) * COLUMNS
    errors = tl.zeros([BLOCK_R], tl.float32)
    for start in tl.static_range(0, COLUMNS, BLOCK_R):
        offs_k = start + tl.arange(0, BLOCK_R)
        inside = offs_k < COLUMNS
        x = tl.load(x_ptr + offs_k, mask=inside, other=0.0).to(tl.float32)
        errors += x * x * tl.load(energy_ptr + offs_k, mask=inside, other=0.0)
    error = tl.sum(errors, axis=0)
    used = error == error
    count = 1
    for index in tl.static_range(NUM_SLICES - 1):
        # Nested: a slice is used only where the one before it is. NaN compares false and leaves the base slice.
        used = used & (error * limits[2 * index] >= limits[2 * index + 1])
        count += used.to(tl.int32)
    record(
        count=count,
        token=token,
        tokens=tokens,
        masked=masked,
        hist_ptr=hist_ptr,
        mask_ptr=mask_ptr,
        counts_ptr=counts_ptr,
    )


@triton.jit
def route_by_network(
    x_ptr,
    energy_ptr,
    gain_ptr,
    hidden_ptr,
    hidden_bias_ptr,
    out_ptr,
    out_bias_ptr,
    thresholds_ptr,
    hist_ptr,
    mask_ptr,
    counts_ptr,
    token,
    tokens,
    capacity,
    NUM_SLICES: tl.constexpr,
    COLUMNS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Score BLOCK_M tokens by a trained router and choose their slice counts.

    A token's sums have one order, that of `networks`, whatever BLOCK_M is and whatever else the kernel does.

    Shapes: hidden [HIDDEN, COLUMNS + 2], hidden_bias [HIDDEN], out [E - 1, HIDDEN], out_bias [E - 1] float16.
    """
    tl.static_assert(HIDDEN == 0 or BLOCK_R % (64 * NUM_WARPS) == 0, "a step gives two columns to each thread")
    offs_e = tl.arange(0, networks.places_of(NUM_SLICES - 1))
    real = offs_e < NUM_SLICES - 1
    gain = tl.load(gain_ptr + offs_e, mask=real, other=0.0)
    limit = tl.load(thresholds_ptr + offs_e, mask=real, other=0.0)
    out_bias = tl.load(out_bias_ptr + offs_e, mask=real, other=0.0).to(tl.float32)
    masked = (tl.load(mask_ptr) == tokens) & (tokens < capacity)
    facts, corrections = networks.predict(
        x_ptr,
        energy_ptr,
        hidden_ptr,
        hidden_bias_ptr,
        out_ptr,
        token,
        tokens,
        COLUMNS,
        HIDDEN,
        NUM_SLICES - 1,
        BLOCK_M,
        BLOCK_R,
        NUM_WARPS,
        EMULATE,
    )
    for m in tl.static_range(BLOCK_M):
        scores = facts[4 * m] * gain * networks.factors(corrections[m] + out_bias)
        # Nested: a slice is used only where the one before it is, so the first unused one decides.
        used = real & (scores >= limit)
        record(
            count=tl.min(tl.where(used, NUM_SLICES, offs_e + 1), axis=0),
            token=token + m,
            tokens=tokens,
            masked=masked,
            hist_ptr=hist_ptr,
            mask_ptr=mask_ptr,
            counts_ptr=counts_ptr,
        )


@triton.jit
def quantize_columns(
    x_ptr,
    counts_ptr,
    placed_ptr,
    high_ptr,
    low_ptr,
    affine_ptr,
    sums_ptr,
    first_group,
    token,
    tokens,
    ROUTE: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TOKEN_ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write BLOCK_W columns of one token in fixed point.

    Shapes: high, low words of bytes and affine float32 [K_PADDED / GROUP, T rounded up to 8, 2] (step, minus step times
        the sum of the integers), in the order of `activations.activation_places`, zero from COLUMNS on. With TOKEN_ROWS
        in that of `row_places`; then also sums int32 [K_PADDED / GROUP, T rounded up to 8] and placed int32 [2, T], the
        count and the token at each place: where `place_of` says. With ROUTE, when counts are not known yet, each token
        is at its own place; counts are then the first row of placed, and only the second is written here.
    """
    tl.static_assert(GROUP == 32 or GROUP == 64 or GROUP == 128, "a group has 32, 64 or 128 columns")
    tl.static_assert(ACTIVATION == "a16" or ACTIVATION == "a8", "activations have 16 or 8 bits")
    tl.static_assert(BLOCK_W % GROUP == 0, "a program quantizes whole groups")
    tl.static_assert(K_PADDED % GROUP == 0, "columns are padded to whole groups")
    tl.static_assert(COLUMNS >= 1 and COLUMNS <= K_PADDED, "there are columns, no more than padded ones")
    GROUPS: tl.constexpr = K_PADDED // GROUP
    x_ptr += token.to(tl.int64) * COLUMNS
    blocks = tl.cdiv(tokens, 8)
    offs_g = first_group + tl.arange(0, BLOCK_W // GROUP)
    in_g = offs_g < GROUPS
    offs_k = offs_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = in_g[:, None]
    if COLUMNS < K_PADDED:
        inside = offs_k < COLUMNS
    xi, step = activations.fixed_point(tl.load(x_ptr + offs_k, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    if TOKEN_ROWS:
        place = token
        if not ROUTE:
            place, count = activations.place_of(counts_ptr, token, tokens)
            tl.store(placed_ptr + place, count, mask=first_group == 0)
        tl.store(placed_ptr + tokens + place, token, mask=first_group == 0)
        token = place
        places = activations.row_places(offs_g, token, blocks, GROUP, 2 if ACTIVATION == "a16" else 1)
    else:
        places = activations.activation_places(offs_g, token, blocks, GROUP)
    high = xi
    if ACTIVATION == "a16":
        high = (xi + 128) >> 8
        tl.store(low_ptr + places, activations.words_of_bytes(xi, GROUP), mask=in_g[:, None, None, None])
    tl.store(high_ptr + places, activations.words_of_bytes(high, GROUP), mask=in_g[:, None, None, None])
    facts = affine_ptr + (offs_g.to(tl.int64) * blocks * 8 + token) * 2
    total = tl.sum(xi, axis=1)
    if TOKEN_ROWS:
        tl.store(sums_ptr + offs_g.to(tl.int64) * blocks * 8 + token, total, mask=in_g)
    both = tl.join(step, (-total).to(tl.float32) * step)
    tl.store(facts[:, None] + tl.arange(0, 2)[None, :], both, mask=in_g[:, None])


@triton.jit
def begin(
    first,
    energy_ptr,
    hidden_ptr,
    COLUMNS: tl.constexpr,
    HIDDEN: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Let the next kernel begin, ask for a network where one program does for all, and wait for the kernel before."""
    gdc_launch_dependents()
    if PREFETCH > 0:  # noqa: SIM102  (known when the kernel is made, unlike the next)
        if first:
            networks.prefetch_network(energy_ptr, hidden_ptr, COLUMNS, HIDDEN, NUM_WARPS)
    gdc_wait()


# One variant for every call: a token count of 1 or 16 must not compile anew inside a graph capture. Launches see to it
# that what is specialised, pointers to columns, is always aligned.
@triton.jit(
    do_not_specialize=(
        "gain_ptr",
        "hidden_bias_ptr",
        "out_ptr",
        "out_bias_ptr",
        "thresholds_ptr",
        "hist_ptr",
        "mask_ptr",
        "counts_ptr",
        "placed_ptr",
        "tokens",
        "capacity",
    )
)
def route_quantize(
    x_ptr,
    energy_ptr,
    gain_ptr,
    hidden_ptr,
    hidden_bias_ptr,
    out_ptr,
    out_bias_ptr,
    thresholds_ptr,
    hist_ptr,
    mask_ptr,
    counts_ptr,
    placed_ptr,
    high_ptr,
    low_ptr,
    affine_ptr,
    sums_ptr,
    tokens,
    capacity,
    NUM_SLICES: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TOKEN_ROWS: tl.constexpr,
    ROUTE: tl.constexpr,
    QUANTIZE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    NUM_WARPS: tl.constexpr,
    OVERLAP: tl.constexpr,
    PREFETCH: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """Choose a slice count per token, count it into the histogram, and write the token in fixed point per group.

    Shapes: x [T, COLUMNS]; energy [COLUMNS], gain, thresholds [E - 1] float32, and a network (`route_by_network`); hist
        int64 [E]; mask int32 [capacity], first how many tokens it describes; counts int32 [T], written with ROUTE, else
        read for TOKEN_ROWS; the rest: `quantize_columns`. Grid: (T, or with ROUTE alone T / BLOCK_M; with ROUTE one
        that routes, by a network BLOCK_M tokens, and with QUANTIZE K_PADDED / BLOCK_W of as many columns), rounded up.
    Numerics: ``xi = 256 high + low`` (a16) or ``xi = high`` (a8), see `fixed_point`; float32 scores.
    Source: docs/architecture.md, "CUDA path"; `reference.energy_scores`, `reference.mlp_scores`, `reference.record`.
    """
    tl.static_assert(NUM_SLICES >= 1 and NUM_SLICES <= 8, "a code has 1 to 8 slices")
    tl.static_assert(HIDDEN > 0 or BLOCK_M == 1, "a data-free router has a program for every token")
    token, part = tl.program_id(0), tl.program_id(1)
    if OVERLAP:
        begin(
            first=token + part == 0,
            energy_ptr=energy_ptr,
            hidden_ptr=hidden_ptr,
            COLUMNS=COLUMNS,
            HIDDEN=HIDDEN,
            NUM_WARPS=NUM_WARPS,
            PREFETCH=PREFETCH,
        )
    if ROUTE and HIDDEN > 0 and (part == 0) & (token * BLOCK_M < tokens):
        route_by_network(
            x_ptr=x_ptr,
            energy_ptr=energy_ptr,
            gain_ptr=gain_ptr,
            hidden_ptr=hidden_ptr,
            hidden_bias_ptr=hidden_bias_ptr,
            out_ptr=out_ptr,
            out_bias_ptr=out_bias_ptr,
            thresholds_ptr=thresholds_ptr,
            hist_ptr=hist_ptr,
            mask_ptr=mask_ptr,
            counts_ptr=counts_ptr,
            token=token * BLOCK_M,
            tokens=tokens,
            capacity=capacity,
            NUM_SLICES=NUM_SLICES,
            COLUMNS=COLUMNS,
            HIDDEN=HIDDEN,
            BLOCK_M=BLOCK_M,
            BLOCK_R=BLOCK_R,
            NUM_WARPS=NUM_WARPS,
            EMULATE=EMULATE,
        )
    if ROUTE and HIDDEN == 0 and part == 0:
        route_token(
            x_ptr=x_ptr,
            energy_ptr=energy_ptr,
            gain_ptr=gain_ptr,
            thresholds_ptr=thresholds_ptr,
            hist_ptr=hist_ptr,
            mask_ptr=mask_ptr,
            counts_ptr=counts_ptr,
            token=token,
            tokens=tokens,
            capacity=capacity,
            NUM_SLICES=NUM_SLICES,
            COLUMNS=COLUMNS,
            BLOCK_R=BLOCK_R,
        )
    part -= 1 if ROUTE else 0
    if QUANTIZE and part >= 0:
        quantize_columns(
            x_ptr=x_ptr,
            counts_ptr=counts_ptr,
            placed_ptr=placed_ptr,
            high_ptr=high_ptr,
            low_ptr=low_ptr,
            affine_ptr=affine_ptr,
            sums_ptr=sums_ptr,
            first_group=part * (BLOCK_W // GROUP),
            token=token,
            tokens=tokens,
            ROUTE=ROUTE,
            GROUP=GROUP,
            K_PADDED=K_PADDED,
            COLUMNS=COLUMNS,
            ACTIVATION=ACTIVATION,
            TOKEN_ROWS=TOKEN_ROWS,
            BLOCK_W=BLOCK_W,
        )
