"""`calibrate_` as a whole: better slices, the same after an interruption, refusals that cost nothing."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mobiquant_compiler as mq
from mobiquant_compiler import checkpoint
from mobiquant_compiler.calibrate import frozen
from mobiquant_compiler.calibration import run as calibration_run
from mobiquant_compiler.errors import BadOption, CalibrationStateMismatch, NoBlocks, NonFiniteWeight
from mobiquant_compiler.linear import elastic_linears, score_gain
from tests.models_tiny import tiny_gpt2, tiny_llama, tiny_lm, tiny_mlp, tokens

TOKENS = tokens(12, 32)
CODES = mq.CalibrationConfig(tune_steps=0)
SHORT = mq.CalibrationConfig(tune_steps=25)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(ids)
    return getattr(output, "logits", output)


def divergence(model: nn.Module, wanted: Tensor, ids: Tensor, bits: float) -> float:
    with mq.budget(model, bits):
        got = logits(model, ids)
    return float(nn.functional.kl_div(got.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum"))


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """One model, quantized three ways on the same tokens."""
    made = {name: tiny_llama() for name in ("plain", "free", "codes", "tuned")}
    ids = tokens(64, 64, seed=4)
    mq.quantize_(made["free"], calibration=ids)
    mq.calibrate_(made["codes"], ids, CODES)
    mq.calibrate_(made["tuned"], ids, mq.CalibrationConfig(tune_steps=150, tune_windows=8))
    return made


@pytest.mark.parametrize("bits", [2.0, 3.0, 4.0])
def test_calibrated_slices_are_better_on_other_text(models, bits):
    ids = tokens(8, 32, seed=5)
    wanted = logits(models["plain"], ids)
    free, codes, tuned = (divergence(models[name], wanted, ids, bits) for name in ("free", "codes", "tuned"))
    assert codes < 0.9 * free
    assert tuned < {2.0: 0.98, 3.0: 0.96, 4.0: 0.99}[bits] * codes


@pytest.mark.parametrize("bits", [6.0, 8.0])
def test_many_bits_stay_close_to_the_original(models, bits):
    ids = tokens(8, 32, seed=5)
    wanted = logits(models["plain"], ids)
    rough = divergence(models["free"], wanted, ids, 4.0)
    assert divergence(models["codes"], wanted, ids, bits) < 0.2 * rough
    assert divergence(models["tuned"], wanted, ids, bits) < 0.5 * rough


def test_budgets_are_met(models):
    for bits in (2.5, 3.0, 4.0, 5.0, 6.0, 7.0):
        with mq.budget(models["codes"], bits):
            mq.reset_telemetry(models["codes"])
            logits(models["codes"], TOKENS)
            assert mq.achieved_bits(models["codes"]).total == pytest.approx(bits, abs=0.3)


def test_routers_know_what_each_slice_takes_away(models):
    gains = torch.stack([m.router.gain for m in elastic_linears(models["codes"]).values()])
    assert bool((gains > 0).all() and (gains.diff(dim=1) <= 0).all())
    assert gains.unique(dim=0).shape[0] > 1
    assert not torch.allclose(gains[0], score_gain((2, 2, 2, 2)), rtol=0.01)


def test_coverage_and_what_is_left_as_it_was():
    model = tiny_lm(tied=True)
    bias = model.layers[1].down_proj.bias.clone()
    before = {n: p.clone() for n, p in model.named_parameters() if "_proj.weight" not in n}
    coverage = mq.calibrate_(model, TOKENS[:2], CODES, budget=4)
    assert len(coverage.rewritten) == 14
    assert coverage.bytes_after == sum(m.weight_bytes for m in elastic_linears(model).values())
    assert coverage.bytes_before == 2 * 4 * (4 * 64 * 64 + 3 * 64 * 96)
    assert mq.get_budget(model) == 4
    assert torch.equal(model.layers[1].down_proj.bias, bias)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.requires_grad for n, p in model.named_parameters() if "down_proj" not in n)


def test_convolutions_of_gpt2_and_a_router_per_linear():
    model, ids = tiny_gpt2(), tokens(4, 16)
    wanted = logits(model, ids)
    coverage = mq.calibrate_(model, ids, SHORT, slices=mq.SliceConfig(scope="linear"))
    assert len(coverage.rewritten) == 4
    assert len({id(m.router) for m in elastic_linears(model).values()}) == 4
    assert divergence(model, wanted, ids, 8.0) < 0.1 * divergence(model, wanted, ids, 2.0)


@pytest.mark.parametrize("slices", [{"widths": (4, 4)}, {"widths": (2,)}, {"group": 32, "widths": (1, 1, 2)}])
def test_other_slices(slices):
    slices = mq.SliceConfig(**slices)
    model = tiny_lm(1)
    assert len(mq.calibrate_(model, TOKENS[:2], SHORT, slices=slices).rewritten) == 7
    assert bool(torch.isfinite(logits(model, TOKENS[:1])).all())


def test_a_weight_is_given_up_when_its_slices_are_there() -> None:
    model = tiny_llama(layers=3)
    weights = [weakref.ref(p) for name, p in model.named_parameters() if "layers" in name and "proj" in name]
    assert len(weights) == 21
    alive = []

    def count(stage: str, done: int, total: int) -> None:
        if stage == "blocks":
            alive.append(sum(weight() is not None for weight in weights))

    mq.calibrate_(model, TOKENS, CODES, progress=count)
    assert alive == [14, 7, 0]
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_keeps_no_parameter_alive_and_lets_them_move() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model[0].bias.requires_grad_(False)
    last = weakref.ref(model[1].weight)
    swapping = torch.__future__.get_swap_module_params_on_conversion()
    with frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        model[1] = nn.ReLU()
        assert last() is None
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            model.to(torch.float64)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swapping)
    assert [p.requires_grad for p in model.parameters()] == [True, False]


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return list(one) == list(other) and all(torch.equal(one[k].nan_to_num(), other[k].nan_to_num()) for k in one)


def test_a_seed_fixes_everything():
    made = [tiny_lm() for _ in range(3)]
    for model, seed in zip(made, (0, 0, 1), strict=True):
        mq.calibrate_(model, TOKENS[:4], mq.CalibrationConfig(tune_steps=5, seed=seed))
    assert same(made[0], made[1])
    assert not same(made[0], made[2])


@pytest.mark.parametrize(("stage", "done"), [("sensitivity", 3), ("blocks", 1), ("blocks", 2), ("scales", 14)])
def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, done: int) -> None:
    def stop(at: str, step: int, total: int) -> None:
        if (at, step) == (stage, done):
            raise KeyboardInterrupt

    whole = tiny_lm()
    mq.calibrate_(whole, TOKENS[:4], SHORT)
    with pytest.raises(KeyboardInterrupt):
        mq.calibrate_(tiny_lm(), TOKENS[:4], SHORT, state=tmp_path, progress=stop)
    blocks: list[int] = []
    inner = calibration_run._block_codes
    monkeypatch.setattr(calibration_run, "_block_codes", lambda *a: blocks.append(a[2]) or inner(*a))
    steps: list[int] = []
    again = tiny_lm()
    mq.calibrate_(
        again, TOKENS[:4], SHORT, state=tmp_path, progress=lambda s, d, t: steps.append(d) if s == "scales" else None
    )
    assert same(whole, again)
    assert blocks == {"sensitivity": [0, 1], "blocks": list(range(done, 2)), "scales": []}[stage]
    assert steps[0] == (11 if stage == "scales" else 1)
    assert not list(tmp_path.glob("*.partial"))


def test_a_state_is_of_one_model_text_and_configuration(tmp_path: Path) -> None:
    mq.calibrate_(tiny_lm(1), TOKENS[:2], CODES, state=tmp_path)
    other = {
        "model": (tiny_lm(1, seed=3), TOKENS[:2], CODES, None),
        "tokens": (tiny_lm(1), TOKENS[1:3], CODES, None),
        "config narrowest": (tiny_lm(1), TOKENS[:2], mq.CalibrationConfig(tune_steps=0, narrowest=1.0), None),
        "slices group": (tiny_lm(1), TOKENS[:2], CODES, mq.SliceConfig(group=32)),
    }
    for what, (model, ids, config, slices) in other.items():
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(CalibrationStateMismatch, match=f"a run with another {what}"):
            mq.calibrate_(model, ids, config, slices=slices, state=tmp_path)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_models_that_cannot_be_calibrated_are_left_alone():
    model = tiny_mlp()
    with pytest.raises(NoBlocks):
        mq.calibrate_(model, TOKENS, CODES)
    assert not elastic_linears(model)
    model = tiny_lm()
    with torch.no_grad():
        model.layers[1].q_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteWeight):
        mq.calibrate_(model, TOKENS, CODES)
    assert not elastic_linears(model)


def test_blocks_that_are_no_chain_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    model, stages = tiny_lm(), []
    model.layers[1].register_forward_pre_hook(lambda block, args: (args[0] + 1, *args[1:]))
    with pytest.raises(NoBlocks, match="block 1 is not fed the output of the block before"):
        mq.calibrate_(model, TOKENS, CODES, state=tmp_path, progress=lambda stage, *_: stages.append(stage))
    assert not stages
    assert not list(tmp_path.iterdir())
    assert not elastic_linears(model)


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight_growth": 0},
        {"narrowest": 1.5},
        {"guided": 1},
        {"damping": -1.0},
        {"propagate": 0},
        {"tune_steps": -1},
        {"tune_rate": float("inf")},
        {"tune_decay": -1.0},
        {"tune_decay": 112.0},
        {"tune_windows": 0},
        {"seed": 0.5},
    ],
)
def test_wrong_options_are_named(wrong):
    (name,) = wrong
    with pytest.raises(BadOption, match=f"CalibrationConfig: option '{name}'"):
        mq.CalibrationConfig(**wrong)


def test_options_as_plain_data():
    config = mq.CalibrationConfig(seed=3, propagate=2)
    assert mq.CalibrationConfig.from_dict(config.to_dict()) == config
    with pytest.raises(BadOption, match="at most 4, the slices"):
        mq.calibrate_(tiny_lm(1), TOKENS, mq.CalibrationConfig(propagate=5))


def test_blocks_see_what_the_slices_before_them_give():
    """With few slices in the blocks before, a block's codes differ; the first block's do not."""
    made = [tiny_lm() for _ in range(2)]
    for model, count in zip(made, (None, 1), strict=True):
        mq.calibrate_(model, TOKENS[:4], mq.CalibrationConfig(tune_steps=0, propagate=count))
    first, second = (
        [torch.equal(*(getattr(m.layers[i], n).slices for m in made)) for n in ("q_proj", "down_proj")] for i in (0, 1)
    )
    assert all(first)
    assert not any(second)


def test_tokens_are_weighed_only_if_guided():
    made = [tiny_lm(1) for _ in range(2)]
    for model, guided in zip(made, (True, False), strict=True):
        mq.calibrate_(model, TOKENS[:4], mq.CalibrationConfig(tune_steps=0, guided=guided))
    assert not torch.equal(made[0].layers[0].q_proj.slices, made[1].layers[0].q_proj.slices)


def test_checkpoints_keep_measured_gains(models, tmp_path):
    loaded = checkpoint.load(checkpoint.save(models["tuned"], tmp_path / "c"))
    assert same(loaded, models["tuned"])
    ids = tokens(2, 32, seed=9)
    for bits in (2.5, 4.0):
        with mq.budget(models["tuned"], bits), mq.budget(loaded, bits):
            assert torch.equal(logits(loaded, ids), logits(models["tuned"], ids))
