"""Trained routers: their scores, what they learn, what they cost, and that everything else takes them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mobiquant_compiler as mq
from mobiquant_compiler import checkpoint
from mobiquant_compiler.calibration import training
from mobiquant_compiler.calibration.training import Lesson, slice_worth, train_network
from mobiquant_compiler.checkpoint.load import weight_source
from mobiquant_compiler.errors import CheckpointMismatch, CheckpointTensor
from mobiquant_compiler.linear import MobiLinear, Router, elastic_linears, score_gain
from mobiquant_compiler.reference import energy_scores, mlp_features, mlp_scores
from mobiquant_compiler.spec import SliceSpec
from tests.models_tiny import tiny_llama, tiny_lm, tokens

WIDTHS = (2, 2, 2, 2)
TRAINED = mq.CalibrationConfig(tune_steps=0, router="mlp", router_steps=60)
LLAMA_3_8B = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
SMOLLM2 = {"qkv": (576, (576, 192, 192)), "o": (576, (576,)), "up": (576, (1536, 1536)), "down": (1536, (576,))}


def router_of(k: int, width: int | None = None) -> Router:
    router = Router(torch.rand(k) + 0.1, WIDTHS)
    if width:
        router.learn([torch.randn(width, k + 2) / k**0.5, torch.randn(width), torch.randn(3, width), torch.randn(3)])
    return router


class TestScores:
    def test_zero_second_layers_leave_the_data_free_scores(self) -> None:
        x, router = torch.randn(5, 64), router_of(64, 4)
        router.out.zero_()
        router.out_bias.zero_()
        assert torch.equal(mlp_scores(x, router.tensors), energy_scores(x, router.tensors[:2]))

    def test_the_network_multiplies_them(self) -> None:
        x, router = torch.randn(5, 64), router_of(64, 4)
        hidden = mlp_features(x) @ router.hidden.float().t() + router.hidden_bias.float()
        factor = ((hidden * hidden.sigmoid()) @ router.out.float().t() + router.out_bias.float()).exp()
        wanted = energy_scores(x, router.tensors[:2]) * factor
        torch.testing.assert_close(mlp_scores(x, router.tensors), wanted)

    def test_features_say_size_and_peak_apart_from_direction(self) -> None:
        x = torch.randn(3, 32)
        small, large = mlp_features(x), mlp_features(100 * x)
        torch.testing.assert_close(small[:, :32], large[:, :32])
        torch.testing.assert_close(large[:, 32] - small[:, 32], torch.full((3,), 100.0).log())
        torch.testing.assert_close(small[:, 33], large[:, 33])

    @pytest.mark.parametrize("x", [torch.zeros(2, 32), torch.full((2, 32), 6e4, dtype=torch.float16)], ids=["0", "max"])
    def test_extreme_tokens_have_finite_scores(self, x: Tensor) -> None:
        assert bool(torch.isfinite(mlp_scores(x, router_of(32, 4).tensors)).all())


class TestWorth:
    def test_it_is_the_error_that_a_slice_takes_away(self) -> None:
        spec = SliceSpec(WIDTHS, 32)
        pair = [MobiLinear.from_weight(torch.randn(n, 64), None, spec) for n in (5, 3)]
        outputs = [torch.rand(5), torch.rand(3)]
        x, weight = torch.randn(7, 64), torch.rand(7)
        got = slice_worth(pair, outputs, x, weight)
        left = []
        for count in range(1, 5):
            total = torch.zeros(7)
            for linear, counted in zip(pair, outputs, strict=True):
                y = []
                for used in (count, 4):
                    linear.router.thresholds.fill_(-torch.inf)[used - 1 :] = torch.inf
                    y.append(linear(x))
                total += (y[0] - y[1]).square() @ counted
            left.append(total * weight)
        wanted = torch.stack([(a - b) / (2 * 8 * 64) for a, b in pairwise(left)], 1)
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)


class TestTraining:
    def test_it_learns_which_tokens_matter(self) -> None:
        """The worth depends on one direction that the prediction cannot see."""
        router, x = router_of(48), torch.randn(4096, 48)
        seen = x[:, 0] > 0
        truth = energy_scores(x, router.tensors) * torch.where(seen, 8.0, 0.5).unsqueeze(1)
        noise = torch.empty(4096, 1).exponential_()
        network = train_network(
            Lesson(x, truth * noise), router, mq.CalibrationConfig(), torch.Generator().manual_seed(0)
        )
        base = energy_scores(x, router.tensors)
        router.learn(network)
        factor = (mlp_scores(x, router.tensors) / base).log()
        assert float(factor[seen].mean() - factor[~seen].mean()) > 1.5
        fresh = torch.randn(512, 48)
        factor = (mlp_scores(fresh, router.tensors) / energy_scores(fresh, router.tensors[:2])).log()
        clear = fresh[:, 0].abs() > 0.5
        assert float(((factor[:, 0] > factor[:, 0].median()) == (fresh[:, 0] > 0))[clear].float().mean()) > 0.9

    def test_where_nothing_can_be_learned_a_factor_is_left(self) -> None:
        router, x = router_of(48), torch.randn(512, 48)
        noise = torch.empty(512, 1).exponential_() ** 3
        truth = energy_scores(x, router.tensors) * torch.tensor([2.0, 1.0, 0.25]) * noise
        config = mq.CalibrationConfig(router_width=64, router_steps=300)
        _, _, out, out_bias = train_network(Lesson(x, truth), router, config, torch.Generator().manual_seed(0))
        assert not out.any()
        assert bool((out_bias.diff() < 0).all())

    def test_training_that_diverges_leaves_a_factor_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fit = training._fit
        monkeypatch.setattr(training, "_fit", lambda *lesson: [t * torch.nan for t in fit(*lesson)])
        router, x = router_of(48), torch.randn(64, 48)
        truth = 2 * energy_scores(x, router.tensors)
        base = energy_scores(x, router.tensors)
        router.learn(train_network(Lesson(x, truth), router, TRAINED, torch.Generator().manual_seed(0)))
        torch.testing.assert_close(mlp_scores(x, router.tensors), 2 * base, rtol=1e-2, atol=0)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(ids)
    return getattr(output, "logits", output)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    model = tiny_llama()
    mq.calibrate_(model, tokens(32, 64), TRAINED)
    return model


@pytest.mark.parametrize("scope", ["input", "linear"])
def test_every_router_is_trained_and_budgets_are_met(scope):
    model, ids = tiny_llama(), tokens(32, 64)
    mq.calibrate_(model, ids, TRAINED, slices=mq.SliceConfig(scope=scope))
    routers = {id(m.router): m.router for m in elastic_linears(model).values()}.values()
    assert len(routers) == {"input": 8, "linear": 14}[scope]
    assert {router.kind for router in routers} == {"mlp"}
    before = None
    for bits in (7.0, 6.0, 5.0, 4.0, 3.0, 2.5):
        with mq.budget(model, bits):
            mq.reset_telemetry(model)
            logits(model, ids)
            achieved = mq.achieved_bits(model).total
            assert achieved == pytest.approx(bits, abs=0.1)
        assert before is None or achieved < before
        before = achieved


def test_training_can_be_taken_up_and_repeated_on_the_same_slices(tmp_path: Path) -> None:
    ids, states = tokens(8, 32), []
    for config in (TRAINED, mq.CalibrationConfig(tune_steps=0), TRAINED):
        model, stages = tiny_lm(), set()
        mq.calibrate_(model, ids, config, state=tmp_path, progress=lambda s, d, t: stages.add(s))  # noqa: B023
        states.append((model.state_dict(), stages))
    model = tiny_lm()
    mq.calibrate_(model, ids, TRAINED, slices=mq.SliceConfig(scope="linear"), state=tmp_path)
    assert {linear.router.kind for linear in elastic_linears(model).values()} == {"mlp"}
    assert "sensitivity" in states[0][1]
    assert not any("sensitivity" in stages for _, stages in states[1:])
    first, energy, again = (s for s, _ in states)
    assert all(torch.equal(first[k].nan_to_num(), v.nan_to_num()) for k, v in again.items())
    assert all(torch.equal(first[k], v) for k, v in energy.items() if k.endswith((".slices", ".scale", ".zero")))
    assert not any(k.endswith(".hidden") for k in energy)


def test_checkpoints_keep_trained_routers(trained: nn.Module, tmp_path: Path) -> None:
    where = checkpoint.save(trained, tmp_path / "c")
    loaded, ids = checkpoint.load(where), tokens(2, 32, seed=9)
    for bits in (2.5, 4.0, 6.0):
        with mq.budget(trained, bits), mq.budget(loaded, bits):
            assert torch.equal(logits(loaded, ids), logits(trained, ids))
    assert torch.equal(checkpoint.load(checkpoint.save(loaded, tmp_path / "d")).lm_head.weight, loaded.lm_head.weight)


def test_a_damaged_network_is_named(trained: nn.Module, tmp_path: Path) -> None:
    trained.model.layers[0].mlp.down_proj.router.out_bias[1] = torch.nan
    try:
        where = checkpoint.save(trained, tmp_path / "c")
    finally:
        trained.model.layers[0].mlp.down_proj.router.out_bias[1] = 0.0
    with pytest.raises(CheckpointTensor, match=r"down_proj\.router\.out_bias has values 1 wrong ones"):
        checkpoint.load(where)


def test_plain_models_cannot_take_trained_routers(trained: nn.Module, tmp_path: Path) -> None:
    where = checkpoint.save(trained, tmp_path / "c")
    weight = tiny_llama().model.layers[0].mlp.up_proj.weight
    with pytest.raises(CheckpointMismatch, match="has a trained router, which a plain model cannot take"):
        weight_source(where)(weight, SliceSpec(WIDTHS, 64), "up_proj")


def test_compiled_models_use_trained_routers(trained: nn.Module, fresh_dynamo: None) -> None:
    ids = tokens(2, 32, seed=9)
    compiled = torch.compile(trained, backend="mobiquant")
    for bits in (3.0, 5.0):
        with mq.budget(trained, bits):
            wanted = logits(trained, ids)
            mq.reset_telemetry(trained)
            torch.testing.assert_close(logits(compiled, ids), wanted, rtol=1e-3, atol=1e-3)
            assert 2.0 < mq.achieved_bits(trained).total < 8.0


@pytest.mark.parametrize(("shapes", "share"), [(LLAMA_3_8B, 0.015), (SMOLLM2, 0.05)], ids=["llama-3-8b", "smollm2"])
@pytest.mark.parametrize("scope", ["input", "linear"])
def test_routers_are_small(shapes, share, scope):
    """Against the bytes of 8-bit slices, with whatever a checkpoint stores of a router counted."""
    width = mq.CalibrationConfig().router_width
    weights = sum(k * n for k, outs in shapes.values() for n in outs)
    router_bytes = 0
    for k, outs in shapes.values():
        router = router_of(k, width)
        each = sum(t.numel() * t.element_size() for t in (*router.tensors, router.thresholds))
        router_bytes += each * (len(outs) if scope == "linear" else 1)
    assert router_bytes <= share * weights
    assert torch.equal(router.gain, score_gain(WIDTHS))
