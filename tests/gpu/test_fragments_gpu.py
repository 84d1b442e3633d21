"""What kernels are made of, piece by piece on the device: the checks of `tests/interpret`, on inline assembly."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from mobiquant_compiler.spec import SliceSpec
from tests import fragment_checks as checks
from tests.kernel_cases import SPECS, shares_runs, spec_id

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA, EMULATE = "cuda", False


def test_tiles_are_multiplied_exactly() -> None:
    checks.check_tile_products(CUDA, EMULATE)


@pytest.mark.parametrize("half", [1, 2])
def test_words_are_split_between_groups(half: int) -> None:
    checks.check_split_between_groups(half, CUDA, EMULATE)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_vector_loads(count: int) -> None:
    checks.check_vector_loads(count, CUDA, EMULATE)


def test_bits_are_selected() -> None:
    checks.check_select_bits(CUDA, EMULATE)


@pytest.mark.parametrize("columns", [64, 128])
def test_sums_have_one_order(columns: int) -> None:
    checks.check_order_of_sums(columns, CUDA)


@pytest.mark.parametrize(("width", "count"), [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)])
def test_units_are_joined_field_by_field(width: int, count: int) -> None:
    checks.check_join_units(width, count, CUDA, EMULATE)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_combined_codes_are_those_of_packing(spec: SliceSpec) -> None:
    for count in range(1, spec.num_slices + 1):
        checks.check_combined_codes(spec, count, False, CUDA, EMULATE)
        if shares_runs(spec):
            checks.check_combined_codes(spec, count, True, CUDA, EMULATE)
