"""Which calls batch_wgmma serves, its tiles, and that they fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mobiquant_compiler import kernels, warming
from mobiquant_compiler.codegen import boxes, specialise
from mobiquant_compiler.codegen.batch_configs import (
    BatchTile,
    batch_spec,
    blocks_of,
    keeps_order,
    takes_slices,
    tile_of,
    tiles_of,
)
from mobiquant_compiler.codegen.configs import Target, TokenClass, fits, shared_bytes
from mobiquant_compiler.errors import BadKernelSpec, KernelDoesNotFit
from mobiquant_compiler.launches import Launch, kernels_of
from mobiquant_compiler.runtime import launch
from mobiquant_compiler.runtime.launch import Weight
from mobiquant_compiler.spec import PREFILL_TOKENS, Activation, Family, Layout, SliceSpec

H100 = Target.of(90)
SMALL, SHARED_SMALL, LARGE, SHARED = BatchTile(16, 1), BatchTile(16, 2), BatchTile(32, 1), BatchTile(32, 2)


@pytest.mark.parametrize(
    ("tokens", "n", "k", "tile"),
    [
        (1, 28672, 8192, None),
        (8, 28672, 8192, None),
        (9, 14336, 8192, SMALL),
        (16, 14336, 8192, SMALL),
        (9, 4096, 8192, None),
        (9, 8192, 8192, SHARED_SMALL),
        (16, 28672, 8192, SHARED_SMALL),
        (17, 1024, 8192, None),
        (17, 4096, 8192, SHARED_SMALL),
        (32, 8192, 8192, SHARED),
        (16, 5120, 8192, SHARED_SMALL),
        (32, 5120, 8192, SHARED),
        (32, 2048, 8192, SHARED_SMALL),
        (32, 1024, 8192, None),
        (32, 14336, 8192, LARGE),
        (64, 14336, 8192, SHARED),
        (64, 14336, 4096, LARGE),
        (64, 4096, 4096, SHARED),
        (32, 14336, 4096, LARGE),
        (16, 28672, 4096, SMALL),
        (33, 4096, 8192, SHARED),
        (64, 4096, 8192, SHARED),
        (64, 1024, 8192, SHARED_SMALL),
        (64, 2048, 8192, SHARED_SMALL),
        (64, 8192, 8192, LARGE),
        (1000, 64, 8192, None),
        (1000, 4096, 8192, SHARED),
    ],
)
def test_who_serves_a_call(tokens: int, n: int, k: int, tile: BatchTile | None) -> None:
    assert tile_of(tokens, blocks_of([n]), k) == tile


@pytest.mark.parametrize(
    ("tokens", "n", "k", "kept"),
    [
        (9, 28672, 28672, True),  # one tile has all counts in any order
        (16, 14336, 4096, True),
        (32, 28672, 8192, True),
        (33, 28672, 8192, False),
        (33, 14336, 4096, False),
        (17, 4096, 4096, True),  # tiles of 16 that are multiplied at the same time
        (17, 4096, 8192, False),  # which takes long where tokens are unlike
        (64, 4096, 4096, True),
        (64, 4224, 4096, True),
        (64, 4288, 4096, False),
        (65, 1024, 4096, False),  # long calls have kernels of their own that route
    ],
)
def test_who_sorts_tokens(tokens: int, n: int, k: int, kept: bool) -> None:
    assert keeps_order(tokens, blocks_of([n]), k) == kept


def test_rows_of_several_weights_fill_blocks_of_their_own() -> None:
    assert blocks_of([64, 1, 65]) == 4


@pytest.mark.parametrize("k", [4096, 8192])
@pytest.mark.parametrize("rows", [(4096,), (4096, 1024, 1024), (14336, 14336), (100,), (6144,)], ids=str)
def test_tiles_are_those_that_calls_take(rows: tuple[int, ...], k: int) -> None:
    """What is warmed up is what can be launched: all of it, and for one weight nothing else."""
    for tokens, counts in (
        (TokenClass.FEW, range(2, 9)),
        (TokenClass.SOME, range(9, 17)),
        (TokenClass.MANY, range(17, 5000)),
    ):
        taken = {tile_of(count, blocks_of(rows), k) for count in counts} - {None}
        found = set(tiles_of(tokens, sum(rows), k, len(rows)))
        assert taken <= found
        assert len(rows) > 1 or taken == found


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("widths", [(2,), (2, 2), (2, 2, 2), (2, 2, 2, 2)])
def test_tiles_fit_a_hopper(widths: tuple[int, ...], group: int, activation: Activation) -> None:
    for tile in (SMALL, SHARED_SMALL, LARGE, SHARED):
        spec = batch_spec(SliceSpec(widths, group), 576, H100, tile=tile, activation=activation)
        assert fits(spec, H100)
        assert 2 * shared_bytes(spec) <= tile.consumers * H100.shared_bytes, (
            "of one warpgroup two share a multiprocessor"
        )
        specialise.specialise(spec)
        assert boxes.box_of("acts_desc", spec).shape[1:] == (tile.tokens, 128)
        assert boxes.box_of("slices_desc", spec).swizzle == 4 * boxes.box_of("slices_desc", spec).shape[1]


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (SliceSpec((4, 2), 64), "one to four slices of two bits"),
        (SliceSpec((2, 2), 64, Layout.BIT_MAJOR), "slices are packed whole"),
        (SliceSpec((2, 2), 32), "a group has 64 or 128 columns"),
    ],
    ids=str,
)
def test_slices_that_the_kernel_does_not_know_are_refused(weight: SliceSpec, words: str) -> None:
    assert not takes_slices(weight)
    with pytest.raises(BadKernelSpec, match=f"kernel batch_wgmma: .*{words}"):
        specialise.specialise(batch_spec(weight, 4096, H100, tile=LARGE))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"block_m": 8}, "a program has 16 or 32 tokens"),
        ({"block_n": 128}, "a consumer is a warpgroup"),
        ({"consumers": 4}, "one warpgroup multiplies, or two"),
        ({"num_stages": 2}, "one is read while others are written"),
    ],
    ids=str,
)
def test_tiles_that_the_kernel_does_not_know_are_refused(change: dict[str, int], words: str) -> None:
    with pytest.raises(BadKernelSpec, match=words):
        specialise.specialise(replace(batch_spec(SliceSpec(), 4096, H100, tile=LARGE), **change))


def test_older_multiprocessors_have_no_room_for_it() -> None:
    with pytest.raises(KernelDoesNotFit, match="batch_wgmma"):
        batch_spec(SliceSpec(), 4096, Target.of(89), tile=SHARED)


@pytest.mark.parametrize(
    ("spec", "cc", "parts", "n", "k", "batches", "quantizing"),
    [
        (SliceSpec(), 90, 1, 4096, 4096, 3, 2),
        (SliceSpec(), 90, 1, 4096, 14336, 3, 1),  # lanes take what one tile would hold: all rows are sorted
        (SliceSpec(), 90, 1, 14336, 4096, 2, 2),  # of 16 tokens and of 32: always more programs than multiprocessors
        (SliceSpec(), 90, 3, 6144, 4096, 6, 2),  # rows may be a multiple of eight, or not
        (SliceSpec(), 100, 1, 4096, 4096, 0, 0),
        (SliceSpec((4, 2)), 90, 1, 4096, 4096, 0, 0),
        (SliceSpec(group=32), 90, 1, 4096, 4096, 0, 0),
    ],
    ids=str,
)
def test_launches_list_their_kernels(
    spec: SliceSpec, cc: int, parts: int, n: int, k: int, batches: int, quantizing: int
) -> None:
    launch = Launch(spec, n, k, torch.device("cuda"), torch.float32, parts=parts)
    found = kernels_of(launch, Target.of(cc), list(TokenClass), workspace=False)
    assert sum(kernel.family is Family.BATCH_WGMMA for kernel in found) == batches
    assert sum(kernel.token_rows for kernel in found) == quantizing, "of counts as given, and with routing"
    lanes = {kernel.block_m for kernel in found if kernel.family is Family.SLICED_MMA and kernel.block_m > 8}
    wanted = {16, 32} if not batches else {16} if (n, k) == (4096, 4096) or (n, k) == (4096, 14336) else set()
    assert lanes == wanted, "where batch_wgmma serves some calls of a class, or none"
    one = kernels_of(launch, Target.of(cc), [TokenClass.ONE], workspace=False)
    assert not any(kernel.token_rows or kernel.family is Family.BATCH_WGMMA for kernel in one)


@pytest.mark.parametrize("k", [4096, 14336])
@pytest.mark.parametrize("n", [100, 4096, 14336])
@pytest.mark.parametrize("tokens", [9, 17, 65])
def test_what_is_warmed_up_is_what_launches_list(tokens: int, n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of tokens as rows: of calls of 17 tokens and of 65 together those of their class."""
    ran: list[str] = []
    monkeypatch.setattr(warming, "target_of", lambda device: H100)
    monkeypatch.setattr(warming, "prepare", lambda *args, token_rows: ran.append("routed"))
    monkeypatch.setattr(warming, "quantize", lambda *args, token_rows: ran.append("given"))
    monkeypatch.setattr(kernels, "batch_kernel", lambda *args, **facts: None)
    monkeypatch.setattr(launch, "multiply", lambda *args: ran.append("multiplied"))
    spec, x = SliceSpec(), torch.empty(tokens, k, device="meta")
    parts = (torch.empty(8, 1, k // 32), torch.empty(1, k // 128), torch.empty(1, k // 128), None)
    routing = ((), x, x, x)
    calls = ([Weight(*parts)], x, x, routing, spec, n, Activation.A16, (1,))
    assert warming._warm_batches(*calls) == len(ran)
    listed = kernels_of(
        Launch(spec, n, k, torch.device("cuda"), torch.float32, row_unit=1),
        H100,
        [TokenClass.of(tokens)],
        workspace=False,
    )
    rows = [kernel for kernel in listed if kernel.token_rows]
    assert ran.count("given") == sum(not kernel.route for kernel in rows)
    assert ran.count("multiplied") == sum(kernel.family is Family.BATCH_WGMMA for kernel in listed)
    calls = (spec, H100, TokenClass.of(tokens), n, k, 1)
    assert kernels.batch_takes_all(*calls) == (not any(kernel.family is Family.SLICED_MMA for kernel in listed))
    routed = sum(kernel.route for kernel in rows)
    assert ran.count("routed") == (0 if tokens > PREFILL_TOKENS else routed)
