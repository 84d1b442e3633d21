"""Slices: the certain bound, the recursive definition, and groups that have no ordinary range."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mobiquant_compiler import output_bound, slice_bound
from mobiquant_compiler.errors import BadWeightShape, GroupTooLarge, NonFiniteWeight, UnsupportedDtype
from mobiquant_compiler.slices import SlicedWeight, reconstruct, residual_bits, slice_weight
from mobiquant_compiler.spec import Layout, SliceSpec

WIDTHS = [(2, 2, 2, 2), (4, 2, 2), (1, 1, 1, 1, 1, 1, 1, 1), (2,), (4, 4), (1, 2, 4)]
SPECS = st.builds(
    SliceSpec,
    st.sampled_from([*WIDTHS, (3, 3, 2), (3,), (2, 3, 1, 2)]),
    st.sampled_from([32, 64, 128]),
    st.just(Layout.BIT_MAJOR),
)
SCALE_DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def rebuilt(sliced: SlicedWeight, spec: SliceSpec, count: int) -> torch.Tensor:
    """Return ``W_count`` in float64, without the padding."""
    rest = spec.total_bits - spec.bits(count)
    return reconstruct(sliced.codes >> rest, sliced.scale, sliced.zero, spec, count, torch.float64)[:, : sliced.k]


def recursive(weight: torch.Tensor, sliced: SlicedWeight, spec: SliceSpec) -> torch.Tensor:
    """Return the combined codes by the slow definition: base, then the residual of each slice before."""
    k = weight.shape[1]
    scale = sliced.scale.double().repeat_interleave(spec.group, 1)[:, :k]
    zero = sliced.zero.double().repeat_interleave(spec.group, 1)[:, :k]
    base = (weight.double() / scale + zero).round().clamp(0, 2 ** spec.widths[0] - 1)
    residual, combined, step = weight.double() - scale * (base - zero), base, scale
    for width in spec.widths[1:]:
        step = step / 2**width
        code = (torch.floor(residual / step) + 2 ** (width - 1)).clamp(0, 2**width - 1)
        residual = residual - step * (code - (2**width - 1) / 2)
        combined = combined * 2**width + code
    return combined


def within_bound(weight: torch.Tensor, sliced: SlicedWeight, spec: SliceSpec) -> bool:
    """Say whether every weight is within the bound at every slice count; float64 sums may add 1e-9 of it."""
    for count in range(1, spec.num_slices + 1):
        bound = slice_bound(sliced.scale, spec, count).repeat_interleave(spec.group, 1)[:, : sliced.k]
        slack = bound * 1e-9 + weight.double().abs() * 1e-15
        if ((weight.double() - rebuilt(sliced, spec, count)).abs() > bound + slack).any():
            return False
    return True


@given(
    spec=SPECS,
    n=st.integers(1, 5),
    k=st.integers(32, 300),
    exponent=st.integers(-30, 30),
    shift=st.sampled_from([0.0, 0.5, 100.0]),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
    source=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 1 << 30),
)
def test_every_unclipped_weight_is_within_the_bound(spec, n, k, exponent, shift, scale_dtype, source, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = ((torch.randn(n, k, generator=generator) + shift) * 10.0**exponent).to(source)
    sliced = slice_weight(weight, spec, scale_dtype=scale_dtype)
    assert sliced.clipped == 0
    assert sliced.codes.shape == (n, spec.padded(k))
    assert torch.isfinite(sliced.scale).all()
    assert torch.isfinite(sliced.zero).all()
    assert within_bound(weight, sliced, spec)


@given(values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=32, max_size=80), dtype=st.sampled_from(SCALE_DTYPES))
def test_bound_holds_for_any_values_a_search_comes_up_with(values, dtype):
    spec = SliceSpec((2, 2, 2, 2), 32)
    weight = torch.tensor([values], dtype=torch.float32)
    sliced = slice_weight(weight, spec, scale_dtype=dtype)
    assert sliced.clipped == 0
    assert within_bound(weight, sliced, spec)


@given(spec=SPECS, k=st.integers(32, 200), seed=st.integers(0, 1 << 30))
def test_codes_equal_the_recursive_definition(spec, k, seed):
    weight = torch.randn(3, k, generator=torch.Generator().manual_seed(seed))
    sliced = slice_weight(weight, spec)
    assert torch.equal(sliced.codes[:, :k].double(), recursive(weight, sliced, spec))


@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_zero_groups_are_exact_at_every_count(dtype):
    spec = SliceSpec((2, 2, 2, 2), 32)
    weight = torch.randn(4, 96)
    weight[:, 32:64] = 0
    weight[2] = 0
    sliced = slice_weight(weight, spec, scale_dtype=dtype)
    for count in range(1, 5):
        back = rebuilt(sliced, spec, count)
        assert not back[:, 32:64].any()
        assert not back[2].any()
    assert within_bound(weight, sliced, spec)


@pytest.mark.parametrize("value", [1.0, -3.25, 1e-5, 7e4, 1e30])
def test_constant_groups_are_resolved(value):
    spec = SliceSpec((2, 2, 2, 2), 64)
    weight = torch.full((2, 64), value)
    sliced = slice_weight(weight, spec)
    assert sliced.clipped == 0
    assert within_bound(weight, sliced, spec)
    assert ((rebuilt(sliced, spec, 4) - value).abs() <= abs(value) * 1e-3).all()


@pytest.mark.parametrize("value", [3e38, 1e-38, 1e-45])
def test_ends_of_float32_are_within_the_bound(value):
    spec = SliceSpec((2, 2, 2, 2), 32)
    weight = torch.randn(2, 64).clamp(-1, 1) * value
    sliced = slice_weight(weight, spec)
    assert sliced.scale.dtype == torch.float32
    assert sliced.clipped == 0
    assert within_bound(weight, sliced, spec)


def test_scale_leaves_float16_where_it_would_overflow():
    spec = SliceSpec((2, 2), 32)
    assert slice_weight(torch.randn(2, 32), spec).scale.dtype == torch.float16
    assert slice_weight(torch.randn(2, 32) * 1e6, spec).scale.dtype == torch.float32


@pytest.mark.parametrize("k", [33, 100, 127, 129, 200])
def test_padding_columns_hold_zero_and_do_not_stretch_the_grid(k):
    spec = SliceSpec((2, 2, 2, 2), 64)
    weight = torch.rand(3, k) + 5  # far from zero: a padded zero would ruin the range
    sliced = slice_weight(weight, spec)
    assert not sliced.codes[:, k:].any()
    assert float(sliced.scale.max()) < 1
    assert within_bound(weight, sliced, spec)


@given(seed=st.integers(0, 1 << 30), tokens=st.integers(1, 5), k=st.integers(32, 150))
def test_output_bound_is_certain(seed, tokens, k):
    generator = torch.Generator().manual_seed(seed)
    spec = SliceSpec((2, 2, 2, 2), 32)
    weight, x = torch.randn(6, k, generator=generator), torch.randn(tokens, k, generator=generator)
    sliced = slice_weight(weight, spec)
    wanted = x.double() @ weight.double().t()
    for count in range(1, 5):
        error = (x.double() @ rebuilt(sliced, spec, count).t() - wanted).abs()
        bound = output_bound(x, sliced.scale, spec, count)
        assert bound.shape == (tokens, 6)
        assert (error <= bound * (1 + 1e-9)).all()


def test_large_weights_are_cut_into_chunks_without_a_seam(monkeypatch):
    spec, weight = SliceSpec((2, 2), 32), torch.randn(37, 70)
    whole = slice_weight(weight, spec)
    monkeypatch.setattr("mobiquant_compiler.slices._CHUNK", 5 * 96)
    parts = slice_weight(weight, spec)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scale, parts.scale)
    assert torch.equal(whole.zero, parts.zero)


def test_residual_bits_count_from_the_base():
    spec = SliceSpec((4, 2, 1), 32)
    assert [residual_bits(spec, count) for count in (1, 2, 3)] == [0, 2, 3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused_with_their_place(bad):
    weight = torch.randn(4, 64)
    weight[2, 7] = bad
    with pytest.raises(NonFiniteWeight, match=r"layer: weight has 1 non-finite values \(first at row 2, column 7\)"):
        slice_weight(weight, SliceSpec((2, 2), 32), where="layer")


def test_other_dtypes_and_shapes_are_refused():
    spec = SliceSpec((2, 2), 32)
    with pytest.raises(UnsupportedDtype, match=r"torch.int8 cannot become slices"):
        slice_weight(torch.zeros(2, 32, dtype=torch.int8), spec)
    for shape in [(32,), (2, 3, 32), (0, 32), (2, 0)]:
        with pytest.raises(BadWeightShape, match="wanted"):
            slice_weight(torch.zeros(shape), spec)
    with pytest.raises(GroupTooLarge, match="K=16 is smaller than the group 32"):
        slice_weight(torch.zeros(2, 16), spec)


def test_float64_beyond_float32_is_refused():
    with pytest.raises(NonFiniteWeight, match="non-finite"):
        slice_weight(torch.full((2, 32), 1e300, dtype=torch.float64), SliceSpec((2, 2), 32))
