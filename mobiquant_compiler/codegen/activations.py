"""Where the bytes of quantized activations lie: written by `route_quantize`, read as lanes multiply them."""

import triton
import triton.language as tl

from mobiquant_compiler.codegen import fragments


@triton.jit
def activation_places(offs_g, token, blocks, GROUP: tl.constexpr):
    """Return where each column of a token's groups goes among quantized bytes, in the order lanes load them.

    Bytes are ordered by group, block of eight tokens, part of at most 16 bytes a lane, lane (token in the block times
    four plus place in its quad), byte. The lane at place t takes quarter `fragments.quarter_of_lane(t)` of the group.

    Shapes: offs_g [B]; token and blocks scalars; returns int64 [B, GROUP].
    """
    QUARTER: tl.constexpr = GROUP // 4
    STEP: tl.constexpr = 16 if QUARTER > 16 else QUARTER
    column = tl.arange(0, GROUP)
    quarter = column // QUARTER
    inside = column % QUARTER
    # Which place takes a quarter is its own inverse: quarters 1 and 2 change places.
    lane = (token % 8) * 4 + fragments.quarter_of_lane(quarter)
    within = ((inside // STEP) * 32 + lane) * STEP + inside % STEP
    return ((offs_g.to(tl.int64) * blocks + token // 8) * (32 * QUARTER))[:, None] + within[None, :]


@triton.jit
def load_activation(ptr, at, lane, mask, GROUP: tl.constexpr, EMULATE: tl.constexpr):
    """Load eight tokens' bytes of one group as `route_quantize` laid them out; returns GROUP / 16 int32 [THREADS]."""
    WORDS: tl.constexpr = GROUP // 16
    if WORDS == 8:
        words = fragments.load_words(ptr + (at * 64 + lane) * 4, mask, 4, EMULATE)
        words = words + fragments.load_words(ptr + (at * 64 + 32 + lane) * 4, mask, 4, EMULATE)
    else:
        words = fragments.load_words(ptr + (at * 32 + lane) * WORDS, mask, WORDS, EMULATE)
    return words
