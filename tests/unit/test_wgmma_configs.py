"""Tiles of the fused prefill kernel: which there are, what they fit, and which a call takes."""

from __future__ import annotations

import pytest

from mobiquant_compiler.codegen import boxes, configs, specialise
from mobiquant_compiler.codegen.configs import Target, fits, wgmma_is_small, wgmma_is_split, wgmma_spec
from mobiquant_compiler.errors import BadKernelSpec, KernelDoesNotFit
from mobiquant_compiler.runtime.fused import takes_columns, takes_slices
from mobiquant_compiler.spec import Layout, SliceSpec

H100 = Target.of(90)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("k", [64, 100, 576, 4096, 14336, 53248])
@pytest.mark.parametrize("widths", [(2,), (2, 2), (2, 2, 2), (2, 2, 2, 2)])
def test_both_tiles_fit_a_hopper(widths: tuple[int, ...], k: int, group: int) -> None:
    for small in (False, True):
        spec = wgmma_spec(SliceSpec(widths, group), k, H100, small=small, row_unit=8, has_bias=True)
        assert fits(spec, H100)
        assert spec.k == SliceSpec(widths, group).padded(k)
        assert spec.block_n == 16 * spec.num_warps * spec.consumers, "a warp has sixteen rows"
        assert boxes.box_of("slices_desc", spec).shape == (spec.block_n, 8), "words of a step"
        specialise.specialise(spec)
        boxes_of = [boxes.box_of(name, spec).shape[0] for name in ("x_desc", "x_half_desc")]
        assert boxes_of == [spec.block_m, spec.block_m // 2]


def test_rows_that_the_copy_engine_cannot_begin_at_are_refused() -> None:
    """An odd number of groups of 32 columns: rows of words begin at odd multiples of eight bytes."""
    spec = SliceSpec((2, 2), 32)
    assert [takes_columns(spec, k) for k in (32, 33, 64, 96, 576)] == [False, True, True, False, True]
    with pytest.raises(BadKernelSpec, match="multiples of 16 bytes"):
        specialise.specialise(wgmma_spec(spec, 96, H100, small=False))


@pytest.mark.parametrize(
    ("widths", "layout"), [((4, 2), "slice_major"), ((1,) * 8, "bit_major"), ((2, 2), "bit_major")]
)
def test_slices_that_the_kernel_does_not_know_are_refused(widths: tuple[int, ...], layout: str) -> None:
    spec = SliceSpec(widths, 64, Layout(layout))
    assert not takes_slices(spec)
    with pytest.raises(BadKernelSpec, match="kernel sliced_wgmma"):
        specialise.specialise(wgmma_spec(spec, 4096, H100, small=False))


def test_stages_of_words_are_counted_as_there_are() -> None:
    sorted_tiles = pytest.importorskip("mobiquant_compiler.codegen.sorted_tiles")
    assert sorted_tiles.WORD_STAGES.value == configs._WORD_STAGES


def test_older_multiprocessors_have_no_room_for_it() -> None:
    with pytest.raises(KernelDoesNotFit, match="sliced_wgmma"):
        wgmma_spec(SliceSpec(), 4096, Target.of(89), small=False)


@pytest.mark.parametrize(
    ("tokens", "n", "k", "slices", "small"),
    [
        (65, 4096, 896, 4, True),
        (256, 4096, 896, 4, True),
        (256, 4096, 896, 1, True),
        (512, 4096, 896, 4, False),
        (1024, 4096, 896, 4, False),
        (128, 28672, 8192, 4, True),
        (256, 28672, 8192, 4, True),
        (256, 28672, 8192, 1, False),
        (256, 14336, 4096, 4, False),
        (65, 4096, 4096, 4, True),
        (256, 4096, 4096, 4, True),
        (256, 4096, 4096, 1, True),
        (512, 4096, 4096, 4, False),
        (1024, 4096, 14336, 4, False),
    ],
)
def test_small_tiles_are_for_few_programs(tokens: int, n: int, k: int, slices: int, small: bool) -> None:
    """As measured on an H100, tokens alike and mixed together, or alike alone where they cannot differ."""
    assert wgmma_is_small(tokens, n, k, slices) is small


def test_weights_of_few_rows_are_split() -> None:
    """Where columns are enough for two parts."""
    assert wgmma_is_split(4096, 14336)
    assert wgmma_is_split(8, 1024)
    assert not wgmma_is_split(4104, 14336)
    assert not wgmma_is_split(8, 896)


def test_what_columns_are_too_few_for_is_refused() -> None:
    with pytest.raises(BadKernelSpec, match="split"):
        wgmma_spec(SliceSpec(), 896, Target.of(90), small=True, split=True)


def test_a_wave_that_is_split_counts_for_its_share() -> None:
    """And what parts take that are added; one that is more than two thirds full counts in full."""
    cost = configs._waves_cost
    assert cost(132, 4096, 40.0, 2.0) == 40.0
    assert cost(132 + 60, 4096, 40.0, 2.0) == 40.0 + 20.0 + 2.0
    assert cost(132 + 88, 4096, 60.0, 2.0) == pytest.approx(60.0 + 40.0 + 4.0)
    assert cost(132 + 89, 4096, 40.0, 2.0) == 80.0
    assert cost(3, 4096, 40.0, 2.0) == 5.0 + 14.0
    assert cost(3, 896, 40.0, 2.0) == 40.0
