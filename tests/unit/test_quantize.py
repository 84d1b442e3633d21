"""quantize_: what is replaced, what is left alone and why, its cost, and what it refuses first."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mobiquant_compiler as mq
from mobiquant_compiler.errors import (
    BadOption,
    BadTokens,
    BudgetOutOfRange,
    EmptyBatch,
    NonFiniteWeight,
    NotAModule,
    NothingToQuantize,
    StrictSkip,
)
from mobiquant_compiler.linear import MobiLinear, elastic_linears
from mobiquant_compiler.quantize import ANCHORS
from mobiquant_compiler.report import Skip, SkipReason
from tests.memory import PeakMemory, model_bytes
from tests.models_tiny import tiny_lm, tiny_mixtral, tokens


def reasons(coverage: mq.Coverage) -> dict[str, SkipReason]:
    return {skip.name: skip.reason for skip in coverage.skipped}


def test_every_linear_but_the_head_becomes_elastic():
    model = tiny_lm()
    coverage = mq.quantize_(model)
    assert len(coverage.rewritten) == 14
    assert reasons(coverage) == {"lm_head": SkipReason.EXCLUDED}
    assert list(coverage.rewritten) == list(elastic_linears(model))
    assert coverage.bytes_before == 2 * 4 * (4 * 64 * 64 + 3 * 64 * 96)
    assert coverage.bytes_after == sum(m.weight_bytes for m in elastic_linears(model).values())
    assert coverage.bytes_after < 0.3 * coverage.bytes_before
    assert not model.layers[0].q_proj.training


def test_names_choose_what_is_included():
    model = tiny_lm(1)
    config = mq.SliceConfig(include=("layers.0.*_proj",), exclude=("*.down_proj", "*.o_proj"))
    found = reasons(mq.quantize_(model, config))
    assert found == {
        "lm_head": SkipReason.NOT_INCLUDED,
        "layers.0.down_proj": SkipReason.EXCLUDED,
        "layers.0.o_proj": SkipReason.EXCLUDED,
    }
    assert isinstance(model.layers[0].q_proj, MobiLinear)
    assert type(model.layers[0].down_proj) is nn.Linear


def test_the_head_can_be_asked_for():
    model = tiny_lm(1)
    assert "lm_head" in mq.quantize_(model, mq.SliceConfig(exclude=())).rewritten


def test_tied_weights_are_left_alone_and_named():
    model = tiny_lm(1, tied=True)
    coverage = mq.quantize_(model, mq.SliceConfig(exclude=()))
    assert coverage.skipped == [Skip("lm_head", SkipReason.TIED, "embed.weight")]
    assert model.lm_head.weight is model.embed.weight


def test_experts_are_reported_loudly():
    coverage = mq.quantize_(tiny_mixtral())
    experts = [skip for skip in coverage.skipped if skip.reason is SkipReason.EXPERTS]
    assert len(experts) == 2
    assert all("experts" in skip.name and skip.detail.startswith("2x") for skip in experts)
    assert "3-D expert parameters" in str(coverage)


def test_what_chooses_experts_is_left_alone():
    class Mixture(nn.Module):
        def __init__(self, experts: nn.Module) -> None:
            super().__init__()
            self.gate, self.shared_expert_gate, self.experts = nn.Linear(64, 4), nn.Linear(64, 1), experts
            self.up = nn.Linear(64, 96)

    fused = nn.Module()
    fused.up = nn.Parameter(torch.randn(4, 64, 96))
    for experts, sliced in ((nn.ModuleList(nn.Linear(64, 64) for _ in range(4)), 4), (fused, 0)):
        coverage = mq.quantize_(nn.Sequential(Mixture(experts)))
        found = [skip for skip in coverage.skipped if skip.reason is SkipReason.RANKED]
        assert found == [Skip("0.gate", SkipReason.RANKED, "one of 4 experts of 0.experts")]
        assert sorted(coverage.rewritten) == sorted(
            ["0.shared_expert_gate", "0.up", *(f"0.experts.{i}" for i in range(sliced))]
        )


def test_subclasses_that_use_their_weight_themselves_are_left_alone():
    model = nn.Sequential(nn.MultiheadAttention(64, 2), nn.Linear(64, 64))
    coverage = mq.quantize_(model)
    assert reasons(coverage) == {"0.out_proj": SkipReason.UNKNOWN_TYPE}
    assert coverage.rewritten == ["1"]


@pytest.mark.parametrize(("k", "group"), [(31, "auto"), (8, "auto"), (64, 128)])
def test_narrow_layers_are_left_alone(k, group):
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(k, 16))
    coverage = mq.quantize_(model, mq.SliceConfig(group=group))
    assert reasons(coverage) == {"1": SkipReason.TOO_NARROW}
    assert coverage.skipped[0].detail == f"16 x {k}"


def test_other_dtypes_are_left_alone():
    odd = nn.Linear(64, 64)
    odd.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    coverage = mq.quantize_(nn.Sequential(nn.Linear(64, 64), odd))
    assert reasons(coverage) == {"1": SkipReason.DTYPE}
    assert coverage.skipped[0].detail == "torch.int8"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_weight_leaves_the_model_untouched(bad):
    model = tiny_lm(2)
    with torch.no_grad():
        model.layers[1].down_proj.weight[3, 4] = bad
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteWeight, match=r"layers\.1\.down_proj: weight has 1 non-finite"):
        mq.quantize_(model)
    assert not elastic_linears(model)
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )


def test_nothing_to_quantize_says_why():
    with pytest.raises(NothingToQuantize, match=r"ReLU has no linear layer to quantize \(no nn.Linear"):
        mq.quantize_(nn.ReLU())
    with pytest.raises(NothingToQuantize, match="fewer input columns"):
        mq.quantize_(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(NothingToQuantize, match=r"a linear itself, .*: wrap it in nn\.Sequential"):
        mq.quantize_(nn.Linear(64, 64))
    model = nn.Sequential(nn.Linear(64, 64))
    mq.quantize_(model)
    with pytest.raises(NothingToQuantize, match="elastic already"):
        mq.quantize_(model)


def test_what_is_no_module_is_refused():
    with pytest.raises(NotAModule, match="quantize_: the model is of type NoneType; wanted a torch"):
        mq.quantize_(None)


def test_strict_counts_only_what_nobody_asked_to_leave():
    mq.quantize_(tiny_lm(1), strict=True)  # the head is excluded by name
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(8, 8))
    with pytest.raises(StrictSkip, match=r"1 linears of graph Sequential .*fewer input columns"):
        mq.quantize_(model, strict=True)
    assert not elastic_linears(model)


def test_a_shared_module_is_replaced_wherever_it_is_held():
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    coverage = mq.quantize_(model)
    assert coverage.rewritten == ["a"]
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], MobiLinear)


def test_a_model_that_is_itself_a_linear_is_refused_with_advice():
    with pytest.raises(NothingToQuantize, match="Linear"):
        mq.quantize_(nn.Linear(64, 64))


def test_the_same_input_gives_the_same_model():
    built = [tiny_lm(2) for _ in range(2)]
    for model in built:
        mq.quantize_(model, calibration=tokens(3, 16), budget=4.5)
    first, second = (m.state_dict() for m in built)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("scope", "routers"), [("input", 4), ("linear", 7)])
def test_scope_decides_who_shares_a_router(scope, routers):
    model = tiny_lm(1)
    mq.quantize_(model, mq.SliceConfig(scope=scope), calibration=tokens(2, 16))
    layer = model.layers[0]
    assert len({id(m.router) for m in elastic_linears(model).values()}) == routers
    assert (layer.q_proj.router is layer.v_proj.router) == (scope == "input")
    assert (layer.gate_proj.router is layer.up_proj.router) == (scope == "input")
    assert layer.o_proj.router is not layer.q_proj.router
    params = {id(m.router): m.router.params for m in elastic_linears(model).values()}
    assert sum(params.values()) == 4 * 64 * 64 + 3 * 64 * 96


def test_floors_and_ceilings_reach_the_routers():
    model = tiny_lm(1)
    config = mq.SliceConfig(floor={"*.down_proj": 2}, ceiling={"*.q_proj": 3})
    mq.quantize_(model, config)
    layer = model.layers[0]
    assert (layer.down_proj.router.floor, layer.down_proj.router.ceiling) == (2, 4)
    assert (layer.q_proj.router.floor, layer.q_proj.router.ceiling) == (1, 3)


@pytest.mark.parametrize(
    ("config", "calibration"),
    [
        (mq.SliceConfig(floor={"*.q_proj": 3}, ceiling={"*.q_proj": 2}), None),
        (mq.SliceConfig(floor={"*.q_proj": 3}, ceiling={"*.k_proj": 2}), tokens(1, 8)),
    ],
    ids=["one linear", "linears that share a router"],
)
def test_contradicting_limits_are_refused_before_anything_changes(config, calibration):
    model = tiny_lm(1)
    with pytest.raises(BadOption, match="wanted floor <= ceiling"):
        mq.quantize_(model, config, calibration=calibration)
    assert not elastic_linears(model)


@pytest.mark.parametrize("option", ["floor", "ceiling"])
def test_limits_of_no_linear_are_refused_before_anything_changes(option):
    model = tiny_lm(1)
    config = mq.SliceConfig(**{option: {"*.down_proj": 2, "*.dwn_proj": 2}})
    with pytest.raises(
        BadOption, match=rf"option '{option}' got '\*\.dwn_proj'; wanted a pattern of one of the 7 linears"
    ):
        mq.quantize_(model, config)
    assert not elastic_linears(model)


def test_bad_calibration_tokens_are_refused_before_anything_changes():
    model = tiny_lm(1)
    for bad, error in [
        (torch.randn(2, 8), BadTokens),
        ("text", BadTokens),
        (torch.zeros(2, 2, 2, dtype=torch.long), BadTokens),
        (torch.zeros(0, 8, dtype=torch.long), EmptyBatch),
        (torch.zeros(2, 1, dtype=torch.long), EmptyBatch),
    ]:
        with pytest.raises(error, match="calibration: "):
            mq.quantize_(model, calibration=bad)
    assert not elastic_linears(model)


def test_calibration_leaves_parameters_mode_and_telemetry_as_they_were():
    model = tiny_lm(1).train()
    mq.quantize_(model, calibration=tokens(2, 16))
    assert model.training
    assert model.lm_head.weight.requires_grad
    assert model.lm_head.weight.grad is None
    assert mq.achieved_bits(model).tokens == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_impossible_budget_leaves_a_whole_elastic_model():
    model = tiny_lm(1)
    with pytest.raises(BudgetOutOfRange, match="2 to 8"):
        mq.quantize_(model, budget=9)
    assert mq.get_budget(model) == 8


def test_progress_counts_to_the_end():
    seen = []
    mq.quantize_(tiny_lm(1), calibration=tokens(2, 8), progress=lambda *event: seen.append(event))
    last = {stage: (done, total) for stage, done, total in seen}
    assert last == {"sensitivity": (2, 2), "slices": (7, 7), "budget table": (len(ANCHORS),) * 2}


def test_weights_made_under_inference_mode():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(64, 48))
    mq.quantize_(model)
    assert model(torch.randn(3, 64)).isfinite().all()


def test_models_quantized_under_inference_mode_can_be_used_outside():
    model = tiny_lm(1)
    with torch.inference_mode():
        calibration = tokens(2, 8)
        mq.quantize_(model, calibration=calibration)
        model(calibration)
    mq.set_budget(model, 4)
    with torch.no_grad():
        assert model(tokens(2, 8)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_above_the_model_is_one_layer(dtype):
    def extra(layers: int) -> int:
        model = nn.Sequential(*(nn.Linear(256, 192, bias=False, dtype=dtype) for _ in range(layers)))
        before = model_bytes(model)
        with PeakMemory() as memory:
            mq.quantize_(model)
        after = model_bytes(model)
        assert memory.live <= after - before + 4096, "what is gone is really gone"
        return memory.peak

    one, many = extra(1), extra(12)
    # Twelve layers may cost what one does; packed slices only replace larger weights.
    assert many <= one + 4096
    weights = 256 * 192
    assert one <= weights * 8 * 10 + 300_000, "a few float64 copies of one layer, and the token mask"


def test_a_report_reads_well():
    coverage = mq.quantize_(tiny_lm(1))
    assert str(coverage).startswith("7 of 8 linears elastic; skipped: lm_head (excluded by name); ")
    data = coverage.to_dict()
    assert data["skipped"] == [{"name": "lm_head", "reason": "excluded by name", "detail": ""}]
    assert data["bytes_before"] > data["bytes_after"] > 0
    many = mq.Coverage((), [Skip(f"l{i}", SkipReason.EXCLUDED) for i in range(7)])
    assert str(many).endswith("and 2 more")


def test_a_compiled_module_is_quantized_under_its_own_names():
    model = tiny_lm(1)
    coverage = mq.quantize_(torch.compile(model), mq.SliceConfig(exclude=("lm_head",)))
    assert "lm_head" in [skip.name for skip in coverage.skipped]
    assert not any(name.startswith("_orig_mod") for name in coverage.rewritten)
