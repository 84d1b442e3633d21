"""Packed words to integer operands of Hopper's tensor cores, in registers: what `batches` multiplies by (Gluon).

A lane of a quad feeds products of 32 columns of bytes with columns ``4 t .. 4 t + 3`` and ``16 + 4 t .. 16 + 4 t + 3``.
In which order columns are summed is free, so a lane has a quarter of a group as it is packed, and activations lie as
`activations.row_places` says: words ``4 j + t`` of a group's bytes are what lane t multiplies by its j-th four codes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mobiquant_compiler.codegen import operands


@gluon.constexpr_function
def columns_layout(tokens, each, warps):
    """Return the layout of [1, tokens * each] numbers, 1 or 2 of a token, as lanes have columns of a product."""
    registers = [[0, 1], [0, 2]] if each == 2 else [[0, 1]]
    registers += [[0, 8 * each << bit] for bit in range((tokens // 8).bit_length() - 1)]
    lanes = [[0, 2 * each], [0, 4 * each], [0, 0], [0, 0], [0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0]] * (warps.bit_length() - 1), [], [1, tokens * each])


@gluon.constexpr_function
def sums_layout(tokens, warps):
    """Return how sums [16 warps, tokens] lie in shared memory: a lane's four of a block side by side, lane by lane."""
    offsets = [[0, 1], [8, 0], [0, 2], [0, 4], [1, 0], [2, 0], [4, 0], *operands.row_bases(warps)]
    return gl.SharedLinearLayout(offsets + [[0, 8 << bit] for bit in range((tokens // 8).bit_length() - 1)])


@gluon.jit
def four_bytes(codes):
    """Return the bytes of words as they lie in the register: int32 [R, 4] -> int8 [R, 4, 4]; no instruction."""
    twice = gl.join(codes, codes)
    wide = gl.reshape(gl.join(twice, twice), [codes.shape[0], 4, 4])
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r,r,r", [wide], dtype=gl.int8, is_pure=True, pack=4)


@gluon.jit
def block_of(near, far):
    """Return codes of 32 columns, int8 [R, 32], from two words of them a lane."""
    both = gl.join(four_bytes(near), four_bytes(far))  # [rows, t, byte, half]
    return gl.reshape(gl.permute(both, (0, 3, 1, 2)), [near.shape[0], 32])


@gluon.jit
def operand(codes, GROUP: gl.constexpr, LAYOUT: gl.constexpr):
    """Return operand A of a group, int8 [R, GROUP], from a lane's words of its codes; no value changes lanes."""
    ROWS: gl.constexpr = codes[0].shape[0]
    if GROUP == 128:
        first = gl.join(block_of(codes[0], codes[1]), block_of(codes[4], codes[5]))
        second = gl.join(block_of(codes[2], codes[3]), block_of(codes[6], codes[7]))
        blocks = gl.permute(gl.join(first, second), (0, 2, 3, 1))
    else:
        blocks = gl.permute(gl.join(block_of(codes[0], codes[1]), block_of(codes[2], codes[3])), (0, 2, 1))
    return gl.convert_layout(gl.reshape(blocks, [ROWS, GROUP]), LAYOUT, assert_trivial=True)


@gluon.jit
def words_of(
    words,
    slot,
    WHICH: gl.constexpr,
    SLICE: gl.constexpr,
    COUNT: gl.constexpr,
    GROUP: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Read a lane's words of one of COUNT slices, of one group of a pair.

    Products take signed bytes: the uppermost bits of codes that need all eight are turned over, which takes 128 away.
    """
    there = words.index(slot * COUNT + SLICE).slice(WHICH * GROUP // 16, GROUP // 16, 1)
    found = there.load(operands.word_layout(GROUP // 16, WARPS))
    if operands.is_wide(COUNT) and SLICE == 0:
        found ^= -0x55555556
    return operands.split_words(found, WARPS) if GROUP == 128 else (found,)


@gluon.jit
def codes_of(
    words,
    slot,
    WHICH: gl.constexpr,
    JOINED: gl.constexpr,
    COUNT: gl.constexpr,
    GROUP: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Read a lane's codes of one group of a pair, of the first JOINED of COUNT slices: words of four codes.

    They are raised to the grid of COUNT slices; those of four are returned less 128.
    """
    column = ()
    for index in gl.static_range(JOINED):
        column = column + (words_of(words, slot, WHICH, index, COUNT, GROUP, WARPS),)
    codes = ()
    for place in gl.static_range(GROUP // 64):
        at = ()
        for index in gl.static_range(JOINED):
            at = at + (column[index][place],)
        codes = codes + operands.join_words(at, JOINED)
    raised = ()
    for index in gl.static_range(len(codes)):
        raised = raised + ((codes[index] << (2 * (COUNT - JOINED)) if COUNT > JOINED else codes[index]),)
    return raised


@gluon.jit
def moved(word, PLACE: gl.constexpr, BIT: gl.constexpr):
    """Return codes of two bits, at PLACE in each byte of words, as bytes with the codes at BIT."""
    MASK: gl.constexpr = 0x03030303 << BIT if BIT < 6 else -0x3F3F3F40
    codes = word << (BIT - 2 * PLACE) if BIT >= 2 * PLACE else word >> (2 * PLACE - BIT)
    return codes & MASK


@gluon.jit
def slice_of(
    words,
    slot,
    WHICH: gl.constexpr,
    SLICE: gl.constexpr,
    COUNT: gl.constexpr,
    GROUP: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Read a lane's codes of one slice of a group of a pair, as `codes_of` does of several."""
    column = words_of(words, slot, WHICH, SLICE, COUNT, GROUP, WARPS)
    codes = ()
    for at in gl.static_range(GROUP // 64):
        for place in gl.static_range(4):
            codes = codes + (moved(column[at], place, 2 * (COUNT - 1 - SLICE)),)
    return codes


@gluon.jit
def facts_of(facts, slot, WHICH: gl.constexpr, TOKENS: gl.constexpr, WARPS: gl.constexpr, LAYOUT: gl.constexpr):
    """Read step and shift of every token for one group of a pair, float32 [1, TOKENS] each."""
    both = facts.index(slot).slice(WHICH, 1, 0).load(columns_layout(TOKENS, 2, WARPS))
    step, shift = gl.split(gl.reshape(both, [TOKENS, 2]))
    step = gl.convert_layout(step, LAYOUT, assert_trivial=True)[None, :]
    return step, gl.convert_layout(shift, LAYOUT, assert_trivial=True)[None, :]


@gluon.jit
def totals_of(totals, slot, WHICH: gl.constexpr, TOKENS: gl.constexpr, WARPS: gl.constexpr, LAYOUT: gl.constexpr):
    """Read the sum of every token's integers in one group of a pair, int32 [1, TOKENS]."""
    found = totals.index(slot).slice(WHICH, 1, 0).load(columns_layout(TOKENS, 1, WARPS))
    return gl.convert_layout(gl.reshape(found, [TOKENS]), LAYOUT, assert_trivial=True)[None, :]
