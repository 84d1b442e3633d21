"""Blocks that come to the device one at a time: from "cpu" to "cpu:0", which are one place here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import mobiquant_compiler as mq
from mobiquant_compiler.calibration.residency import one_at_a_time
from tests.models_tiny import tiny_llama, tiny_lm, tokens

HOME, AWAY = torch.device("cpu"), torch.device("cpu", 0)
BLOCKS = ["layers.0", "layers.1", "layers.2"]
IDS = tokens(6, 24, seed=1)


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def test_the_block_that_runs_is_there() -> None:
    model, seen = tiny_lm(3, tied=True), []
    wanted = model(IDS)
    blocks = [model.get_submodule(name) for name in BLOCKS]
    with one_at_a_time(model, BLOCKS, AWAY) as residency:
        for block in blocks:
            block.register_forward_hook(lambda *_: seen.append(residency.here))
        assert torch.equal(model(IDS), wanted)
        residency.leave()
        assert residency.here is None
        model(IDS)
        assert residency.here is blocks[2]
    assert seen == blocks * 2
    assert residency.here is None
    assert model.lm_head.weight is model.embed.weight
    assert all("forward" not in block.__dict__ for block in blocks)
    assert torch.equal(model(IDS), wanted)


def test_gradients_are_the_same_and_bring_blocks_back() -> None:
    model, seen = tiny_lm(3), []
    model(IDS).square().sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    blocks = [model.get_submodule(name) for name in BLOCKS]
    with one_at_a_time(model, BLOCKS, AWAY) as residency:
        for block in blocks:
            weight = block.down_proj.weight
            weight.register_post_accumulate_grad_hook(lambda _: seen.append(blocks.index(residency.here)))
        model(IDS).square().sum().backward()
    assert seen == [2, 1, 0]
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), wanted, strict=True))


def test_an_error_brings_everything_home() -> None:
    model = tiny_lm(3)
    model.layers[1].forward = own = model.layers[1].forward
    with pytest.raises(IndexError), one_at_a_time(model, BLOCKS, AWAY) as residency:
        model(IDS + 10_000)
    assert residency.here is None
    assert model.layers[1].__dict__["forward"] is own
    assert "forward" not in model.layers[0].__dict__


def test_what_took_the_place_of_a_block_comes_home_too() -> None:
    """A block may be a linear itself, and become an elastic one."""
    moved: list[torch.device] = []

    class Elastic(nn.Linear):
        def to(self, device: torch.device) -> Elastic:
            moved.append(device)
            return super().to(device)

    model = tiny_lm(3)
    with one_at_a_time(model, BLOCKS, AWAY):
        model.layers[1] = Elastic(64, 64)
        model(IDS)
        assert moved == []
    assert moved == [HOME]


@pytest.mark.parametrize("device", [None, HOME])
def test_nothing_moves_where_the_model_is(device: torch.device | None) -> None:
    model = tiny_lm(3)
    with one_at_a_time(model, BLOCKS, device) as residency:
        assert residency.device == HOME
        model(IDS)
        assert residency.here is None
        assert "forward" not in model.layers[0].__dict__


@pytest.mark.parametrize("router", ["energy", "mlp"])
def test_calibration_gives_the_same_model(router: str) -> None:
    made = []
    for device in (None, AWAY):
        model = tiny_llama(3)
        config = mq.CalibrationConfig(tune_steps=6, router=router, router_steps=20)
        mq.calibrate_(model, IDS, config, device=device, budget=4.0)
        made.append(model)
    assert mq.get_budget(made[1]) == 4
    for (name, one), (_, other) in zip(tensors(made[0]), tensors(made[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=name)
    assert torch.equal(made[0](IDS).logits, made[1](IDS).logits)
