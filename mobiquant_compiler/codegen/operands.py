"""Packed words to operands of Hopper's tensor cores, in registers: what the fused prefill kernel is made of (Gluon).

A lane of a quad feeds `wgmma` with columns ``2t, 2t + 1, 2t + 8, 2t + 9`` of every 16. In which order columns are
summed is free, so activations are brought into the order in which lanes read words: of 128 columns, lane t has words
``2t`` and ``2t + 1`` of each slice, which is 32 columns and eight bytes in one run. `column_of` says which column
stands at which place; `gather_tokens` writes activations so.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def word_layout(words, warps):
    """Return the layout of [16 warps, words] packed words, 8 or 4 of a row: a lane has rows r and r + 8 of its warp.

    Lane bits 0 and 1 choose the words of a quad's lane, bits 2 to 4 the row: as operand A of `wgmma` lies.
    """
    registers = [[0, 1], [8, 0]] if words == 8 else [[8, 0]]
    lanes = [[0, words // 4], [0, words // 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, row_bases(warps), [], [16 * warps, words])


@gluon.constexpr_function
def row_bases(warps):
    """Return where the rows of each warp begin, 16 a warp, as bases of a linear layout."""
    return [[16 << bit, 0] for bit in range(warps.bit_length() - 1)]


@gluon.constexpr_function
def column_of(place):
    """Return which column of 128 stands at a place: bits ``j i1 i0 h t1 t0 b`` of the place are ``t1 t0 j i1 i0 h b``.

    Word ``2 t + j`` of a row holds columns ``32 t + 16 j + 4 i + 2 h + b`` at bits ``8 (2 h + b) + 2 i``.
    """
    b, t, h, i, j = place & 1, (place >> 1) & 3, (place >> 3) & 1, (place >> 4) & 3, place >> 6
    return 32 * t + 16 * j + 4 * i + 2 * h + b


@gluon.constexpr_function
def is_wide(count):
    """Say whether a code of `count` slices of two bits needs all eight bits of a byte."""
    return count == 4


@gluon.constexpr_function
def power_of(count):
    """Return the power of two by which the step of `count` slices is smaller than the base step."""
    return 1 << (2 * count - 2)


@gluon.constexpr_function
def base_of(dtype):
    """Return the power of two that has room for integers in the mantissa: 2**7 of bfloat16, 2**10 of float16."""
    return 128 if dtype == gl.bfloat16 else 1024


@gluon.constexpr_function
def in_halves(count, dtype):
    """Say whether codes of `count` slices come as two fields of four bits, as bfloat16 has no room for eight."""
    return count == 4 and dtype == gl.bfloat16


@gluon.constexpr_function
def shrink_of(count, dtype):
    """Return by what power of two codes are shrunk before they are scaled, so that the scale of the base is the factor.

    Codes in halves are joined as they are: their factor is shrunk.
    """
    return 1 if in_halves(count, dtype) else power_of(count)


@gluon.constexpr_function
def middle_of(count):
    """Return the integer that is subtracted from a code, exactly, before it is scaled: half of what codes span."""
    return 1 << (2 * count - 1)


@gluon.constexpr_function
def packed_pair(value, dtype):
    """Return two copies of a number, not 0 and one that a dtype of 16 bits has exactly, as int32."""
    mantissa, bias = (7, 127) if dtype == gl.bfloat16 else (10, 15)
    size, exponent = abs(value), 0
    while size >= 2:
        size, exponent = size / 2, exponent + 1
    while size < 1:
        size, exponent = size * 2, exponent - 1
    fraction = int((size - 1) * 2**mantissa)
    assert (size - 1) * 2**mantissa == fraction, f"{value} is not a number of the dtype"
    bits = (value < 0) << 15 | (exponent + bias) << mantissa | fraction
    both = bits << 16 | bits
    return both - (1 << 32) if value < 0 else both


@gluon.constexpr_function
def assembly(name, dtype):
    """Return an instruction on pairs of numbers of a dtype."""
    return name.replace("16x2", "bf16x2" if dtype == gl.bfloat16 else "f16x2")


@gluon.constexpr_function
def select_assembly(mask):
    """Return the instruction that takes bits of its first or of its second argument."""
    return f"lop3.b32 $0, $1, {mask}, $2, 0xE2;"


@gluon.jit
def exponents_of(first_row, n_rows, DTYPE: gl.constexpr, WARPS: gl.constexpr):
    """Return the upper byte of ``base_of(DTYPE)``, four times, for `pair_of`: int32 [rows, 4].

    It depends, as far as the compiler can see, on the row (never negative): of a constant and a selector `prmt` takes
    the selector from a register, and of a number that all lanes share as well, and copies it there each time.
    """
    LAYOUT: gl.constexpr = word_layout(4, WARPS)
    BYTES: gl.constexpr = 0x43434343 if gl.bfloat16 == DTYPE else 0x64646464
    row = gl.minimum(first_row + gl.arange(0, 16 * WARPS, gl.SliceLayout(1, LAYOUT)), n_rows - 1)
    return ((row >> 31) ^ BYTES)[:, None] + gl.zeros([16 * WARPS, 4], gl.int32, LAYOUT)


@gluon.jit
def chosen(ones, zeros, MASK: gl.constexpr):
    """Return the bits of `ones` where MASK has ones, and those of `zeros` elsewhere; one instruction, not two."""
    SELECT: gl.constexpr = select_assembly(MASK)
    return gl.inline_asm_elementwise(SELECT, "=r,r,r", [ones, zeros], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def even_pairs(above, below):
    """Join fields of two bits of two words to fields of four, at places 0 and 2 of each byte."""
    return chosen(below, above << 2, 0x33333333)


@gluon.jit
def odd_pairs(above, below):
    """Join fields of two bits of two words to fields of four, at places 1 and 3 of each byte."""
    return chosen(below >> 2, above, 0x33333333)


@gluon.jit
def join_words(words, COUNT: gl.constexpr):
    """Combine a word of each of COUNT slices of two bits: a tuple of four words of four codes, by place in the byte.

    Codes in place i (columns ``4 i .. 4 i + 3`` of the word's 16) come out one a byte.
    """
    gl.static_assert(COUNT >= 1 and COUNT <= 4, "1 to 4 slices of two bits")
    if COUNT == 1:
        w = words[0]
        codes = (w & 0x03030303, (w >> 2) & 0x03030303, (w >> 4) & 0x03030303, (w >> 6) & 0x03030303)
    else:
        even = even_pairs(words[0], words[1])
        odd = odd_pairs(words[0], words[1])
        if COUNT == 2:
            codes = (even & 0x0F0F0F0F, odd & 0x0F0F0F0F, (even >> 4) & 0x0F0F0F0F, (odd >> 4) & 0x0F0F0F0F)
        elif COUNT == 3:
            w = words[2]
            codes = (
                ((even << 2) & 0x3C3C3C3C) | (w & 0x03030303),
                ((odd << 2) & 0x3C3C3C3C) | ((w >> 2) & 0x03030303),
                ((even >> 2) & 0x3C3C3C3C) | ((w >> 4) & 0x03030303),
                ((odd >> 2) & 0x3C3C3C3C) | ((w >> 6) & 0x03030303),
            )
        else:
            low = even_pairs(words[2], words[3])
            low_odd = odd_pairs(words[2], words[3])
            codes = (
                ((even << 4) & -0x0F0F0F10) | (low & 0x0F0F0F0F),
                ((odd << 4) & -0x0F0F0F10) | (low_odd & 0x0F0F0F0F),
                (even & -0x0F0F0F10) | ((low >> 4) & 0x0F0F0F0F),
                (odd & -0x0F0F0F10) | ((low_odd >> 4) & 0x0F0F0F0F),
            )
    return codes


@gluon.jit
def join_fields(words, COUNT: gl.constexpr, DTYPE: gl.constexpr):
    """Combine a word of each of COUNT slices: for each place in the byte words of four codes, or of their halves."""
    if in_halves(COUNT, DTYPE):
        high = join_words(words[:2], 2)
        low = join_words(words[2:], 2)
        fields = ((high[0], low[0]), (high[1], low[1]), (high[2], low[2]), (high[3], low[3]))
    else:
        codes = join_words(words, COUNT)
        fields = ((codes[0],), (codes[1],), (codes[2],), (codes[3],))
    return fields


@gluon.jit
def fma_pairs(pair, size, shift, DTYPE: gl.constexpr):
    """Return ``pair size + shift``, rounded once: int32 of two numbers each."""
    FMA: gl.constexpr = assembly("fma.rn.16x2 $0, $1, $2, $3;", DTYPE)
    return gl.inline_asm_elementwise(FMA, "=r,r,r,r", [pair, size, shift], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def raised_pair(codes, exponent, PAIR: gl.constexpr):
    """Return ``base_of + code`` of bytes 2 PAIR and 2 PAIR + 1 of each word, exactly, two numbers an int32."""
    BYTES: gl.constexpr = "prmt.b32 $0, $1, $2, 0x4140;" if PAIR == 0 else "prmt.b32 $0, $1, $2, 0x4342;"
    return gl.inline_asm_elementwise(BYTES, "=r,r,r", [codes, exponent], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def pair_of(codes, exponent, PAIR: gl.constexpr, MIDDLE: gl.constexpr, SHRINK: gl.constexpr, DTYPE: gl.constexpr):
    """Return ``(code - MIDDLE) SHRINK`` of bytes 2 PAIR and 2 PAIR + 1 of each word, exactly, two numbers an int32."""
    factor = gl.full_like(codes, packed_pair(SHRINK, DTYPE))
    shift = gl.full_like(codes, packed_pair(-(base_of(DTYPE) + MIDDLE) * SHRINK, DTYPE))
    return fma_pairs(raised_pair(codes, exponent, PAIR), factor, shift, DTYPE)


@gluon.jit
def joined_pair(fields, exponent, PAIR: gl.constexpr, DTYPE: gl.constexpr):
    """Return ``code - 128`` of codes in halves: ``16 (high - 16) + (128 + low)``, exact in bfloat16."""
    high = pair_of(fields[0], exponent, PAIR, 16, 1.0, DTYPE)
    factor = gl.full_like(fields[0], packed_pair(16.0, DTYPE))
    return fma_pairs(high, factor, raised_pair(fields[1], exponent, PAIR), DTYPE)


@gluon.jit
def scaled(pair, size, shift, DTYPE: gl.constexpr):
    """Return ``pair size + shift``, rounded once: int32 [R, 4] of two numbers each -> DTYPE [R, 4, 2]."""
    FMA: gl.constexpr = assembly("fma.rn.16x2 $0, $1, $3, $5;", DTYPE)
    args = [gl.join(pair, pair), gl.join(size, size), gl.join(shift, shift)]
    if gl.bfloat16 == DTYPE:
        both = gl.inline_asm_elementwise(FMA, "=r,r,r,r,r,r,r", args, dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        both = gl.inline_asm_elementwise(FMA, "=r,r,r,r,r,r,r", args, dtype=gl.float16, is_pure=True, pack=2)
    return both


@gluon.jit
def weights_of(fields, exponent, grid, PAIR: gl.constexpr, COUNT: gl.constexpr, DTYPE: gl.constexpr):
    """Return the weights of bytes 2 PAIR and 2 PAIR + 1 of each word, DTYPE [R, 4, 2]."""
    size, shift = grid
    if in_halves(COUNT, DTYPE):
        pair = joined_pair(fields, exponent, PAIR, DTYPE)
    else:
        pair = pair_of(fields[0], exponent, PAIR, middle_of(COUNT), 1.0 / power_of(COUNT), DTYPE)
    return scaled(pair, size, shift, DTYPE)


@gluon.jit
def in_pairs(value, DTYPE: gl.constexpr):
    """Round float32 to DTYPE and return it twice, as int32."""
    TWICE: gl.constexpr = assembly("cvt.rn.16x2.f32 $0, $1, $1;", DTYPE)
    return gl.inline_asm_elementwise(TWICE, "=r,f", [value], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def grid_of(scale, zero, COUNT: gl.constexpr, DTYPE: gl.constexpr):
    """Return what `operand` takes of a group: the factor of a code, and what is added to it, in pairs.

    Numerics: both are rounded to DTYPE. The second is small, since zero points lie about the middle of the codes.
    """
    POWER: gl.constexpr = power_of(COUNT)
    size = scale.to(gl.float32)
    centre = gl.fma(zero.to(gl.float32), 1.0 * POWER, 0.5 * POWER - 0.5)
    step = size * (1.0 / POWER)
    return in_pairs(step * shrink_of(COUNT, DTYPE), DTYPE), in_pairs((middle_of(COUNT) - centre) * step, DTYPE)


@gluon.jit
def operand(fields, exponent, grid, LAYOUT: gl.constexpr, COUNT: gl.constexpr, DTYPE: gl.constexpr):
    """Return weights of 16 columns as operand A, DTYPE [rows, 16], from four codes a lane; no value changes lanes.

    Shapes: fields int32 [rows, 4], one word of a quad's lane; exponent and the two of `grid_of` the same.
    """
    first = weights_of(fields, exponent, grid, 0, COUNT, DTYPE)
    second = weights_of(fields, exponent, grid, 1, COUNT, DTYPE)
    octet = gl.join(first, second)  # [rows, t, b, h]
    columns = gl.reshape(gl.permute(octet, (0, 3, 1, 2)), [first.shape[0], 16])
    return gl.convert_layout(columns, LAYOUT, assert_trivial=True)


@gluon.jit
def split_words(words, WARPS: gl.constexpr):
    """Split a lane's words of 128 columns, [rows, 8]; int32 [rows, 4] for the first 64 places and for the rest."""
    EACH: gl.constexpr = word_layout(4, WARPS)
    even, odd = gl.split(gl.reshape(words, [words.shape[0], 4, 2]))
    return gl.convert_layout(even, EACH, assert_trivial=True), gl.convert_layout(odd, EACH, assert_trivial=True)


@gluon.jit
def group_offsets(first_row, n_rows, GROUP: gl.constexpr, K_PADDED: gl.constexpr, WARPS: gl.constexpr):
    """Return where the groups of each row's first 128 columns are, int64 [rows, 4], one for each lane of a quad."""
    LAYOUT: gl.constexpr = word_layout(4, WARPS)
    row = gl.minimum(first_row + gl.arange(0, 16 * WARPS, gl.SliceLayout(1, LAYOUT)), n_rows - 1)
    group = 32 * gl.arange(0, 4, gl.SliceLayout(0, LAYOUT)) // GROUP
    return row.to(gl.int64)[:, None] * (K_PADDED // GROUP) + group[None, :]


@gluon.jit
def load_groups(at, step, GROUP: gl.constexpr, K_PADDED: gl.constexpr, WARPS: gl.constexpr):
    """Load a step's scales or zero points, [rows, 4]: a quad's lane has columns of one group; 0 past the last one."""
    column = step * 128 + 32 * gl.arange(0, 4, gl.SliceLayout(0, word_layout(4, WARPS)))
    if K_PADDED % 128 == 0:
        values = gl.load(at + step * (128 // GROUP))
    else:
        values = gl.load(at + step * (128 // GROUP), mask=(column < K_PADDED)[None, :], other=0.0)
    return values
