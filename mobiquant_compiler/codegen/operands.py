"""Packed words to operands of Hopper's tensor cores, in registers: what the fused prefill kernel is made of (Gluon).

A lane of a quad feeds `wgmma` with columns ``2t, 2t + 1, 2t + 8, 2t + 9`` of every 16. In which order columns are
summed is free, so activations are brought into the order in which lanes load words: of 128 columns, lane t has words
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
def offset_of(count):
    """Return the power of two that `as_float` adds to a code."""
    return 8388608.0 if is_wide(count) else 128.0


@gluon.constexpr_function
def power_of(count):
    """Return the power of two by which the step of `count` slices is smaller than the base step."""
    return 1 << (2 * count - 2)


@gluon.constexpr_function
def float_assembly(byte, count):
    """Return the instruction that puts byte `byte` of a word into the mantissa of `offset_of(count)`."""
    # 0x4B0000QQ is 2**23 + Q; 0x43QQ0000 is 2**7 + Q, for codes of seven bits at most.
    selector = 0x4550 + byte if is_wide(count) else 0x4055 + 256 * byte
    return f"prmt.b32 $0, $1, $2, {selector};"


@gluon.jit
def exponent_of(n_rows, like, COUNT: gl.constexpr):
    """Return the top byte of `offset_of(COUNT)` for `as_float`, int32 in the layout of `like`.

    It depends, as far as the compiler can see, on `n_rows` (never negative): of two constants `prmt` takes the wrong
    one from a register, and copies it there each time.
    """
    BYTE: gl.constexpr = 0x4B if COUNT == 4 else 0x43
    return gl.zeros_like(like) + ((n_rows >> 31) ^ BYTE)


@gluon.jit
def as_float(codes, exponent, BYTE: gl.constexpr, COUNT: gl.constexpr):
    """Return ``offset_of(COUNT) + code`` of byte BYTE of each word, float32, exactly; one instruction."""
    return gl.inline_asm_elementwise(
        float_assembly(BYTE, COUNT), "=f,r,r", [codes, exponent], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def even_pairs(above, below):
    """Join fields of two bits of two words to fields of four, at places 0 and 2 of each byte."""
    return ((above << 2) & -0x33333334) | (below & 0x33333333)


@gluon.jit
def odd_pairs(above, below):
    """Join fields of two bits of two words to fields of four, at places 1 and 3 of each byte."""
    return (above & -0x33333334) | ((below >> 2) & 0x33333333)


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
def weight_of(codes, exponent, step, centre, BYTE: gl.constexpr, COUNT: gl.constexpr):
    """Return ``s_c (Q_c - Z_c)`` of byte BYTE of each word in float32, given ``centre_of(Z_c)``."""
    value = as_float(codes, exponent, BYTE, COUNT)
    if is_wide(COUNT):
        value = value - offset_of(COUNT)
    return (value - centre) * step


@gluon.jit
def centre_of(zero, COUNT: gl.constexpr):
    """Return what `weight_of` subtracts from a code: Z_c, and what `as_float` added where that loses nothing.

    Numerics: ``2**7 + Z_c`` keeps bits down to 2**-16: a float16 zero point of 2**-6 or more is subtracted exactly, a
    smaller one to 2**-17 of a step, far below the rounding to bfloat16. At ``2**23`` nothing would be left, so there
    the two are subtracted one after the other.
    """
    power: gl.constexpr = power_of(COUNT)
    shift: gl.constexpr = (power - 1) / 2 + (0.0 if is_wide(COUNT) else offset_of(COUNT))
    return zero * power + shift


@gluon.jit
def operand(codes, exponent, step, centre, LAYOUT: gl.constexpr, COUNT: gl.constexpr, DTYPE: gl.constexpr):
    """Return weights of 16 columns as operand A, DTYPE [rows, 16], from four codes a lane; no value changes lanes.

    Shapes: codes int32 [rows, 4], one word of a quad's lane; exponent, step and centre the same.
    """
    first = gl.join(
        weight_of(codes, exponent, step, centre, 0, COUNT), weight_of(codes, exponent, step, centre, 1, COUNT)
    )
    second = gl.join(
        weight_of(codes, exponent, step, centre, 2, COUNT), weight_of(codes, exponent, step, centre, 3, COUNT)
    )
    octet = gl.join(first.to(DTYPE), second.to(DTYPE))  # [rows, t, b, h]
    columns = gl.reshape(gl.permute(octet, (0, 3, 1, 2)), [codes.shape[0], 16])
    return gl.convert_layout(columns, LAYOUT, assert_trivial=True)


@gluon.jit
def word_offsets(first_row, n_rows, K_PADDED: gl.constexpr, WARPS: gl.constexpr):
    """Return where the first eight words of each row are, int64 [rows, 8]; rows past the last are the last again."""
    LAYOUT: gl.constexpr = word_layout(8, WARPS)
    row = gl.minimum(first_row + gl.arange(0, 16 * WARPS, gl.SliceLayout(1, LAYOUT)), n_rows - 1)
    return row.to(gl.int64)[:, None] * (K_PADDED // 16) + gl.arange(0, 8, gl.SliceLayout(0, LAYOUT))[None, :]


@gluon.jit
def group_offsets(first_row, n_rows, GROUP: gl.constexpr, K_PADDED: gl.constexpr, WARPS: gl.constexpr):
    """Return where the groups of each row's first 128 columns are, int64 [rows, 4], one for each lane of a quad."""
    LAYOUT: gl.constexpr = word_layout(4, WARPS)
    row = gl.minimum(first_row + gl.arange(0, 16 * WARPS, gl.SliceLayout(1, LAYOUT)), n_rows - 1)
    group = 32 * gl.arange(0, 4, gl.SliceLayout(0, LAYOUT)) // GROUP
    return row.to(gl.int64)[:, None] * (K_PADDED // GROUP) + group[None, :]


@gluon.jit
def load_words(at, unit, step, K_PADDED: gl.constexpr, COUNT: gl.constexpr, WARPS: gl.constexpr):
    """Load a step's words of COUNT slices: two tuples of int32 [rows, 4], for the first and the second 64 places.

    Args: at, pointers [rows, 8] to the first words of the base slice; unit, words from one slice to the next.
    """
    EACH: gl.constexpr = word_layout(4, WARPS)
    first = ()
    second = ()
    place = step * 8 + gl.arange(0, 8, gl.SliceLayout(0, word_layout(8, WARPS)))
    for index in gl.static_range(COUNT):
        if K_PADDED % 128 == 0:
            words = gl.load(at + index * unit + step * 8)
        else:
            words = gl.load(at + index * unit + step * 8, mask=(place < K_PADDED // 16)[None, :], other=0)
        even, odd = gl.split(gl.reshape(words, [words.shape[0], 4, 2]))
        first = first + (gl.convert_layout(even, EACH, assert_trivial=True),)
        second = second + (gl.convert_layout(odd, EACH, assert_trivial=True),)
    return first, second


@gluon.jit
def load_groups(at, step, GROUP: gl.constexpr, K_PADDED: gl.constexpr, WARPS: gl.constexpr):
    """Load a step's scales or zero points, [rows, 4]: a quad's lane has columns of one group; 0 past the last one."""
    column = step * 128 + 32 * gl.arange(0, 4, gl.SliceLayout(0, word_layout(4, WARPS)))
    if K_PADDED % 128 == 0:
        values = gl.load(at + step * (128 // GROUP))
    else:
        values = gl.load(at + step * (128 // GROUP), mask=(column < K_PADDED)[None, :], other=0.0)
    return values
