"""dequantize compiled without a GPU: what bounds it is memory, so loads and stores are counted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from mobiquant_compiler.codegen import cache as kernels
from mobiquant_compiler.codegen.configs import Target, TokenClass, fits, kernel_spec, shared_bytes
from mobiquant_compiler.codegen.signature import Dtypes
from mobiquant_compiler.spec import Family, KernelSpec, Layout, SliceSpec
from tests.kernel_cases import SPECS, spec_id

TARGETS = (80, 90, 100)
K = 4096
BF16, FP16, FP32 = Dtypes(), Dtypes("fp16", "fp16"), Dtypes("fp32", "fp16")
LOADS = re.compile(r"\bld\.global\S*\.b(\d+)")
STORES = re.compile(r"\bst\.global\S*\.v(\d)\.b32")
SORTED, UNIFORM = True, False  # which of the two kernels: tokens sorted by their counts, or all of one


def spec_of(weight: SliceSpec, sorted_rows: bool, cc: int = 90, k: int = K) -> KernelSpec:
    """Choose the kernel of a weight of `k` columns."""
    return kernel_spec(Family.DEQUANTIZE, weight, k, TokenClass.MANY, Target.of(cc), sorted_rows=sorted_rows)


@cache
def compiled(spec: KernelSpec, cc: int = 90, dtypes: Dtypes = BF16) -> Any:
    """Compile once per session."""
    return kernels.compile_for(spec, cc, dtypes)


def octets(spec: KernelSpec) -> int:
    """Return how many pieces of eight columns a thread has."""
    return spec.block_n * spec.block_w // 8 // (32 * spec.num_warps)


def stored_bytes(ptx: str) -> Iterator[int]:
    """Yield the bytes of each store instruction; none is of another form."""
    assert ptx.count("st.global") == len(STORES.findall(ptx)), "a store is not of whole vectors"
    yield from (4 * int(lanes) for lanes in STORES.findall(ptx))


@pytest.mark.parametrize("cc", TARGETS)
@pytest.mark.parametrize("sorted_rows", [SORTED, UNIFORM], ids=["sorted", "uniform"])
@pytest.mark.parametrize("dtypes", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
def test_it_compiles_and_fits(sorted_rows: bool, cc: int, dtypes: Dtypes) -> None:
    spec = spec_of(SPECS[0], sorted_rows, cc)
    binary = compiled(spec, cc, dtypes)
    assert f".target sm_{cc}" in binary.asm["ptx"]
    assert len(binary.asm["cubin"]) > 1000
    assert fits(spec, Target.of(cc))
    assert binary.metadata.shared <= shared_bytes(spec) <= Target.of(cc).shared_bytes
    if dtypes is not FP32:
        assert binary.metadata.shared == 0, "threads own what they write: nothing changes hands"


@pytest.mark.parametrize("weight", SPECS, ids=spec_id)
def test_every_count_is_stored_sixteen_bytes_a_time_and_once(weight: SliceSpec) -> None:
    for sorted_rows in (SORTED, UNIFORM):
        spec = spec_of(weight, sorted_rows)
        stores = list(stored_bytes(compiled(spec).asm["ptx"]))
        assert set(stores) == {16}
        assert sum(stores) == 16 * octets(spec) * weight.num_slices


@pytest.mark.parametrize("cc", TARGETS)
def test_stores_are_wide_on_every_target(cc: int) -> None:
    for dtypes in (BF16, FP16, FP32):
        stores = list(stored_bytes(compiled(spec_of(SPECS[0], SORTED, cc), cc, dtypes).asm["ptx"]))
        assert min(stores) >= 16


@pytest.mark.parametrize("k", [K, 576, 32])
@pytest.mark.parametrize("weight", SPECS, ids=spec_id)
def test_a_word_of_each_unit_is_loaded_once_for_all_counts(weight: SliceSpec, k: int) -> None:
    units = weight.total_bits if weight.layout is Layout.BIT_MAJOR else weight.num_slices
    for sorted_rows, used in ((SORTED, weight.num_slices + 1), (UNIFORM, 1)):
        spec = spec_of(weight, sorted_rows, k=k)
        loaded = sum(int(bits) // 8 for bits in LOADS.findall(compiled(spec).asm["ptx"]))
        words, scale_and_zero = 4 * units, 2 + 2
        assert loaded == octets(spec) * (words + scale_and_zero) + 4 * used


@pytest.mark.parametrize(("sorted_rows", "used"), [(SORTED, 5), (UNIFORM, 1)], ids=["sorted", "uniform"])
def test_loads_of_slices_that_nobody_uses_are_predicated(sorted_rows: bool, used: int) -> None:
    """All but those that say which are in use: no word is read without a condition."""
    ptx = compiled(spec_of(SPECS[0], sorted_rows)).asm["ptx"]
    lines = [line.strip() for line in ptx.splitlines() if "ld.global" in line]
    assert sum(not line.startswith("@") for line in lines) == used


def test_arithmetic_rounds_as_the_reference() -> None:
    """No contraction, no flush of small numbers, and conversions to nearest."""
    for dtypes in (BF16, FP16):
        ptx = compiled(spec_of(SPECS[0], SORTED), 90, dtypes).asm["ptx"]
        assert "fma" not in ptx
        assert ".ftz" not in ptx
        assert re.search(r"cvt\.rn\.(bf16|f16)(x2)?\.f32", ptx)
