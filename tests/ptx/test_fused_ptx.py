"""sliced_wgmma compiled without a GPU: no product waits for one before, stages come back in time, nothing spills."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest

from mobiquant_compiler.codegen import cache as kernels
from mobiquant_compiler.codegen import resources, toolchain
from mobiquant_compiler.codegen.configs import Target, shared_bytes, wgmma_spec
from mobiquant_compiler.codegen.signature import Dtypes
from mobiquant_compiler.spec import KernelSpec, SliceSpec

H100 = Target.of(90)
BODIES = 2 * 2  # two widths of tiles of tokens, two slice counts
PRODUCTS = 8  # of 16 columns, in a step
STAGES = 2  # of 64 columns, in a step
READS = 2  # of words: those of the first step before the loop, and in it those of the next


def spec_of(small: bool, k: int = 4096, has_bias: bool = False, split: bool = False) -> KernelSpec:
    """Return a kernel of two slices: a quarter of a minute less to compile than one of four."""
    return wgmma_spec(SliceSpec((2, 2), 64), k, H100, small=small, split=split, row_unit=8, has_bias=has_bias)


@cache
def compiled(spec: KernelSpec, dtypes: Dtypes | None = None) -> Any:
    """Compile once for all tests."""
    return kernels.compile_for(spec, 90, dtypes)


@cache
def listing(spec: KernelSpec) -> str:
    """Return the disassembly."""
    tool = toolchain.cuobjdump()
    if tool is None:
        pytest.skip("triton ships no cuobjdump")
    return resources._listing(tool, compiled(spec).asm["cubin"])


@pytest.fixture(autouse=True)
def gluon() -> None:
    """Skip, with the reason, where Gluon is not what the kernel needs."""
    reason = toolchain.gluon_refusal()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("small", [False, True])
def test_what_it_takes(small: bool, split: bool) -> None:
    spec = spec_of(small, split=split)
    found = resources.measure(spec, 90)
    assert found.fits
    assert found.local_bytes == 0, "nothing spills"
    assert found.products == spec.consumers * BODIES * PRODUCTS
    assert found.shared_bytes is not None
    assert found.shared_bytes <= shared_bytes(spec)
    assert found.registers is not None
    warps = 4 * (spec.consumers + 1)  # a copying warp has the registers of four
    assert found.registers * 32 * warps <= 65536


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("small", [False, True])
def test_four_slices_fit_as_well(small: bool, split: bool) -> None:
    spec = wgmma_spec(SliceSpec(), 4096, H100, small=small, split=split, row_unit=8)
    found = resources.measure(spec, 90)
    assert (found.fits, found.local_bytes, found.products) == (True, 0, 2 * spec.consumers * BODIES * PRODUCTS)
    assert found.shared_bytes is not None
    assert found.shared_bytes <= shared_bytes(spec)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(
    ("k", "slices", "split"),
    [(64, 2, False), (4096, 2, False), (576, 2, False), (4096, 4, False), (4096, 2, True), (4096, 4, True)],
)
def test_products_are_not_serialized(small: bool, k: int, slices: int, split: bool) -> None:
    """ptxas serializes products where it does not understand them: then each waits for all before it."""
    spec = wgmma_spec(SliceSpec((2,) * slices, 64), k, H100, small=small, split=split, row_unit=8)
    text = listing(spec)
    bodies = spec.consumers * BODIES * slices // 2
    assert re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", text) == ["0"] * (bodies * STAGES)
    assert len(re.findall(r"\bHGMMA\.64x", text)) == bodies * PRODUCTS


@pytest.mark.parametrize("small", [False, True])
def test_a_stage_is_given_back_when_its_products_are_done(small: bool) -> None:
    """The copy that follows would overwrite what they still read: every warp waits, then one arrives.

    Words are read by loads: a fence lets them end before the copy, and none is asked for while products run, where
    ptxas would crash.
    """
    spec = spec_of(small)
    ptx = compiled(spec).asm["ptx"]
    names = r"wgmma\.mma_async|wgmma\.wait_group\S+ \d|bar\.sync|fence\.proxy\.async|mbarrier\.arrive\.shared"
    order = re.findall(names, ptx)
    given_back = [at for at, name in enumerate(order) if name == "mbarrier.arrive.shared"]
    words = [at for at in given_back if order[at - 2] == "fence.proxy.async"]
    assert len(words) == spec.consumers * BODIES * READS
    assert len(given_back) - len(words) == spec.consumers * BODIES * STAGES
    for at in given_back:
        assert order[at - 1] == "bar.sync"
        before = order[: at - 1] if at not in words else order[: at - 2]
        products = [name for name in before if name.startswith("wgmma")]
        assert products[-1:] in (["wgmma.wait_group.sync.aligned 0"], [])
        assert at in words or before[-1] == "wgmma.wait_group.sync.aligned 0"


def test_few_instructions_a_product() -> None:
    """A warp makes eight values a lane for a product: making them takes less than it would take to multiply by them."""
    text = listing(spec_of(False))
    addresses = [(int(a, 16), rest) for a, rest in re.findall(r"(?m)^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", text)]
    loops = []
    for place, (address, instruction) in enumerate(addresses):
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
        if jump and int(jump[1], 16) < address:
            body = [rest for at, rest in addresses[: place + 1] if at >= int(jump[1], 16)]
            loops.append((sum("HGMMA" in rest for rest in body), len(body)))
    steps = [length for products, length in loops if products == PRODUCTS]
    bodies = 2 * BODIES
    assert len(steps) >= bodies
    assert max(sorted(steps)[:bodies]) <= 36 * PRODUCTS


def test_activations_come_by_the_copy_engine_and_weights_straight_to_registers() -> None:
    ptx = compiled(spec_of(False)).asm["ptx"]
    assert "cp.async.bulk.tensor.2d" in ptx
    assert "mbarrier.try_wait" in ptx
    assert len(re.findall(r"wgmma\.mma_async\S+m64n256k16", ptx)) == 2 * 2 * PRODUCTS
    assert len(re.findall(r"wgmma\.mma_async\S+m64n128k16", ptx)) == 2 * 2 * PRODUCTS
    assert ".ftz" not in ptx
    pairs = 4 * (PRODUCTS + 4)  # four products are made ready before the loop
    assert len(re.findall(r"fma\.rn\.bf16x2", ptx)) == 2 * BODIES * 2 * pairs, "two for two weights"


@pytest.mark.parametrize("dtypes", [Dtypes("fp16"), Dtypes("bf16", "fp32")], ids=str)
def test_other_dtypes(dtypes: Dtypes) -> None:
    ptx = compiled(spec_of(True, has_bias=True), dtypes).asm["ptx"]
    kind, other = {"fp16": ("f16", "bf16"), "bf16": ("bf16", "f16")}[dtypes.x]
    assert f"f32.{kind}.{kind}" in ptx
    assert f"fma.rn.{kind}x2" in ptx
    assert f"fma.rn.{other}x2" not in ptx


def test_rows_of_any_number_are_written_one_by_one() -> None:
    stores = r"st\.global\.v4\.b32"
    assert re.search(stores, compiled(spec_of(True)).asm["ptx"])
    odd = wgmma_spec(SliceSpec((2, 2), 64), 4096, H100, small=True)
    assert not re.search(stores, compiled(odd).asm["ptx"])


@pytest.mark.parametrize("small", [False, True])
def test_parts_leave_their_sums_before_they_say_so_and_are_read_once_they_did(small: bool) -> None:
    """Sixteen bytes at a time, and with nothing between threads: each waits for itself."""
    spec = spec_of(small, split=True)
    names = r"(?:st|ld)\.global\.v4\.b32|red\.release\.gpu\.global|again: ld\.acquire\.gpu\.global|bar\.sync"
    order = re.findall(names, compiled(spec).asm["ptx"])
    said = [at for at, name in enumerate(order) if name.startswith("red")]
    assert len(said) == order.count("again: ld.acquire.gpu.global") == spec.consumers * BODIES
    sums = [spec.block_m // 8, spec.block_m // 16]  # of a thread, by fours, in the wide tile and the narrow one
    left = sorted(next(n for n in range(at) if order[at - 1 - n] != "st.global.v4.b32") for at in said)
    assert left == sorted(2 * spec.consumers * sums)
    assert order.count("ld.global.v4.b32") == 2 * spec.consumers * sum(sums)


def test_kernels_that_split_nothing_know_nothing_of_parts() -> None:
    assert not re.search(r"red\.release|ld\.acquire", compiled(spec_of(True)).asm["ptx"])
