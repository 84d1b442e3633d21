"""batch_wgmma, run as plain Python on CPU tensors: a copying thread, and one or two that multiply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mobiquant_compiler import reference
from mobiquant_compiler.codegen.batch_configs import BatchTile, batch_spec
from mobiquant_compiler.codegen.configs import Target
from mobiquant_compiler.kernels import prepare_kernel
from mobiquant_compiler.runtime import launch
from mobiquant_compiler.runtime.launch import Weight
from mobiquant_compiler.spec import Activation, SliceSpec
from tests import gluon_emulation
from tests.kernel_cases import Case, integer_case, random_case

H100 = Target.of(90)
TILES = (BatchTile(16, 1), BatchTile(32, 1), BatchTile(32, 2), BatchTile(16, 2))
each_tile = pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"m{tile.tokens}c{tile.consumers}")


class Emulated:
    """A kernel that is launched as plain Python."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def launch(self, grid: tuple[int, ...], **arguments: Any) -> None:
        """Run all programs."""
        gluon_emulation.run(self.spec, grid, arguments)


def run(cases: Sequence[Case], tile: BatchTile, activation: Activation = Activation.A16) -> list[Tensor]:
    """Multiply the tokens of the first case by the weights of all."""
    spec, x = cases[0].spec, cases[0].x
    weights = [Weight(*case.arguments[2:]) for case in cases]
    facts = {"parts": len(cases), "has_bias": weights[0].bias is not None}
    kernel = Emulated(batch_spec(spec, x.shape[-1], H100, tile=tile, activation=activation, **facts))
    quantize = prepare_kernel(spec, x.shape[-1], Target.of(80), activation, route=False, quantize=True, token_rows=True)
    return launch.multiply(kernel, launch.prepare(quantize, x, counts=cases[0].counts), weights)


@each_tile
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("widths", [(2,), (2, 2, 2), (2, 2, 2, 2)])
def test_integers_are_exact(widths: tuple[int, ...], group: int, tile: BatchTile) -> None:
    """Rows and tokens that fill no tile, chains of unequal length, a last pair of one group."""
    for k in (40, 576, 1200):
        case = integer_case(SliceSpec(widths, group), 19, 70, k, bias=True)
        assert torch.equal(run([case], tile)[0], case.expected(torch.float32)), f"{k} columns"


@each_tile
@pytest.mark.parametrize("counts", [(1,), (2,), (3,), (4,), (1, 2), (2, 3), (3, 4), (2, 4), (1, 3)], ids=str)
def test_tokens_of_few_counts(counts: tuple[int, ...], tile: BatchTile) -> None:
    """Bodies for tokens that are alike, for those of two counts side by side, and for others."""
    case = integer_case(SliceSpec(group=64), 33, 64, 640, dtype=torch.bfloat16)
    case.counts.copy_(torch.tensor(counts).repeat(33)[:33])
    assert torch.equal(run([case], tile)[0], case.expected(torch.float32).bfloat16())


def test_counts_outside_of_the_slices_are_the_nearest() -> None:
    case = integer_case(SliceSpec(group=64), 17, 64, 256)
    case.counts.copy_(torch.arange(17) - 5)
    near = replace(case, counts=case.counts.clamp(1, 4))
    assert torch.equal(run([case], TILES[1])[0], near.expected(torch.float32))


@each_tile
@pytest.mark.parametrize("tokens", [9, 33])
def test_tokens_that_were_routed_keep_their_order(tokens: int, tile: BatchTile) -> None:
    case = integer_case(SliceSpec(group=64), tokens, 64, 640)
    scores = reference.energy_scores(case.x, (torch.ones(640), torch.ones(3)))
    limits = torch.quantile(scores, torch.tensor([0.3, 0.5, 0.8]), dim=0).diagonal()
    hist, mask = torch.zeros(4, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    route = prepare_kernel(case.spec, 640, Target.of(80), Activation.A16, route=True, quantize=True, token_rows=True)
    prepared = launch.prepare(route, case.x, (torch.ones(640), torch.ones(3)), limits, hist, mask)
    assert int((hist > 0).sum()) == 4
    kernel = Emulated(batch_spec(case.spec, 640, H100, tile=tile, has_bias=case.bias is not None))
    (found,) = launch.multiply(kernel, prepared, [Weight(*case.arguments[2:])])
    assert torch.equal(found, replace(case, counts=prepared.counts).expected(torch.float32))


@each_tile
def test_siblings(tile: BatchTile) -> None:
    cases = [integer_case(SliceSpec((2, 2)), 17, n, 300, bias=True, seed=n) for n in (64, 3, 130, 65)]
    cases = [replace(case, x=cases[0].x, counts=cases[0].counts) for case in cases]
    for case, y in zip(cases, run(cases, tile), strict=True):
        assert torch.equal(y, case.expected(torch.float32))


@pytest.mark.parametrize(("activation", "tolerance"), [(Activation.A16, 1e-4), (Activation.A8, 2e-2)])
def test_any_activations(activation: Activation, tolerance: float) -> None:
    case = random_case(SliceSpec(group=64), 33, 70, 640)
    found, wanted = run([case], TILES[2], activation)[0], case.expected()
    assert (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_a_token_has_the_same_bits_in_every_tile_and_among_any_others(size: float) -> None:
    case = random_case(SliceSpec(group=64), 40, 64, 640)
    case = replace(case, x=case.x * size)
    whole = run([case], TILES[2])[0]
    for tile in TILES:
        assert torch.equal(run([case], tile)[0], whole)
    for count in range(1, 5):
        token = int((case.counts == count).nonzero()[0])
        alone = replace(case, x=case.x[token : token + 1], counts=case.counts[token : token + 1])
        assert torch.equal(run([alone], TILES[0])[0][0], whole[token])


def test_a_token_that_is_not_finite_spoils_no_other() -> None:
    case = random_case(SliceSpec(group=64), 17, 64, 320)
    clean = run([case], TILES[1])[0]
    case.x[5, 3] = float("nan")
    found = run([case], TILES[1])[0]
    others = [token for token in range(17) if token != 5]
    assert torch.equal(found[others], clean[others])
    assert found[5].isnan().all()
