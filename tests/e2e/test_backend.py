"""The backend as users call it: by name, over budgets and shapes, with modes and options, through Inductor."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import mobiquant_compiler as mq
from mobiquant_compiler.backend import REPORTS
from mobiquant_compiler.errors import BadOption, StrictSkip, TrainingGraph, UnknownOption
from mobiquant_compiler.report import SkipReason
from tests.graphs import without_inductor
from tests.models_tiny import tiny_llama, tiny_lm, tiny_mlp, tokens
from tests.tolerances import COMPILED, assert_near, relative_error

BUDGETS = [8, 2.5, 5, 3, 7.25, 4, 2, 6, 3.5, 8]


class Counted:
    """How many graphs the backend compiled in a block."""

    def __enter__(self) -> Counted:
        self.before = REPORTS[-1] if REPORTS else None
        return self

    def __exit__(self, *error: object) -> None:
        reports = list(REPORTS)
        start = next((i + 1 for i, r in enumerate(reports) if r is self.before), 0)
        self.reports = reports[start:]
        self.count = len(self.reports)


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo):
    with torch.no_grad():
        yield


@pytest.mark.slow
def test_the_entry_point_works_without_importing_the_package_first():
    script = """
import sys, torch
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 48), nn.ReLU()).eval()
assert "mobiquant_compiler" not in sys.modules
assert "mobiquant" in torch.compiler.list_backends()
compiled = torch.compile(model, backend="mobiquant", fullgraph=True)
x = torch.randn(3, 64)
with torch.no_grad():
    error = (compiled(x) - model(x)).abs().max() / model(x).abs().max()
assert 0 < error < 0.02, error
import mobiquant_compiler as mq
mq.set_budget(compiled, 2)
with torch.no_grad():
    assert (compiled(x) - model(x)).abs().max() / model(x).abs().max() > 0.1
assert mq.achieved_bits(compiled).tokens == 6
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"


@pytest.mark.slow
def test_ten_budgets_compile_once_and_leave_no_trace_in_the_output():
    model, ids = tiny_lm(2), tokens(2, 12)
    mq.quantize_(model, calibration=tokens(4, 32))
    compiled = torch.compile(model, backend="mobiquant", fullgraph=True)
    eager, swept = {}, {}
    with Counted() as counted:
        for bits in BUDGETS:
            mq.set_budget(compiled, bits)
            eager[bits], swept[bits] = model(ids), compiled(ids)
            assert_near(swept[bits], eager[bits], COMPILED)
        for bits in reversed(BUDGETS):  # after other budgets than before
            mq.set_budget(compiled, bits)
            assert torch.equal(compiled(ids), swept[bits])
    assert counted.count == 1
    assert relative_error(swept[2], swept[8]) > 0.05
    (report,) = counted.reports
    assert len(report.coverage.rewritten) == 14
    launches = {op: count for op, count in report.nodes_after.items() if op.startswith("mobiquant.")}
    assert launches == {"mobiquant.elastic_linears": 4, "mobiquant.elastic_linear": 4}
    assert [skip.reason for skip in report.coverage.skipped] == [SkipReason.EXCLUDED]
    # Shared decisions are counted once a token in a compiled graph.
    mq.reset_telemetry(compiled)
    mq.set_budget(compiled, 5)
    compiled(ids)
    achieved = mq.achieved_bits(compiled)
    assert achieved.tokens == ids.numel()
    assert set(achieved.layers) == set(report.coverage.rewritten)


class Siblings(nn.Module):
    """Five linears of one input, some with bias, and one of an input that is written to in between."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(64, 8 * i + 8, bias=i % 2 == 0) for i in range(5))
        self.last = nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        parts = [linear(x) for linear in self.each]
        x.mul_(parts[0].sum(-1, keepdim=True).tanh())
        return torch.cat([*parts, self.last(x)], -1)


@pytest.mark.slow
def test_siblings_of_any_width_and_bias_go_through_inductor():
    model, x = Siblings().eval(), torch.randn(2, 9, 64)
    mq.quantize_(model, budget=5)
    for linear in model.each[1:]:
        linear.router = model.each[0].router
    compiled = torch.compile(model, backend="mobiquant", fullgraph=True)
    with Counted() as counted:
        for bits in (5, 2, 8):
            mq.set_budget(model, bits)
            assert_near(compiled(x), model(x), COMPILED)
    (report,) = counted.reports
    launches = {op: count for op, count in report.nodes_after.items() if op.startswith("mobiquant.")}
    assert launches == {f"mobiquant.{op}": 1 for op in ("route", "routed_linears", "routed_linear", "elastic_linear")}
    mq.reset_telemetry(model)
    compiled(x)
    assert int(model.each[0].router.hist.sum()) == 18


@pytest.mark.slow
def test_execution_may_change_after_compiling_and_options_win():
    model, ids = tiny_lm(1), tokens(1, 80)
    mq.quantize_(model, budget=2)
    results = {}
    for options in ({}, {"prefill": "routed"}):
        compiled = torch.compile(model, backend="mobiquant", options=options, fullgraph=True)
        for prefill in ("routed", "full"):
            mq.set_execution(compiled, prefill=prefill)
            mq.reset_telemetry(model)
            compiled(ids)
            results[bool(options), prefill] = float(mq.achieved_bits(model))
    assert results == {(False, "routed"): 2, (False, "full"): 8, (True, "routed"): 2, (True, "full"): 2}


def test_lengths_and_batches_may_change():
    model = tiny_mlp()
    mq.quantize_(model, budget=5)
    compiled = torch.compile(model, backend="mobiquant", fullgraph=True)
    with Counted() as counted:
        for batch, length in [(2, 9), (2, 11), (3, 7), (5, 31), (2, 40), (4, 4)]:
            x = torch.randn(batch, length, 64)
            assert_near(compiled(x), model(x), COMPILED)
    assert counted.count <= 3  # the first shape, then symbolic lengths and batches


def test_lengths_and_batches_of_a_transformer_may_change():
    model = tiny_lm(1)
    mq.quantize_(model, calibration=tokens(4, 16), budget=5)
    compiled = torch.compile(model, backend=without_inductor(), fullgraph=True)
    with Counted() as counted:
        for shape in [(2, 9), (2, 11), (3, 7), (5, 31), (2, 40), (4, 4), (1, 1), (1, 5)]:
            ids = tokens(*shape, seed=sum(shape))
            assert_near(compiled(ids), model(ids), COMPILED)
    assert counted.count <= 6


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_are_accepted(mode):
    model = tiny_mlp()
    mq.quantize_(model)
    x = torch.randn(3, 64)
    compiled = torch.compile(model, backend="mobiquant", mode=mode)
    assert_near(compiled(x), model(x), COMPILED)


@pytest.mark.slow
def test_plain_models_equal_quantized_ones_and_take_a_budget():
    plain, elastic, ids = tiny_lm(1), tiny_lm(1), tokens(2, 8)
    mq.quantize_(elastic, mq.SliceConfig(scale_dtype="float32"))
    config = {"budget": 5, "inductor": {"max_autotune": False}}
    compiled = torch.compile(plain, backend="mobiquant", options=config, fullgraph=True)
    compiled(ids)
    assert mq.get_budget(compiled) == 5
    with Counted() as counted:
        for bits in (8, 4, 2):
            mq.set_budget(compiled, bits)
            mq.set_budget(elastic, bits)
            assert_near(compiled(ids), elastic(ids), COMPILED)
    assert counted.count == 0
    mq.reset_telemetry(compiled)
    compiled(ids)
    assert float(mq.achieved_bits(compiled)) == 2
    assert "layers.0.up_proj" in mq.achieved_bits(compiled).layers


def test_limits_hold_for_plain_models_too():
    model = tiny_mlp()
    slices = {"ceiling": {"0": 2}, "floor": {"2": 3}}
    compiled = torch.compile(model, backend="mobiquant", options={"slices": slices})
    compiled(torch.randn(4, 64))
    assert mq.achieved_bits(compiled).layers == {"0": 4.0, "2": 8.0}
    mq.reset_telemetry(compiled)
    mq.set_budget(compiled, mq.get_budget(compiled) - 0.01)
    with pytest.raises(mq.MobiQuantError, match="or change floors and ceilings"):
        mq.set_budget(compiled, 2)


def test_tied_head_keeps_its_weight():
    model, ids = tiny_llama(1, tied=True), tokens(1, 6)
    compiled = torch.compile(model, backend=without_inductor(slices={"exclude": ()}), fullgraph=True)
    with Counted() as counted:
        logits = compiled(ids, use_cache=False).logits
    (report,) = counted.reports
    assert [(s.reason, s.name) for s in report.coverage.skipped] == [(SkipReason.TIED, "lm_head")]
    assert relative_error(logits, model(ids).logits) < 0.05
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_transformers_generate_uses_a_compiled_model():
    model, ids = tiny_llama(1), tokens(1, 5)
    mq.quantize_(model, calibration=tokens(2, 16), budget=5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, **options)
    model.forward = torch.compile(model.forward, backend=without_inductor())
    with Counted() as counted:
        assert torch.equal(model.generate(ids, **options), wanted)
    assert counted.count > 0
    mq.set_budget(model, 2)
    assert model.generate(ids, **options).shape == wanted.shape


@pytest.mark.slow
def test_inference_mode_then_no_grad():
    model, x = tiny_mlp(), torch.randn(3, 64)
    compiled = torch.compile(model, backend="mobiquant")
    with torch.inference_mode():
        first = compiled(x)
        mq.set_budget(compiled, 3)
        second = compiled(x)
    mq.set_budget(compiled, 8)
    assert_near(compiled(x), first, COMPILED)
    mq.set_budget(compiled, 3)
    assert_near(compiled(x), second, COMPILED)


def inner(caught: pytest.ExceptionInfo) -> BaseException:
    """Return our error inside of Dynamo's."""
    return getattr(caught.value, "inner_exception", caught.value)


def test_training_a_plain_model_is_an_error_that_says_what_to_do():
    model = tiny_mlp()
    compiled = torch.compile(model, backend="mobiquant")
    with (
        torch.enable_grad(),
        pytest.raises(Exception, match=r"gradients of the weight of 0; .*torch\.no_grad") as caught,
    ):
        compiled(torch.randn(3, 64))
    assert isinstance(inner(caught), TrainingGraph)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.enable_grad():
        assert compiled(torch.randn(3, 64)).shape == (3, 33)


def test_a_gradient_through_an_elastic_linear_is_an_error_not_a_silent_zero():
    model = tiny_mlp()
    mq.quantize_(model)
    compiled = torch.compile(model, backend=without_inductor())
    with torch.enable_grad(), pytest.raises(Exception, match="gradients of the input of") as caught:
        compiled(torch.randn(3, 64, requires_grad=True))
    assert isinstance(inner(caught), TrainingGraph)
    with torch.enable_grad():  # nothing asks for a gradient here
        assert compiled(torch.randn(3, 64)).shape == (3, 33)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bugdet": 4}, UnknownOption, "unknown option 'bugdet'; known options are budget"),
        ({"budget": "four"}, BadOption, "option 'budget' got 'four'"),
        ({"prefill": "fast"}, BadOption, "option 'prefill' got 'fast'"),
        ({"activation": "a8", "passes": "bind-slices"}, BadOption, "wanted the pass set-execution among"),
        ({"budget": 9}, mq.MobiQuantError, "budget 9 bits is out of range; this model can give 2 to 8"),
        ({"passes": "bind-slcies"}, mq.MobiQuantError, "no pass is named 'bind-slcies'"),
        ({"slices": {"group": 7}}, BadOption, "option 'group' got 7"),
        ({"checkpoint": "nowhere"}, BadOption, "option 'checkpoint' got 'nowhere'"),
        ({"slices": {"floor": {"0": 3}, "ceiling": {"0": 2}}}, BadOption, "wanted floor <= ceiling"),
    ],
)
def test_wrong_options_are_refused_through_torch_compile(options, error, message):
    compiled = torch.compile(tiny_mlp(), backend="mobiquant", options=options)
    with pytest.raises(Exception, match=message) as caught:
        compiled(torch.randn(3, 64))
    assert isinstance(inner(caught), error)


def test_unknown_keywords_of_torch_compile_are_refused():
    from mobiquant_compiler.backend import mobiquant

    with pytest.raises(UnknownOption, match="unknown option 'colour'; known options are mode, options, name"):
        mobiquant(None, [], colour="red")


def test_strict_names_what_was_left():
    model = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 64)).eval()
    compiled = torch.compile(model, backend="mobiquant", options={"strict": True})
    with pytest.raises(
        Exception, match=r"1 linears of graph graph-\d+ were not rewritten: 1 \(fewer input columns"
    ) as caught:
        compiled(torch.randn(3, 64))
    assert isinstance(inner(caught), StrictSkip)


def test_strict_accepts_what_was_excluded_by_name():
    model = nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 64)).eval()
    options = {"strict": True, "slices": {"exclude": ("1",)}, "passes": "normalise-linears,bind-slices"}
    assert torch.compile(model, backend="mobiquant", options=options)(torch.randn(3, 64)).shape == (3, 64)


def test_graphs_without_linears_are_inductors():
    compiled = torch.compile(nn.Sequential(nn.ReLU()), backend="mobiquant", options={"strict": True, "budget": 4})
    x = torch.randn(3, 4)
    assert torch.equal(compiled(x), x.relu())


def test_empty_batches_run():
    model = tiny_mlp()
    mq.quantize_(model)
    compiled = torch.compile(model, backend="mobiquant", dynamic=False)
    assert compiled(torch.randn(0, 64)).shape == (0, 33)
