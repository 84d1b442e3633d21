"""Jitted functions shared by the kernel templates. The only Triton code that knows a packed layout is here."""

import triton
import triton.language as tl


@triton.constexpr_function
def bits_before(widths, index):
    """Return the bits of the slices before slice `index`, which is also their number of rows in the packed tensor."""
    return sum(widths[:index])


@triton.constexpr_function
def residual_bits(widths, count):
    """Return how many bits the slices after the base add when `count` slices are used."""
    return sum(widths[1:count])


@triton.constexpr_function
def unit_bits(widths, layout, index):
    """Return the width of the packed units of slice `index`: whole codes, or single planes in bit_major."""
    return 1 if layout == "bit_major" else widths[index]


@triton.constexpr_function
def field_mask(width, bytes_kept):
    """Return the word that keeps one `width`-bit code in each of the low bytes."""
    return ((1 << width) - 1) * (0x01010101 & ((1 << (8 * bytes_kept)) - 1))


@triton.jit
def load_unit(
    slices_ptr, offs_n, offs_word, mask, n_rows, FIRST_ROW: tl.constexpr, UNIT: tl.constexpr, K_PADDED: tl.constexpr
):
    """Load words of one packed unit, the run of UNIT rows of the packed tensor that starts at FIRST_ROW.

    Shapes: slices [total_bits, N, K_PADDED / 32] int32; offs_n int64 [B]; offs_word [W]; mask [B, W]; returns [B, W].
    """
    # The packed tensor of a large layer has more than 2**31 bits of addresses: its base is computed in 64 bits.
    base = slices_ptr + tl.cast(n_rows, tl.int64) * (FIRST_ROW * (K_PADDED // 32))
    return tl.load(base + offs_n[:, None] * (K_PADDED * UNIT // 32) + offs_word[None, :], mask=mask, other=0)


@triton.jit
def append_quads(
    quads,
    slices_ptr,
    offs_n,
    offs_w,
    mask,
    n_rows,
    INDEX: tl.constexpr,
    PLACE: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    SPAN: tl.constexpr,
    K_PADDED: tl.constexpr,
):
    """Append slice INDEX to the combined codes of the slices before it, four columns a lane, one code per byte.

    Lane (n, w) holds columns ``SPAN w + 4 PLACE .. + 3`` of row n.

    Shapes: quads int32 [B, W]; offs_n int64 [B]; offs_w [W] positions; mask [B, W]; returns the shape of quads.
    """
    UNIT: tl.constexpr = unit_bits(WIDTHS, LAYOUT, INDEX)
    PLACES: tl.constexpr = 8 // UNIT
    offs_word = offs_w * (SPAN * UNIT // 32) + PLACE // PLACES
    for part in tl.static_range(WIDTHS[INDEX] // UNIT):
        words = load_unit(
            slices_ptr, offs_n, offs_word, mask, n_rows, bits_before(WIDTHS, INDEX) + part * UNIT, UNIT, K_PADDED
        )
        # Codes of all slices have at most 8 bits together, so no byte runs over into the next.
        quads = (quads << UNIT) | ((words >> (UNIT * (PLACE % PLACES))) & field_mask(UNIT, 4))
    return quads


@triton.jit
def load_quads(
    slices_ptr,
    offs_n,
    offs_w,
    mask,
    n_rows,
    PLACE: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    SPAN: tl.constexpr,
    K_PADDED: tl.constexpr,
):
    """Load the combined codes of the first COUNT slices as `append_quads` lays them out.

    A loop over the places asks for the same words again: the compiler merges equal loads (`tests/ptx` counts them).
    """
    quads = tl.zeros(mask.shape, tl.int32)
    for index in tl.static_range(COUNT):
        quads = append_quads(
            quads, slices_ptr, offs_n, offs_w, mask, n_rows, index, PLACE, WIDTHS, LAYOUT, SPAN, K_PADDED
        )
    return quads


@triton.jit
def append_codes(
    codes,
    slices_ptr,
    offs_n,
    in_n,
    n_rows,
    group,
    INDEX: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
):
    """Append slice INDEX to the combined codes of the slices before it, for one group of columns in column order.

    Shapes: codes int8 [B, GROUP], the bits of unsigned codes; offs_n int64 [B]; in_n [B]; returns the shape of codes.
    """
    UNIT: tl.constexpr = unit_bits(WIDTHS, LAYOUT, INDEX)
    WORDS: tl.constexpr = GROUP * UNIT // 32
    column = tl.arange(0, 32 // UNIT)
    shift = 8 * (column % 4) + UNIT * (column // 4)
    offs_word = group * WORDS + tl.arange(0, WORDS)
    for part in tl.static_range(WIDTHS[INDEX] // UNIT):
        words = load_unit(
            slices_ptr,
            offs_n,
            offs_word,
            in_n[:, None],
            n_rows,
            bits_before(WIDTHS, INDEX) + part * UNIT,
            UNIT,
            K_PADDED,
        )
        fields = (words[:, :, None] >> shift[None, None, :]) & field_mask(UNIT, 1)
        codes = (codes << UNIT) | tl.reshape(fields.to(tl.int8), codes.shape)
    return codes


@triton.jit
def dot4(codes, x, acc, EMULATE: tl.constexpr):
    """Add to acc the dot product of four unsigned bytes (codes) and four signed bytes (x), exactly.

    Shapes: codes, x and acc int32, broadcast together.
    """
    if EMULATE:
        for j in tl.static_range(4):
            acc += ((codes >> (8 * j)) & 255) * ((x << (24 - 8 * j)) >> 24)
    else:
        acc = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    return acc


@triton.jit
def add_group(acc, dots, total, scale, zero, step, shrink):
    """Add to acc the share of the output that comes from one group, given its integer dot product.

    With ``shrink = 2**-m`` for m residual bits and activations ``x = a xi``, slices.py's ``s_k (Q_k - Z_k) . x`` is
    ``s a (Q_k . xi shrink - (z + (1 - shrink) / 2) sum(xi))``. Powers of two scale without rounding.

    Numerics: contraction is spelled out here and off elsewhere (`toolchain.FP_FUSION`), so that bodies compiled for
        different slice counts and batch sizes round alike.
    Shapes: acc float32 [M, N]; dots int32 [M, N]; total int32, the rest float32, broadcast to that.
    """
    centre = zero + (0.5 - 0.5 * shrink)
    below = tl.broadcast_to(centre * total.to(tl.float32), acc.shape)
    term = tl.fma(dots.to(tl.float32), tl.broadcast_to(shrink, acc.shape), -below)
    return tl.fma(tl.broadcast_to(scale * step, acc.shape), term, acc)
