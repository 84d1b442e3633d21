"""What kernels are made of, piece by piece in the interpreter; `tests/gpu` runs the same checks on a device."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from mobiquant_compiler.spec import GROUPS, Layout, SliceSpec
from tests import fragment_checks as checks
from tests.kernel_cases import SPECS, shares_runs, spec_id

CPU, EMULATE = "cpu", True
OTHERS = tuple(
    SliceSpec(widths, group, layout)
    for group in GROUPS
    for widths, layout in (
        ((4, 2, 1, 1), Layout.SLICE_MAJOR),
        ((2, 2, 2), Layout.SLICE_MAJOR),
        ((1,) * 7, Layout.SLICE_MAJOR),
        ((4, 4), Layout.SLICE_MAJOR),
        ((3, 1, 4), Layout.BIT_MAJOR),
    )
)
CODES = tuple(dict.fromkeys((*SPECS, *OTHERS)))


def test_tiles_are_multiplied_exactly() -> None:
    checks.check_tile_products(CPU, EMULATE)


@pytest.mark.parametrize("half", [1, 2])
def test_words_are_split_between_groups(half: int) -> None:
    checks.check_split_between_groups(half, CPU, EMULATE)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_vector_loads(count: int) -> None:
    checks.check_vector_loads(count, CPU, EMULATE)


def test_bits_are_selected() -> None:
    checks.check_select_bits(CPU, EMULATE)


@pytest.mark.parametrize("columns", [64, 128])
def test_sums_have_one_order(columns: int) -> None:
    checks.check_order_of_sums(columns, CPU)


@pytest.mark.parametrize(("width", "count"), [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)])
def test_units_are_joined_field_by_field(width: int, count: int) -> None:
    checks.check_join_units(width, count, CPU, EMULATE)


@pytest.mark.parametrize("spec", CODES, ids=spec_id)
def test_combined_codes_are_those_of_packing(spec: SliceSpec) -> None:
    for count in range(1, spec.num_slices + 1):
        checks.check_combined_codes(spec, count, False, CPU, EMULATE)
        if shares_runs(spec):
            checks.check_combined_codes(spec, count, True, CPU, EMULATE)
