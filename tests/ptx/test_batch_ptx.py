"""batch_wgmma compiled without a GPU: products of bytes that overlap, in the registers that programs share."""

from __future__ import annotations

import re
from functools import cache

import pytest

from mobiquant_compiler.codegen import resources, toolchain
from mobiquant_compiler.codegen.batch_configs import BatchTile, batch_spec
from mobiquant_compiler.codegen.configs import Target, shared_bytes
from mobiquant_compiler.codegen.resources import Resources
from mobiquant_compiler.spec import Activation, KernelSpec, SliceSpec

H100 = Target.of(90)
TILES = (BatchTile(16, 1), BatchTile(32, 1), BatchTile(32, 2), BatchTile(16, 2))
each_tile = pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"m{tile.tokens}c{tile.consumers}")


@pytest.fixture(autouse=True)
def gluon() -> None:
    """Skip, with the reason, where Gluon is not what the kernel needs."""
    reason = toolchain.gluon_refusal()
    if reason is not None:
        pytest.skip(reason)


def spec_of(tile: BatchTile, activation: Activation = Activation.A16) -> KernelSpec:
    """Return a kernel of two slices, which take three bodies: one slice, two, and unlike tokens."""
    return batch_spec(SliceSpec((2, 2)), 4096, H100, tile=tile, activation=activation, row_unit=8)


@cache
def measured(spec: KernelSpec) -> Resources:
    """Compile once for all tests."""
    return resources.measure(spec, 90)


@each_tile
def test_what_it_takes(tile: BatchTile) -> None:
    spec = spec_of(tile)
    found = measured(spec)
    assert found.fits
    # A pair of groups is eight products of 32 columns; unlike tokens multiply slice by slice.
    assert found.products == tile.consumers * (8 + 8 + 2 * 8)
    assert found.shared_bytes is not None
    assert found.shared_bytes <= shared_bytes(spec)
    assert found.local_bytes is not None
    assert found.local_bytes <= 64, "what is kept outside of registers is read once a chain, if at all"
    assert found.registers is not None
    threads = 32 * (spec.num_warps * tile.consumers + 4)  # the copying warp is one of four
    programs = 1 if tile.consumers == 2 else 2
    assert found.registers * threads * programs <= 65536


@each_tile
def test_products_are_of_signed_bytes_and_copies_by_descriptors(tile: BatchTile) -> None:
    ptx = measured(spec_of(tile)).ptx
    shapes = set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(\S+)", ptx))
    assert shapes == {f"m64n{2 * tile.tokens}k32.s32.s8.s8"}, "high halves and low ones side by side"
    assert "cp.async.bulk.tensor.3d" in ptx
    order = re.findall(r"griddepcontrol\.\w+|wgmma\.wait_group\S* 0|ld\.global|st\.global", ptx)
    assert order[0] == "griddepcontrol.wait", "the kernel before may still be writing"
    assert order.count("griddepcontrol.wait") == 1
    signals = [at for at, name in enumerate(order) if name == "griddepcontrol.launch_dependents"]
    assert len(signals) == 3, "every body lets the next kernel begin"


def test_the_next_kernel_begins_when_products_are_done() -> None:
    """Programs that come sooner all go to the few multiprocessors that this kernel leaves free."""
    one = batch_spec(SliceSpec((2,)), 4096, H100, tile=TILES[2], row_unit=8)
    body = measured(one).ptx
    signal = body.index("griddepcontrol.launch_dependents")
    between = body[signal : body.index("st.global", signal)]
    assert "wgmma.mma_async" not in between
    assert "mbarrier.try_wait" not in between, "what follows is writing the tile"


def test_the_next_product_is_begun_before_the_last_is_waited_for() -> None:
    ptx = measured(spec_of(TILES[1])).ptx
    assert set(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)) == {"1", "0"}


@each_tile
def test_a_stage_is_given_back_when_all_have_read_it(tile: BatchTile) -> None:
    """Copies are of another proxy: they wait for a warp's loads only where it fences, before the others hear of it."""
    ptx = measured(spec_of(tile)).ptx
    order = re.findall(r"ld\.shared|fence\.proxy\.async|bar\.sync|mbarrier\.(?:arrive\.shared|try_wait)", ptx)
    given_back = [at for at, name in enumerate(order) if name == "mbarrier.arrive.shared"]
    assert len(given_back) == 3 * tile.consumers, "one for each body of a consumer"
    for at in given_back:
        assert order[at - 2 : at] == ["fence.proxy.async", "bar.sync"]


def test_bytes_alone_take_products_of_half_the_columns() -> None:
    found = measured(spec_of(TILES[1], Activation.A8))
    assert found.products == 32
    assert f"m64n{TILES[1].tokens}k32.s32.s8.s8" in found.ptx
