"""Packing: round trips, the slow definition, and layouts that must tell the same codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mobiquant_compiler.packing import (
    byte_mask,
    interleave,
    pack,
    pack_reference,
    unit_views,
    units,
    unpack,
    unpack_interleaved,
)
from mobiquant_compiler.spec import SLICE_WIDTHS, Layout, SliceSpec


def specs(layout: Layout, one_width: bool = False) -> st.SearchStrategy[SliceSpec]:
    """Draw any legal spec of a layout."""
    legal = st.sampled_from(SLICE_WIDTHS[layout])
    if one_width:
        widths = legal.flatmap(lambda b: st.integers(1, 8 // b).map(lambda n: (b,) * n))
    else:
        widths = st.lists(legal, min_size=1, max_size=8).filter(lambda w: sum(w) <= 8).map(tuple)
    return st.builds(SliceSpec, widths, st.sampled_from([32, 64, 128]), st.just(layout))


ANY_SPEC = st.one_of(specs(Layout.SLICE_MAJOR), specs(Layout.BIT_MAJOR))


def codes_for(spec: SliceSpec, n: int, groups: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**spec.total_bits, (n, groups * spec.group), generator=generator, dtype=torch.uint8)


@given(spec=ANY_SPEC, n=st.integers(1, 5), groups=st.integers(1, 3), seed=st.integers(0, 1 << 30))
def test_unpack_undoes_pack_at_every_count(spec, n, groups, seed):
    codes = codes_for(spec, n, groups, seed)
    packed = pack(codes, spec)
    assert packed.dtype == torch.int32
    assert packed.shape == spec.packed_shape(n, codes.shape[1])
    for count in range(1, spec.num_slices + 1):
        assert torch.equal(unpack(packed, spec, count), codes >> (spec.total_bits - spec.bits(count)))


@given(spec=ANY_SPEC, n=st.integers(1, 3), seed=st.integers(0, 1 << 30))
def test_pack_equals_the_slow_definition(spec, n, seed):
    codes = codes_for(spec, n, 1, seed)
    assert torch.equal(pack(codes, spec), pack_reference(codes, spec))


@given(spec=ANY_SPEC, seed=st.integers(0, 1 << 30))
def test_a_prefix_of_the_tensor_is_a_prefix_of_the_slices(spec, seed):
    codes = codes_for(spec, 2, 1, seed)
    packed = pack(codes, spec)
    for count in range(1, spec.num_slices + 1):
        prefix = packed[: spec.bits(count)].clone()
        assert torch.equal(unpack(prefix, spec, count), unpack(packed, spec, count))


@given(spec=specs(Layout.SLICE_MAJOR), seed=st.integers(0, 1 << 30))
def test_layouts_agree(spec, seed):
    other = SliceSpec(spec.widths, spec.group, Layout.BIT_MAJOR)
    codes = codes_for(spec, 3, 2, seed)
    for count in range(1, spec.num_slices + 1):
        assert torch.equal(unpack(pack(codes, spec), spec, count), unpack(pack(codes, other), other, count))


@given(spec=st.one_of(specs(Layout.SLICE_MAJOR, one_width=True), specs(Layout.BIT_MAJOR)), seed=st.integers(0, 1 << 30))
def test_interleaved_order_is_the_same_for_codes_and_activations(spec, seed):
    codes = codes_for(spec, 3, 2, seed)
    x = torch.randint(-9, 9, (4, codes.shape[1])).double()  # integers: sums are exact in any order
    packed = pack(codes, spec)
    for count in range(1, spec.num_slices + 1):
        views = unit_views(packed, spec, count)
        weight = unpack_interleaved(views, spec.unit).view(3, -1).double()
        wanted = x @ unpack(packed, spec, count).double().t()
        assert torch.equal(interleave(x, spec) @ weight.t(), wanted)


def test_first_code_sits_where_the_design_says():
    slices, bits = SliceSpec((2, 2), 32), SliceSpec((3,), 32, Layout.BIT_MAJOR)
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 4 * 1 + 2] = 0b1101  # k = 16 w + 4 i + j with w = 0, i = 1, j = 2: bits 8 j + 2 i
    packed = pack(codes, slices)
    assert packed[0, 0, 0] == 0b11 << (8 * 2 + 2 * 1)
    assert packed[2, 0, 0] == 0b01 << (8 * 2 + 2 * 1)
    codes[0, 6] = 0b100  # plane 0 is the most significant bit; k = 4 i + j at bit 8 j + i
    assert pack(codes, bits)[:, 0, 0].tolist() == [1 << (8 * 2 + 1), 0, 0]


def test_units_and_masks():
    assert units(SliceSpec((3, 2), 32, Layout.BIT_MAJOR), 2) == [1] * 5
    assert units(SliceSpec((4, 2), 32), 2) == [4, 2]
    assert [byte_mask(width) for width in (1, 2, 4)] == [0x01010101, 0x03030303, 0x0F0F0F0F]


@pytest.mark.parametrize("layout", list(Layout))
def test_the_top_bit_of_a_word_survives_int32(layout):
    spec = SliceSpec((2, 2, 2, 2), 32, layout)
    codes = torch.full((1, 32), 255, dtype=torch.uint8)
    packed = pack(codes, spec)
    assert (packed == -1).all()
    assert torch.equal(packed, pack_reference(codes, spec))
    assert torch.equal(unpack(packed, spec, 4), codes)
