"""How linears compute: `set_execution`, the pass of that name, what prefill means for budgets and ceilings."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import mobiquant_compiler as mq
from mobiquant_compiler import CompileConfig, SliceConfig
from mobiquant_compiler.backend import pipeline
from mobiquant_compiler.errors import BadOption, NotAModule, NotQuantized
from mobiquant_compiler.linear import elastic_linears
from mobiquant_compiler.passes import DEFAULT_PIPELINE
from mobiquant_compiler.spec import PREFILL_TOKENS
from tests.checkpoint_cases import tiny_llama
from tests.graphs import Passed, run_passes, without_inductor
from tests.models_tiny import Block, seeded, tiny_lm, tiny_mlp, tokens
from tests.unit.test_passes import calibrated_block

LONG, SHORT = PREFILL_TOKENS + 1, PREFILL_TOKENS


def ways(model: nn.Module) -> set[tuple[str, str]]:
    return {(linear.activation, linear.prefill) for linear in elastic_linears(model).values()}


def arguments(done: Passed) -> list[tuple[str, ...]]:
    """Return activation and prefill of every op that has them, prefill alone for routes."""
    calls = [n for n in done.gm.graph.nodes if "mobiquant" in str(n.target)]
    return [tuple(a for a in n.args[-2:] if a in ("a16", "a8", "routed", "full", "exact")) for n in calls]


def run(model: nn.Module, ids: Tensor) -> tuple[Tensor, mq.AchievedBits]:
    mq.reset_telemetry(model)
    with torch.no_grad():
        return model(ids), mq.achieved_bits(model)


@pytest.fixture(scope="module")
def calibrated() -> nn.Module:
    """A model with a table of scores and a ceiling of two slices on one layer."""
    model = tiny_lm(1)
    mq.quantize_(model, SliceConfig(ceiling={"*.down_proj": 2}), calibration=tokens(4, 32))
    return model


@pytest.fixture
def model(calibrated: nn.Module) -> nn.Module:
    return copy.deepcopy(calibrated)


def test_linears_are_made_exact_to_16_bits_and_routed(model):
    assert ways(model) == {("a16", "routed")}


def test_each_choice_is_its_own_and_goes_to_every_linear(model):
    mq.set_execution(model, prefill="full")
    assert ways(model) == {("a16", "full")}
    mq.set_execution(model, activation="a8")
    assert ways(model) == {("a8", "full")}
    mq.set_execution(torch.compile(model), activation="a16", prefill="exact")
    assert ways(model) == {("a16", "exact")}
    assert ways(copy.deepcopy(model)) == {("a16", "exact")}
    mq.set_execution(model)
    assert ways(model) == {("a16", "exact")}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"activation": "a4", "prefill": "full"}, r"'activation' got 'a4'; wanted one of \['a16', 'a8'\]"),
        ({"activation": "a8", "prefill": 1}, r"'prefill' got 1; wanted one of \['routed', 'full', 'exact'\]"),
    ],
)
def test_wrong_choices_are_refused_and_change_nothing(model, choice, message):
    with pytest.raises(BadOption, match=f"set_execution: option {message}"):
        mq.set_execution(model, **choice)
    assert ways(model) == {("a16", "routed")}


def test_a_plain_model_is_told_where_to_say_it():
    with pytest.raises(NotQuantized, match=r"set_execution: Sequential has no elastic linear .* torch\.compile"):
        mq.set_execution(tiny_mlp(), prefill="full")


@pytest.mark.parametrize("model", [None, {}, nn.Linear], ids=str)
def test_what_is_no_module_is_refused(model):
    with pytest.raises(NotAModule, match=f"set_execution: the model is of type {type(model).__name__}; wanted a torch"):
        mq.set_execution(model, prefill="full")


@pytest.mark.parametrize("bits", [2, 3, 4.5, 6.5])
def test_full_prefill_is_every_slice_below_the_ceilings_at_any_budget(model, bits):
    ids = tokens(1, LONG)
    mq.set_budget(model, bits)
    routed, _ = run(model, ids)
    high = model.layers[0].q_proj.router.state.range[1]
    with mq.budget(model, high):
        wanted, most = run(model, ids)
    mq.set_execution(model, prefill="full")
    full, achieved = run(model, ids)
    assert torch.equal(full, wanted)
    assert not torch.equal(full, routed)
    assert float(achieved) == float(most) == pytest.approx(high)
    assert achieved.layers["layers.0.down_proj"] == 4
    assert achieved.layers["layers.0.q_proj"] == 8


def test_short_calls_are_routed_whatever_prefill_says(model):
    mq.set_budget(model, 2)
    wanted = run(model, tokens(1, SHORT))
    for prefill in ("full", "exact"):
        mq.set_execution(model, prefill=prefill)
        logits, achieved = run(model, tokens(1, SHORT))
        assert torch.equal(logits, wanted[0])
        assert float(achieved) == float(wanted[1]) == 2


def test_full_prefill_without_calibration():
    model = tiny_mlp()
    mq.quantize_(model, SliceConfig(ceiling={"0": 3}), budget=2)
    mq.set_execution(model, prefill="full")
    _, achieved = run(model, torch.randn(LONG, 64))
    assert achieved.layers == {"0": 6, "2": 8}


def test_a_compiled_model_follows(model):
    mq.set_budget(model, 2)
    compiled, ids = torch.compile(model, backend=without_inductor()), tokens(1, LONG)
    assert float(run(compiled, ids)[1]) == 2
    mq.set_execution(compiled, prefill="full")
    assert run(compiled, ids)[1].layers["layers.0.q_proj"] == 8
    mq.set_execution(compiled, prefill="exact")
    assert float(run(compiled, ids)[1]) == 2
    torch._dynamo.reset()


def test_options_win_over_the_modules(model):
    mq.set_budget(model, 2)
    mq.set_execution(model, prefill="exact")
    compiled = torch.compile(model, backend=without_inductor(prefill="full"))
    assert run(compiled, tokens(1, LONG))[1].layers["layers.0.q_proj"] == 8
    assert ways(model) == {("a16", "exact")}, "the modules keep theirs"
    torch._dynamo.reset()


def test_options_reach_plain_models():
    plain = tiny_mlp()
    compiled = torch.compile(plain, backend=without_inductor(prefill="full", budget=2))
    with torch.no_grad():
        compiled(torch.randn(LONG, 64))
    assert float(mq.achieved_bits(plain)) == 8
    torch._dynamo.reset()


def test_checkpoints_keep_weights_not_ways(tmp_path):
    model = tiny_llama(1)
    mq.quantize_(model, budget=4)
    before = set(model.state_dict())
    mq.set_execution(model, activation="a8", prefill="full")
    assert set(model.state_dict()) == before
    mq.save(model, tmp_path / "saved")
    assert ways(mq.load(tmp_path / "saved")) == {("a16", "routed")}


BOTH = CompileConfig(activation="a8", prefill="full")


def test_pass_writes_what_was_asked_for_into_every_op_that_takes_it():
    block, x = calibrated_block(), torch.randn(1, LONG, 64)
    done = run_passes(block, [x], DEFAULT_PIPELINE, BOTH)
    assert done.reports[2].name == "set-execution"
    assert done.reports[2].rewritten == 7
    assert arguments(done) == [("a8", "full")] * 4
    assert done.again("set-execution").rewritten == 0
    block.q_proj.router.hist.zero_()
    y = done()[0]
    assert block.q_proj.router.hist.tolist() == [0, 0, 0, LONG]
    mq.set_execution(block, prefill="full")
    with torch.no_grad():
        assert torch.equal(y, block(x))


@pytest.mark.parametrize("after", ["share-routing", "expand-elastic", "fuse-siblings"])
def test_pass_knows_the_parts_of_a_linear_too(after):
    names = [n for n in DEFAULT_PIPELINE[: DEFAULT_PIPELINE.index(after) + 1] if n != "set-execution"]
    done = run_passes(calibrated_block(), [torch.randn(1, 9, 64)], names)
    before = arguments(done)
    done.ctx.config = BOTH
    assert done.again("set-execution").rewritten == sum(map(bool, before)) > 0
    assert arguments(done) == [("a8", "full")[2 - len(a) :] for a in before]
    assert done.again("set-execution").rewritten == 0


@pytest.mark.parametrize(
    ("config", "rewritten"),
    [
        (CompileConfig(), 0),
        (CompileConfig(activation="a16", prefill="routed"), 0),
        (CompileConfig(activation="a8"), 7),
        (CompileConfig(prefill="exact"), 7),
    ],
)
def test_pass_changes_what_is_asked_for_only(config, rewritten):
    done = run_passes(seeded(Block()), [torch.randn(1, 9, 64)], DEFAULT_PIPELINE[:3], config)
    assert done.reports[-1].rewritten == rewritten
    assert set(arguments(done)) == {(config.activation or "a16", config.prefill or "routed")}


def test_linears_that_differ_in_prefill_decide_apart():
    block = calibrated_block()
    block.k_proj.prefill = "exact"
    done = run_passes(block, [torch.randn(1, 9, 64)], DEFAULT_PIPELINE)
    assert sorted(arguments(done)) == [("a16", "exact"), *[("a16", "routed")] * 4]


@pytest.mark.parametrize("name", ["activation", "prefill"])
def test_passes_that_leave_out_the_one_that_applies_an_option_are_refused(name):
    value = {"activation": "a8", "prefill": "full"}[name]
    config = CompileConfig(**{name: value}, passes="normalise-linears,bind-slices")
    with pytest.raises(BadOption, match=f"option '{name}' got '{value}'; wanted the pass set-execution among `passes`"):
        pipeline(config)
    chosen = CompileConfig(**{name: value}, passes="bind-slices,set-execution")
    assert pipeline(chosen) == ["bind-slices", "set-execution"]
