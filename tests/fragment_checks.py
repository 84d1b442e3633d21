"""Jitted functions of `codegen` alone, against plain integers: the same checks in the interpreter and on a device.

Kernels here have one warp, one element of a tensor a lane, as `codegen.fragments` wants it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mobiquant_compiler.codegen import device, fragments
from mobiquant_compiler.packing import unpack
from mobiquant_compiler.spec import SliceSpec
from tests.kernel_cases import random_case

LANES = 32
QUARTERS = (0, 2, 1, 3)  # which quarter of a group the lanes of a quad hold
ROWS = 8


@triton.jit
def tile_kernel(a_ptr, b_ptr, c_ptr, EMULATE: tl.constexpr):
    lane = tl.arange(0, 32)
    codes = ()
    for j in tl.static_range(4):
        codes = codes + (tl.load(a_ptr + j * 32 + lane),)
    b0, b1 = tl.load(b_ptr + lane), tl.load(b_ptr + 32 + lane)
    c0, c1, c2, c3 = (
        tl.load(c_ptr + lane),
        tl.load(c_ptr + 32 + lane),
        tl.load(c_ptr + 64 + lane),
        tl.load(c_ptr + 96 + lane),
    )
    c0, c1, c2, c3 = fragments.multiply_tile(codes, b0, b1, c0, c1, c2, c3, EMULATE)
    tl.store(c_ptr + lane, c0)
    tl.store(c_ptr + 32 + lane, c1)
    tl.store(c_ptr + 64 + lane, c2)
    tl.store(c_ptr + 96 + lane, c3)


@triton.jit
def split_kernel(words_ptr, out_ptr, HALF: tl.constexpr, EMULATE: tl.constexpr):
    lane = tl.arange(0, 32)
    words = ()
    for j in tl.static_range(2 * HALF):
        words = words + (tl.load(words_ptr + j * 32 + lane),)
    first, second = fragments.split_between_groups(words, lane % 4 >= 2, HALF, EMULATE)
    for j in tl.static_range(HALF):
        tl.store(out_ptr + j * 32 + lane, first[j])
        tl.store(out_ptr + (HALF + j) * 32 + lane, second[j])


@triton.jit
def load_kernel(ptr, out_ptr, limit, COUNT: tl.constexpr, HOW: tl.constexpr, EMULATE: tl.constexpr):
    lane = tl.arange(0, 32)
    if HOW == "masked":
        words = fragments.load_words(ptr + lane * COUNT, lane < limit, COUNT, EMULATE)
    elif HOW == "stream":
        words = fragments.stream_words(ptr + lane * COUNT, COUNT, EMULATE)
    else:
        words = fragments.read_words(ptr + lane * COUNT, COUNT, EMULATE)
    for j in tl.static_range(COUNT):
        tl.store(out_ptr + lane * COUNT + j, words[j])


@triton.jit
def half_kernel(ptr, out_ptr, limit, EMULATE: tl.constexpr):
    lane = tl.arange(0, 32)
    tl.store(out_ptr + lane, fragments.load_half(ptr + lane, lane < limit, EMULATE).to(tl.int32))


@triton.jit
def select_kernel(above_ptr, below_ptr, out_ptr, KEEP: tl.constexpr, EMULATE: tl.constexpr):
    lane = tl.arange(0, 32)
    bits = fragments.select_bits(tl.load(above_ptr + lane), tl.load(below_ptr + lane), KEEP, EMULATE)
    tl.store(out_ptr + lane, bits)


@triton.jit
def order_kernel(parts_ptr, out_ptr, M: tl.constexpr, W: tl.constexpr):
    column = tl.arange(0, M)
    parts = tl.load(parts_ptr + tl.arange(0, W)[None, :] * M + column[:, None])
    tl.store(out_ptr + column, fragments.sum_neighbours(parts))


@triton.jit
def join_kernel(words_ptr, out_ptr, WIDTH: tl.constexpr, COUNT: tl.constexpr, EMULATE: tl.constexpr):
    lane = tl.arange(0, 32)
    words = ()
    for j in tl.static_range(COUNT):
        words = words + (tl.load(words_ptr + j * 32 + lane),)
    joined = device.join_units(words, WIDTH, COUNT, EMULATE)
    for j in tl.static_range(COUNT):
        tl.store(out_ptr + j * 32 + lane, joined[j])


@triton.jit
def codes_kernel(
    slices_ptr,
    out_ptr,
    n_rows,
    pair,
    COUNT: tl.constexpr,
    WIDTHS: tl.constexpr,
    LAYOUT: tl.constexpr,
    GROUP: tl.constexpr,
    K_PADDED: tl.constexpr,
    TOGETHER: tl.constexpr,
    EMULATE: tl.constexpr,
):
    lane = tl.arange(0, 32)
    row = lane // 4
    t = lane % 4
    words = ()
    for index in tl.static_range(COUNT):
        for part in tl.static_range(device.unit_count(WIDTHS, LAYOUT, index)):
            words = words + (
                device.load_pair(
                    slices_ptr,
                    row,
                    pair,
                    t,
                    row < n_rows,
                    n_rows,
                    index,
                    part,
                    WIDTHS,
                    LAYOUT,
                    GROUP,
                    K_PADDED,
                    True,
                    EMULATE,
                ),
            )
    if TOGETHER:
        codes = device.combined_codes(words, t, 0, -1, COUNT, 2 * GROUP, WIDTHS, LAYOUT, EMULATE)
    else:
        split = device.split_words(words, t, COUNT, WIDTHS, LAYOUT, GROUP, 1, EMULATE)
        codes = device.combined_codes(split, t, 0, 0, COUNT, GROUP, WIDTHS, LAYOUT, EMULATE)
        codes = codes + device.combined_codes(split, t, 0, 1, COUNT, GROUP, WIDTHS, LAYOUT, EMULATE)
    for j in tl.static_range(GROUP // 8):
        tl.store(out_ptr + j * 32 + lane, codes[j])


def random_words(*shape: int, where: str, seed: int = 0) -> Tensor:
    """Return words of random bits."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=g).to(torch.int32).to(where)


def bytes_of(words: Tensor, signed: bool) -> Tensor:
    """Return the bytes of words, lowest first, in a dimension of their own; int64."""
    return words.cpu().contiguous().view(torch.int8 if signed else torch.uint8).view(*words.shape, 4).long()


def check_tile_products(where: str, emulate: bool) -> None:
    """Compare a product of 16 x 32 unsigned and 32 x 8 signed bytes, on top of what was there."""
    a, b = random_words(4, LANES, where=where, seed=1), random_words(2, LANES, where=where, seed=2)
    c = random_words(4, LANES, where=where, seed=3) >> 4
    before = c.clone()
    tile_kernel[(1,)](a, b, c, emulate, num_warps=1)
    lane_bytes = bytes_of(a, signed=False).view(4, 8, 4, 4)  # [register, g, t, byte]
    left = torch.empty(2, 8, 2, 4, 4, dtype=torch.int64)  # [row half, g, depth half, t, byte]
    for register in range(4):
        left[register % 2, :, register // 2] = lane_bytes[register]
    right = bytes_of(b, signed=True).view(2, 8, 4, 4).permute(1, 0, 2, 3).reshape(8, 32)  # [column, depth]
    product = left.view(16, 32) @ right.t()
    added = product.view(2, 8, 4, 2).permute(0, 3, 1, 2).reshape(4, LANES)  # [row half, column parity, g, t]
    assert torch.equal(c.cpu().long(), before.cpu().long() + added)


def check_split_between_groups(half: int, where: str, emulate: bool) -> None:
    """Follow words of which each says group, quarter and number."""
    words = torch.empty(2 * half, LANES, dtype=torch.int32)
    for lane in range(LANES):
        quad, t = divmod(lane, 4)
        for j in range(2 * half):
            at = t * 2 * half + j  # of the run that the quad reads
            group, quarter, number = at // (4 * half), at // half % 4, at % half
            words[j, lane] = ((quad * 2 + group) * 4 + quarter) * half + number - 17
    out = torch.empty_like(words, device=where)
    split_kernel[(1,)](words.to(where), out, half, emulate, num_warps=1)
    for lane in range(LANES):
        quad, t = divmod(lane, 4)
        for group in range(2):
            wanted = [((quad * 2 + group) * 4 + QUARTERS[t]) * half + number - 17 for number in range(half)]
            assert out[group * half : (group + 1) * half, lane].tolist() == wanted


def check_vector_loads(count: int, where: str, emulate: bool) -> None:
    """Load words with and without a mask; masked ones are zero."""
    words = random_words(LANES * count, where=where)
    for limit in (0, 1, 19, LANES):
        out = torch.empty_like(words)
        load_kernel[(1,)](words, out, limit, count, "masked", emulate, num_warps=1)
        assert torch.equal(out[: limit * count], words[: limit * count])
        assert not out[limit * count :].any()
        halves = words.view(torch.int16)[1 : LANES + 1]  # they need not begin at whole words
        out = torch.empty_like(words[:LANES])
        half_kernel[(1,)](halves, out, limit, emulate, num_warps=1)
        assert torch.equal(out[:limit], halves[:limit].int())
        assert not out[limit:].any()
    for how in ("stream", "read"):
        out = torch.empty_like(words)
        load_kernel[(1,)](words, out, 0, count, how, emulate, num_warps=1)
        assert torch.equal(out, words), how


def check_select_bits(where: str, emulate: bool) -> None:
    """Select bits by masks with and without the sign bit."""
    above, below = random_words(2, LANES, where=where)
    for keep in (0, -1, 0x0F0F0F0F, 0x33333333, 0x55555555):
        out = torch.empty_like(above)
        select_kernel[(1,)](above, below, out, keep, emulate, num_warps=1)
        assert torch.equal(out, (above & ~keep) | (below & keep))


def check_order_of_sums(columns: int, where: str) -> None:
    """Sum numbers of very different size, for which every order gives other bits; a branch may be summed before."""
    g = torch.Generator().manual_seed(columns)
    p = torch.randn(8, columns, generator=g) * torch.exp2(torch.randint(-12, 12, (8, columns), generator=g).float())
    wanted = ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]))
    assert not torch.equal(wanted, (((p[0] + p[1]) + p[2]) + p[3]) + (((p[4] + p[5]) + p[6]) + p[7]))
    while True:
        out = torch.empty(columns, device=where)
        order_kernel[(1,)](p.to(where), out, columns, len(p), num_warps=1)
        assert torch.equal(out.cpu(), wanted), f"{len(p)} parts"
        if len(p) == 1:
            return
        p = p[0::2] + p[1::2]


def check_join_units(width: int, count: int, where: str, emulate: bool) -> None:
    """Compare joined fields, byte by byte and place by place."""
    words = random_words(count, LANES, where=where, seed=width * count)
    out = torch.empty_like(words)
    join_kernel[(1,)](words, out, width, count, emulate, num_warps=1)
    given, joined = bytes_of(words, signed=False), bytes_of(out, signed=False)
    for place in range(8 // width):
        field = torch.zeros_like(given[0])
        for unit in given:  # most significant first
            field = (field << width) | ((unit >> (width * place)) & ((1 << width) - 1))
        wide = width * count
        found = (joined[place % count] >> (wide * (place // count))) & ((1 << wide) - 1)
        assert torch.equal(found, field), f"place {place}"


def check_combined_codes(spec: SliceSpec, count: int, together: bool, where: str, emulate: bool) -> None:
    """Compare the codes of three groups, as pairs of which the second has one, with what packing says."""
    groups, rows = 3, ROWS - 1
    case = random_case(spec, 1, rows, groups * spec.group, seed=count)
    wanted = torch.zeros(ROWS, groups + 1, spec.group, dtype=torch.uint8)
    wanted[:rows, :groups] = unpack(case.slices, spec, count).view(rows, groups, spec.group)
    arguments = (spec.widths, str(spec.layout), spec.group, groups * spec.group)
    spare = device.spare_bits(spec.widths, str(spec.layout), count)
    for pair in range(2):
        out = torch.full((spec.group // 8, LANES), -1, dtype=torch.int32, device=where)
        slices = case.slices.to(where)
        codes_kernel[(1,)](slices, out, rows, pair, count, *arguments, together, emulate, num_warps=1)
        found = bytes_of(out, signed=False) >> spare  # [word, lane, byte]
        assert torch.equal(found << spare, bytes_of(out, signed=False)), "spare bits are 0"
        both = wanted[:, 2 * pair : 2 * pair + 2]
        if together:  # lanes in their order share both groups
            order = both.reshape(ROWS, 4, spec.group // 8, 4)
        else:
            quarters = both.reshape(ROWS, 2, 4, spec.group // 16, 4)[:, :, list(QUARTERS)]
            order = quarters.permute(0, 2, 1, 3, 4).reshape(ROWS, 4, spec.group // 8, 4)
        assert torch.equal(found, order.permute(2, 0, 1, 3).reshape(-1, LANES, 4).long()), f"pair {pair}"
