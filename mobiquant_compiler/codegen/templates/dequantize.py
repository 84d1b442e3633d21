"""The weight of every slice count that tokens use, written out once: what a library's GEMM of many tokens reads."""

import triton
import triton.language as tl

from mobiquant_compiler.codegen import device


@triton.jit
def write_weight(
    workspace_ptr,
    octets,
    scale,
    zero,
    left,
    COUNT: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write the first `left` octets of a tile of ``W_COUNT``, given the combined codes of all slices.

    Shapes: octets int32 [BLOCK_N * BLOCK_W / 8, 2], four codes a word; scale, zero float32 [BLOCK_N * BLOCK_W / 8].
    Numerics: slices.py's `affine_at` and `reconstruct`, operation by operation.
    """
    BITS: tl.constexpr = device.bits_before(WIDTHS, COUNT)
    REST: tl.constexpr = device.bits_before(WIDTHS, len(WIDTHS)) - BITS
    POWER: tl.constexpr = 1 << device.residual_bits(WIDTHS, COUNT)
    step = scale * (1.0 / POWER)
    centre = zero * POWER + (POWER - 1) / 2
    # The codes of fewer slices are the leading bits of those of all: no word is read or combined twice.
    shift = REST + 8 * tl.arange(0, 4)
    codes = (octets[:, :, None] >> shift[None, None, :]) & device.field_mask(BITS, 1)
    weight = (codes.to(tl.float32) - centre[:, None, None]) * step[:, None, None]
    weight = tl.reshape(weight, [BLOCK_N * BLOCK_W]).to(workspace_ptr.dtype.element_ty)
    offs = tl.arange(0, BLOCK_N * BLOCK_W)
    tl.store(workspace_ptr + offs, weight, mask=offs < left * 8)


@triton.jit(do_not_specialize=("offsets_ptr", "counts_ptr", "n_rows", "first_row", "rows"))
def dequantize(
    slices_ptr,
    scale_ptr,
    zero_ptr,
    offsets_ptr,
    counts_ptr,
    workspace_ptr,
    n_rows,
    first_row,
    rows,
    WIDTHS: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    GROUP: tl.constexpr,
    LAYOUT: tl.constexpr,
    K_PADDED: tl.constexpr,
    SORTED_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write rows ``first_row .. first_row + rows - 1`` of the weight, for every slice count in use.

    With SORTED_ROWS, tokens are grouped by slice count: count c is in use iff ``offsets[c - 1] < offsets[c]``. Without
    it all tokens have one count, ``counts[0]``. Slices after the largest count in use are not read, and the weight of a
    count that is not in use is not written.

    Rows follow one another without gaps in every packed unit, in scales and in the workspace, so a tile is BLOCK_N runs
    of BLOCK_W consecutive columns that take no notice of where rows end. A lane owns an octet, eight columns: 16 bytes
    of a 16-bit workspace, next to its neighbours', and one word of each packed unit.

    Shapes: slices int32 [total_bits, n_rows, K_PADDED / 32]; scale, zero [n_rows, K_PADDED / GROUP]; offsets int32
        [NUM_SLICES + 1]; counts int32, its first entry; workspace [NUM_SLICES, rows, K_PADDED] with SORTED_ROWS (W_c at
        c - 1), else [rows, K_PADDED]; written. Grid: (rows * K_PADDED / (BLOCK_N * BLOCK_W),).
    Numerics: ``W_c = s_c (Q_c - Z_c)`` in float32, rounded once to the dtype of the workspace.
    Source: docs/architecture.md, "CUDA path", prefill; codes of several slices are one integer ("Slices").
    """
    tl.static_assert(NUM_SLICES >= 1 and NUM_SLICES <= 8, "a code has 1 to 8 slices")
    tl.static_assert(GROUP == 32 or GROUP == 64 or GROUP == 128, "a group has 32, 64 or 128 columns")
    tl.static_assert(LAYOUT == "slice_major" or LAYOUT == "bit_major", "slices are packed whole or by plane")
    tl.static_assert(BLOCK_W % GROUP == 0, "a run has whole groups")
    tl.static_assert(K_PADDED % GROUP == 0, "columns are padded to whole groups")
    ROW: tl.constexpr = K_PADDED // 8
    RUN: tl.constexpr = BLOCK_W // 8
    OCTETS: tl.constexpr = BLOCK_N * RUN

    # Weights of more than 2**31 columns exist: where a tile starts is computed in 64 bits, what is in it in 32.
    start = tl.program_id(0).to(tl.int64) * OCTETS
    left = tl.minimum(tl.cast(rows, tl.int64) * ROW - start, OCTETS).to(tl.int32)
    first = tl.cast(first_row, tl.int64) * ROW + start
    inside = tl.arange(0, OCTETS) < left

    if SORTED_ROWS:
        used = 0  # bit c: count c is in use
        below = tl.load(offsets_ptr)
        for count in tl.static_range(1, NUM_SLICES + 1):
            here = tl.load(offsets_ptr + count)
            used |= (below < here).to(tl.int32) << count
            below = here
    else:
        used = 1 << tl.minimum(tl.maximum(tl.load(counts_ptr), 1), NUM_SLICES)
    first_group = first // (GROUP // 8)
    offs_g = device.octets_over(GROUP // 8, RUN, OCTETS)
    scale = tl.load(scale_ptr + first_group + offs_g, mask=inside, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + first_group + offs_g, mask=inside, other=0.0).to(tl.float32)
    octets = tl.zeros([OCTETS, 2], tl.int32)
    for index in tl.static_range(NUM_SLICES):
        # Predicated rather than branched around: no load waits for the slice before it.
        needed = inside & (used >> (index + 1) > 0)
        octets = device.append_octets(
            octets, slices_ptr, first, needed, n_rows, index, WIDTHS, LAYOUT, RUN, OCTETS, K_PADDED
        )

    for count in tl.static_range(1, NUM_SLICES + 1):
        if (used >> count) & 1:
            place = start
            if SORTED_ROWS:
                place += tl.cast(rows, tl.int64) * ((count - 1) * ROW)
            write_weight(
                workspace_ptr=workspace_ptr + place * 8,
                octets=octets,
                scale=scale,
                zero=zero,
                left=left,
                COUNT=count,
                WIDTHS=WIDTHS,
                BLOCK_N=BLOCK_N,
                BLOCK_W=BLOCK_W,
            )
