"""Which kernels go from tile to tile with words ahead, what memory that takes, and how many programs there are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mobiquant_compiler.codegen import configs, rings
from mobiquant_compiler.codegen.configs import Target, TokenClass, kernel_spec
from mobiquant_compiler.codegen.specialise import specialise
from mobiquant_compiler.errors import BadKernelSpec
from mobiquant_compiler.launches import Launch, kernels_of
from mobiquant_compiler.runtime import launch
from mobiquant_compiler.runtime.launch import Prepared, Weight
from mobiquant_compiler.spec import Family, KernelSpec, Layout, SliceSpec
from tests.unit.test_launch import Notes

H100, SPEC = Target.of(90), SliceSpec((2, 2, 2, 2), 128)
ROWS, COLUMNS = 14336, 4096


def chosen(spec: SliceSpec = SPEC, k: int = COLUMNS, target: Target = H100, tokens: int = 8, **options) -> KernelSpec:
    """Return the kernel of the table, for rows enough."""
    return kernel_spec(Family.SLICED_MMA, spec, k, TokenClass.of(tokens), target, **{"n": ROWS} | options)


@pytest.mark.parametrize("tokens", [2, 8])
def test_few_tokens_of_many_rows(tokens: int) -> None:
    for k in (3000, COLUMNS, 8192):
        for widths in ((2,), (2, 2), (2, 2, 2, 2)):
            spec = chosen(SliceSpec(widths, 128), k, tokens=tokens, parts=3, has_bias=True)
            assert (spec.num_stages, spec.num_warps, spec.block_n) == (2, 8, 16)
            assert configs.fits(spec, H100)


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 1},
        {"tokens": 9},
        {"n": 32 * 132},
        {"n": 0},
        {"k": 2048},
        {"k": 8320},
        {"k": 17 * 128},
        {"k": 8192, "scale_bytes": 4},
        {"spec": SliceSpec((2, 2, 2, 2), 64)},
        {"spec": SliceSpec((2, 2), 128, Layout.BIT_MAJOR)},
        {"spec": SliceSpec((4, 4), 128)},
        {"spec": SliceSpec((2, 2), 128), "k": 8192, "scale_bytes": 4},
        {"target": Target.of(80)},
        {"target": Target.of(100)},
        {"emulate": True},
    ],
    ids=str,
)
def test_others_have_a_program_for_each_tile(options: dict) -> None:
    """One step a tile, scales that are not whole copies or more than there are threads, and what was not measured."""
    assert chosen(**options).num_stages == 1


@pytest.mark.parametrize(
    ("size", "columns"),
    [(2, {3072, 4096, 5120, 6144, 7168, 8192}), (4, {2560, 3072, 3584, 4096}), (8, set())],
)
def test_columns_whose_scales_are_whole_copies(size: int, columns: set[int]) -> None:
    assert {k for k in range(128, 9000, 128) if chosen(k=k, scale_bytes=size).num_stages == 2} == columns


@pytest.mark.parametrize(
    "change",
    [
        {"group": 64},
        {"layout": Layout.BIT_MAJOR},
        {"widths": (4, 4)},
        {"k": 2048},
        {"block_m": 16},
        {"block_m": 1},
        {"block_n": 32, "row_tiles": 2},
        {"emulate": True},
        {"num_stages": 3},
    ],
    ids=str,
)
def test_what_rings_would_compute_wrongly_is_refused(change: dict) -> None:
    with pytest.raises(BadKernelSpec, match="sliced_mma"):
        specialise(replace(chosen(), **change))


def test_more_than_a_block_of_tokens_is_no_launch() -> None:
    prepared = Prepared(torch.ones(9, dtype=torch.int32), *[torch.empty(0)] * 3, (9,), COLUMNS, torch.float32)
    with pytest.raises(AssertionError, match="one block of tokens"):
        launch.multiply(Notes(chosen()), replace(prepared, high=torch.empty(0, dtype=torch.int8)), [])


def test_scales_of_32_bits_have_room_beside_4096_columns() -> None:
    assert chosen(scale_bytes=4).num_stages == 2


def test_memory_is_what_the_kernel_lays_out() -> None:
    for slices in (1, 2, 3, 4):
        for groups, size in ((24, 2), (32, 2), (64, 2), (24, 4), (32, 4)):
            sums, facts, end = rings.places(slices, groups, size)
            sides = (facts - sums) // 4096
            assert sides in (1, 2)
            assert end == configs.ring_bytes(slices, groups, size) + 4096 * (sides - 1)
            assert end <= 48 * 1024, "what a kernel may declare"
            assert sums % 16 == facts % 16 == rings.facts_bytes(groups, size) % 16 == 0, "copies of 16 bytes"


@pytest.mark.parametrize(
    ("rows", "at_once", "programs"), [((4333,), None, 264), ((40, 33), None, 6), ((1000, 7), 5, 5)]
)
def test_programs_are_as_many_as_run_at_a_time(rows: tuple[int, ...], at_once: int | None, programs: int) -> None:
    kernel = Notes(chosen(SliceSpec((2,), 128), parts=len(rows)))
    ones = torch.ones(8, dtype=torch.int32)
    halves = torch.empty(32, 1, 32, 32, dtype=torch.int8)
    prepared = Prepared(ones, halves, halves, torch.empty(32, 8, 2), (8,), COLUMNS, torch.float32)
    scales = torch.ones(1, 32)
    weights = [Weight(torch.empty(2, n, 128, dtype=torch.int32), scales, scales, None) for n in rows]
    launch.multiply(kernel, prepared, weights, at_once=at_once)
    ((grid, _),) = kernel.launches
    assert grid == (1, programs)


@pytest.mark.parametrize(("scales", "stages"), [(torch.float16, 2), (torch.float32, 1)])
def test_a_launch_is_warmed_with_the_kernel_that_it_takes(scales: torch.dtype, stages: int) -> None:
    wanted = Launch(SPEC, ROWS, 8192, torch.device("cuda"), torch.bfloat16, scales)
    (found,) = (
        spec for spec in kernels_of(wanted, H100, [TokenClass.FEW], workspace=False) if spec.family is Family.SLICED_MMA
    )
    assert found.num_stages == stages
