"""Activations in fixed point, and where their bytes lie: written by `route_quantize`, read by lanes or warpgroups."""

import triton
import triton.language as tl

from mobiquant_compiler.codegen import fragments


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


@triton.constexpr_function
def part_words(group):
    """Return how many words of a quarter of a group a lane loads at a time."""
    return min(4, group // 16)


@triton.jit
def words_of_bytes(xi, GROUP: tl.constexpr):
    """Join the low bytes of four columns to a word, the first lowest; int32 [B, GROUP] -> [B, 4, parts, words]."""
    WORDS: tl.constexpr = part_words(GROUP)
    parts = tl.reshape(xi & 255, [xi.shape[0], 4, GROUP // 16 // WORDS, WORDS, 4])
    return tl.sum(parts << (8 * tl.arange(0, 4))[None, None, None, None, :], axis=4)


@triton.jit
def activation_places(offs_g, token, blocks, GROUP: tl.constexpr):
    """Return where each word of a token's groups goes among quantized bytes, in the order lanes load them.

    Words are ordered by group, block of eight tokens, part of at most four words a lane, lane (token in the block times
    four plus place in its quad), word. The lane at place t takes quarter `fragments.quarter_of_lane(t)` of the group.

    Shapes: offs_g [B]; token and blocks scalars; returns int64 [B, 4 quarters, parts, words].
    """
    WORDS: tl.constexpr = part_words(GROUP)
    PARTS: tl.constexpr = GROUP // 16 // WORDS
    # Which place takes a quarter is its own inverse: quarters 1 and 2 change places.
    lane = (token % 8) * 4 + fragments.quarter_of_lane(tl.arange(0, 4))
    within = (tl.arange(0, PARTS)[None, :] * 32 + lane[:, None]) * WORDS
    within = within[:, :, None] + tl.arange(0, WORDS)[None, None, :]
    return ((offs_g.to(tl.int64) * blocks + token // 8) * (2 * GROUP))[:, None, None, None] + within[None, :, :, :]


@triton.jit
def row_places(offs_g, token, blocks, GROUP: tl.constexpr, HALVES: tl.constexpr):
    """Return where each word of a token's groups goes where tokens are rows of 128 columns, high halves first.

    Words are ordered by 128 columns, half, token, group, place in a quarter of it, quarter: as products of warpgroups
    read them (`batch_operands`).

    Shapes: as `activation_places`; those of low halves are ``256 blocks`` further on.
    """
    WORDS: tl.constexpr = part_words(GROUP)
    span = offs_g.to(tl.int64) * GROUP // 128
    row = span * (HALVES * 8) * blocks + token
    word = row * 32 + (offs_g * GROUP % 128) // 4
    place = tl.arange(0, GROUP // 16) * 4
    within = tl.arange(0, 4)[:, None] + place[None, :]
    within = tl.reshape(within, [4, GROUP // 16 // WORDS, WORDS])
    return word[:, None, None, None] + within[None, :, :, :]


@triton.jit
def place_of(counts_ptr, token, tokens):
    """Return a token's place among the 64 around it, those of most slices first, and its slice count.

    So tokens of the same count are neighbours, and tiles have few counts each.
    """
    first = token // 64 * 64
    others = first + tl.arange(0, 64)
    there = others < tokens
    counts = tl.load(counts_ptr + tl.minimum(others, tokens - 1))
    own = tl.sum(tl.where(others == token, counts, 0), axis=0)
    before = there & ((counts > own) | ((counts == own) & (others < token)))
    return first + tl.sum(before.to(tl.int32), axis=0), own


@triton.jit
def load_activation(ptr, at, lane, GROUP: tl.constexpr, EMULATE: tl.constexpr):
    """Load eight tokens' bytes of one group as `route_quantize` laid them out; returns GROUP / 16 int32 [THREADS]."""
    WORDS: tl.constexpr = GROUP // 16
    if WORDS == 8:
        words = fragments.read_words(ptr + (at * 64 + lane) * 4, 4, EMULATE)
        words = words + fragments.read_words(ptr + (at * 64 + 32 + lane) * 4, 4, EMULATE)
    else:
        words = fragments.read_words(ptr + (at * 32 + lane) * WORDS, WORDS, EMULATE)
    return words


@triton.jit
def load_quarter(ptr, mask, GROUP: tl.constexpr, EMULATE: tl.constexpr):
    """Load one lane's quarter of a group, whose first word ptr points to, zeros where the mask is false.

    One address serves all its loads. Returns GROUP / 16 int32 [THREADS].
    """
    WORDS: tl.constexpr = part_words(GROUP)
    words = ()
    for part in tl.static_range(GROUP // 16 // WORDS):
        words = words + fragments.load_words(ptr + part * (32 * WORDS), mask, WORDS, EMULATE)
    return words
