"""Which calls have activations in shared memory, what memory that takes, and how many programs there are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mobiquant_compiler import kernels
from mobiquant_compiler.codegen import configs, held_tokens, resident_tiles
from mobiquant_compiler.codegen.configs import Target, TokenClass
from mobiquant_compiler.codegen.resident_configs import multiply_spec
from mobiquant_compiler.codegen.resident_layout import (
    BARRIERS,
    MARK,
    MOST_BYTES,
    RINGS_AT,
    SUMS,
    TAKEN_AT,
    TEAMS,
    ResidentLayout,
)
from mobiquant_compiler.codegen.specialise import specialise
from mobiquant_compiler.errors import BadKernelSpec, KernelDoesNotFit
from mobiquant_compiler.launches import Launch, binaries_of, kernels_of
from mobiquant_compiler.runtime import launch
from mobiquant_compiler.runtime.launch import Prepared, Weight
from mobiquant_compiler.spec import Activation, Family, KernelSpec, Layout, SliceSpec
from tests.unit.test_launch import Notes

H100, SPEC = Target.of(90), SliceSpec((2, 2, 2, 2), 128)
ROWS, COLUMNS = 14336, 4096
RESIDENT = Family.RESIDENT_MMA


def chosen(spec: SliceSpec = SPEC, k: int = COLUMNS, target: Target = H100, tokens: int = 8, **options) -> KernelSpec:
    """Return the kernel of the table, for rows enough."""
    return multiply_spec(spec, k, TokenClass.of(tokens), target, **{"n": ROWS} | options)


@pytest.mark.parametrize("tokens", [2, 8])
def test_few_tokens_of_many_rows(tokens: int) -> None:
    assert chosen(n=32 * 132 + 1, tokens=tokens).family is RESIDENT
    for k in (7168, 8192, 14336, 28672):
        assert chosen(k=k, n=512, tokens=tokens).family is RESIDENT, "long rows, however few"
    for k in (3000, COLUMNS, 8192, 9216, 28672):
        for widths in ((2,), (2, 2), (2, 2, 2, 2)):
            spec = chosen(SliceSpec(widths, 128), k, tokens=tokens, parts=3, has_bias=True)
            assert spec.family is RESIDENT
            assert (spec.parts, spec.has_bias, spec.block_m, spec.k % 128) == (3, True, 8, 0)
            assert configs.fits(spec, H100)


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 1},
        {"tokens": 9},
        {"n": 32 * 132},
        {"n": 0},
        {"k": 6144, "n": 32 * 132},
        {"k": 14336, "n": 511},
        {"k": 2048},
        {"k": 8320},
        {"k": 17 * 128},
        {"k": 29696},
        {"k": 8192, "scale_bytes": 8},
        {"spec": SliceSpec((2, 2, 2, 2), 64)},
        {"spec": SliceSpec((2, 2), 128, Layout.BIT_MAJOR)},
        {"spec": SliceSpec((4, 4), 128)},
        {"target": Target.of(80)},
        {"target": Target.of(100)},
        {"emulate": True},
        {"gluon": False},
    ],
    ids=str,
)
def test_others_have_a_program_for_each_tile(options: dict) -> None:
    """One step a tile, scales that are not whole copies, no room, what was not measured, and no Gluon."""
    spec = chosen(**options)
    assert spec.family is Family.SLICED_MMA
    assert spec.emulate == options.get("emulate", False)


@pytest.mark.parametrize(
    ("size", "activation", "columns"),
    [
        (2, "a16", {*range(3072, 28673, 1024)}),
        (4, "a16", {*range(2560, 22017, 512)}),
        (4, "a8", {*range(2560, 28673, 512)}),
        (8, "a16", set()),
    ],
)
def test_columns_whose_scales_are_whole_copies(size: int, activation: str, columns: set[int]) -> None:
    facts = {"scale_bytes": size, "activation": Activation(activation)}
    assert {k for k in range(128, 30000, 128) if chosen(k=k, **facts).family is RESIDENT} == columns


@pytest.mark.parametrize(
    "change",
    [
        {"group": 64},
        {"layout": Layout.BIT_MAJOR},
        {"widths": (4, 4)},
        {"k": 2048},
        {"k": 4096 + 128},
        {"block_m": 16},
        {"block_m": 1},
        {"block_n": 32},
        {"num_warps": 8},
    ],
    ids=str,
)
def test_what_it_would_compute_wrongly_is_refused(change: dict) -> None:
    with pytest.raises(BadKernelSpec, match="resident_mma"):
        specialise(replace(chosen(), **change))


def test_more_shared_memory_than_there_is() -> None:
    with pytest.raises(KernelDoesNotFit, match="resident_mma"):
        configs.choose((replace(chosen(), k=65536),), H100)


def test_more_than_a_block_of_tokens_is_no_launch() -> None:
    prepared = Prepared(torch.ones(9, dtype=torch.int32), *[torch.empty(0)] * 3, (9,), COLUMNS, torch.float32)
    with pytest.raises(AssertionError, match="one block of tokens"):
        launch.multiply(Notes(chosen()), replace(prepared, high=torch.empty(0, dtype=torch.int8)), [])


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize(("groups", "size"), [(24, 2), (32, 2), (64, 2), (20, 4), (60, 4), (64, 4), (72, 2), (224, 2)])
def test_memory_is_laid_out_without_gaps_or_overlaps(groups: int, size: int, halves: int) -> None:
    layout = ResidentLayout(groups, size, halves)
    assert groups * size <= layout.facts_bytes <= groups * size + 16
    assert layout.facts_bytes % 32 == 16, "rows of scales begin in different banks"
    assert (layout.places == layout.steps) == (layout.held_groups == groups)
    facts = layout.acts_bytes + TEAMS * 2 * 32 * layout.facts_bytes
    assert facts <= layout.teams_at < facts + 512
    assert layout.acts_bytes % 128 == 0
    for slices in (1, 2, 3, 4):
        own = []
        for count in range(1, slices + 1):
            depth, sides = layout.choice(count)
            assert layout.sums_at(count) == 8 * depth * count * 1024
            own.append(layout.sums_at(count) + sides * SUMS)
        end = layout.team_bytes(slices)
        assert end == max(own), "a team's memory begins at one place, whatever the count"
        # The copy engine changes the order of what it copies by the address, the same again after 512 bytes.
        assert layout.teams_at % 512 == layout.sums_at(slices) % 512 == end % 512 == 0
        barriers = layout.barriers_at(slices)
        assert layout.teams_at + TEAMS * end <= barriers
        assert layout.places * 8 <= TAKEN_AT, "a barrier a step or place, and as many for who has read it"
        assert BARRIERS == RINGS_AT + 16 * 2 * 8 == 2 * TAKEN_AT + 16 * 2 * 8
        assert layout.total_bytes(slices) == barriers + BARRIERS + MARK <= MOST_BYTES
        assert layout.fits(slices)


def test_a_ring_has_two_steps_where_that_was_faster() -> None:
    assert [ResidentLayout(64, 2, 2).choice(count) for count in (1, 2, 3, 4)] == [(2, 2), (2, 1), (1, 2), (1, 1)]
    assert [ResidentLayout(32, 2, 2).choice(count) for count in (1, 2, 3, 4)] == [(2, 2), (2, 2), (1, 2), (1, 2)]


def test_the_estimate_is_from_above_whatever_scales_are() -> None:
    """Scales of 32 bits may leave room for a shorter ring only, which takes less than the longer one of others."""
    for widths in ((2,), (2, 2), (2, 2, 2), (2, 2, 2, 2)):
        for k in (4096, 6144, 8192, 14336, 28672):
            estimate = configs.shared_bytes(chosen(SliceSpec(widths, 128), k))
            for layout in (ResidentLayout(k // 128, size, 2) for size in (2, 4)):
                if layout.fits(len(widths)):
                    assert layout.total_bytes(len(widths)) <= estimate


def test_activations_pass_through_where_not_all_have_room() -> None:
    """Beside rings of four slices, whatever the weights have: how many are there depends on no count."""
    assert [ResidentLayout(groups, 2, 2).places for groups in (32, 64, 72, 112, 224, 344)] == [2, 4, 3, 3, 2, 2]
    assert [ResidentLayout(groups, 4, 2).places for groups in (60, 64, 112)] == [4, 3, 2]
    assert ResidentLayout(112, 2, 1).held_groups == 3 * 16
    assert ResidentLayout(64, 2, 1).held_groups == 64


def test_what_does_not_fit() -> None:
    layout = ResidentLayout(224, 4, 2)
    assert layout.fits(2)
    assert not layout.fits(4)
    with pytest.raises(ValueError, match="3 slices of 224 groups"):
        layout.total_bytes(4)


@pytest.mark.parametrize(
    ("rows", "at_once", "programs"),
    [((4333,), None, 91), ((14336,), None, 128), ((40, 33), None, 6), ((40, 33), 4, 3), ((1000, 7), 5, 5)],
)
def test_programs_are_as_few_as_have_no_more_tiles_each(
    rows: tuple[int, ...], at_once: int | None, programs: int
) -> None:
    """271 tiles are three for each of 91 programs, as they would be for some of 132."""
    kernel = Notes(chosen(SliceSpec((2,), 128), parts=len(rows)))
    ones = torch.ones(8, dtype=torch.int32)
    halves = torch.empty(32, 1, 32, 32, dtype=torch.int8)
    prepared = Prepared(ones, halves, halves, torch.empty(32, 8, 2), (8,), COLUMNS, torch.float32)
    scales = torch.ones(1, 32)
    weights = [Weight(torch.empty(2, n, 128, dtype=torch.int32), scales, scales, None) for n in rows]
    launch.multiply(kernel, prepared, weights, at_once=at_once)
    ((grid, _),) = kernel.launches
    assert grid == (1, programs)


@pytest.mark.parametrize(("scales", "family"), [(torch.float16, RESIDENT), (torch.float32, Family.SLICED_MMA)], ids=str)
def test_a_launch_is_warmed_with_the_kernel_that_it_takes(scales: torch.dtype, family: Family) -> None:
    wanted = Launch(SPEC, ROWS, 28672, torch.device("cuda"), torch.bfloat16, scales)
    found = kernels_of(wanted, H100, [TokenClass.FEW], workspace=False)
    assert [spec.family for spec in found if spec.family in (RESIDENT, Family.SLICED_MMA)] == [family]


def test_without_gluon_nothing_is_warmed_that_cannot_be_compiled() -> None:
    wanted = Launch(SPEC, ROWS, COLUMNS, torch.device("cuda"), torch.bfloat16, torch.float16)
    in_gluon = {RESIDENT, Family.BATCH_WGMMA, Family.SLICED_WGMMA}
    found = [spec for spec, _ in binaries_of([wanted], H100, TokenClass, workspace=True, gluon=True)]
    assert {spec.family for spec in found} >= in_gluon
    without = [spec for spec, _ in binaries_of([wanted], H100, TokenClass, workspace=True, gluon=False)]
    assert not {spec.family for spec in without} & in_gluon
    assert [spec.block_m for spec in without if spec.family is Family.SLICED_MMA] == [1, 8, 16, 32]


@pytest.mark.parametrize(("refusal", "family"), [(None, RESIDENT), ("no Gluon", Family.SLICED_MMA)], ids=str)
def test_without_gluon_a_program_for_each_tile(
    refusal: str | None, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "gluon_refusal", lambda: refusal)
    monkeypatch.setattr("mobiquant_compiler.codegen.cache.load", lambda spec: spec)
    monkeypatch.setattr("mobiquant_compiler.codegen.toolchain.interpreting", lambda: False)
    found = kernels.multiply_kernel.__wrapped__(SPEC, ROWS, COLUMNS, TokenClass.FEW, H100, Activation.A16)
    assert found.family is family


@pytest.mark.parametrize(
    ("columns", "unlike", "alike"),
    [(3072, {1, 2}, {1, 2}), (4096, {1, 2}, {1, 2}), (5120, {1, 2, 3, 4}, {1, 2}), (28672, {1, 2, 3, 4}, {1, 2})],
)
def test_both_groups_of_a_step_are_multiplied_at_once(columns: int, unlike: set[int], alike: set[int]) -> None:
    counts = range(1, 5)
    assert {count for count in counts if resident_tiles.both_at_once(count, False, columns // 128)} == unlike
    assert {count for count in counts if resident_tiles.both_at_once(count, True, columns // 128)} == alike


@pytest.mark.parametrize(("groups", "early"), [(24, 2), (32, 2), (40, 1), (64, 1), (72, 3), (112, 3), (224, 2)])
def test_activations_that_are_asked_for_before_the_counts(groups: int, early: int) -> None:
    """All of two steps, or all that have a place where they pass through; else a step."""
    assert held_tokens.early(ResidentLayout(groups, 2, 2).places, groups) == early
