"""Weights of plain models are looked up at every call: no swap, load or edit gives a stale result."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn

import mobiquant_compiler as mq
from mobiquant_compiler.backend import REPORTS
from mobiquant_compiler.errors import NonFiniteWeight
from mobiquant_compiler.linear import elastic_linears
from mobiquant_compiler.runtime.weights import BOUND
from tests.graphs import without_inductor
from tests.models_tiny import tiny_llama, tiny_lm, tiny_mlp, tokens
from tests.tolerances import COMPILED, assert_near

FLOAT32 = mq.SliceConfig(scale_dtype="float32")


@pytest.fixture(autouse=True)
def _fresh(fresh_dynamo):
    with torch.no_grad():
        yield


def eager(model: nn.Module, x: Tensor, bits: float | None = None) -> Tensor:
    """Return what an elastic copy of the model says, packed from its weights as they are now."""
    twin = copy.deepcopy(model)
    mq.quantize_(twin, FLOAT32, budget=bits)
    return twin(x)


def replace_parameter(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(torch.randn(48, 64))


def load(model: nn.Sequential) -> None:
    model.load_state_dict(tiny_mlp(seed=5).state_dict())


def load_assigned(model: nn.Sequential) -> None:
    model.load_state_dict(tiny_mlp(seed=6).state_dict(), assign=True)


def edit(model: nn.Sequential) -> None:
    model[0].weight.mul_(-2)


def edit_a_view(model: nn.Sequential) -> None:
    model[2].weight[3:7].zero_()


def set_data(model: nn.Sequential) -> None:
    model[0].weight.data = torch.randn(48, 64)


def set_data_twice(model: nn.Sequential) -> None:
    for _ in range(2):  # the second new tensor may get the memory of the first old one
        model[0].weight.data = torch.randn(48, 64)


def set_data_with_offset(model: nn.Sequential) -> None:
    model[0].weight.data = torch.randn(96, 64)[48:]


CHANGES = [replace_parameter, load, load_assigned, edit, edit_a_view, set_data, set_data_twice, set_data_with_offset]


@pytest.mark.slow
def test_no_change_of_weights_gives_a_stale_result_under_inductor():
    model, x = tiny_mlp(), torch.randn(3, 64)
    compiled = torch.compile(model, backend="mobiquant")
    before = len(REPORTS)
    for change in [lambda m: None, *CHANGES, *CHANGES]:
        change(model)
        assert_near(compiled(x), eager(model, x), COMPILED)
    assert len(REPORTS) - before <= 3, "changed weights do not compile anew (swapped parameters may, once)"


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_a_change_keeps_the_budget_of_the_others(change):
    model, x = tiny_mlp(), torch.randn(3, 64)
    compiled = torch.compile(model, backend=without_inductor())
    compiled(x)
    mq.set_budget(compiled, 2)
    change(model)
    y = compiled(x)
    if change is load_assigned:
        return  # every weight is another: a new model, at the budget of the options
    assert_near(y, eager(model, x, 2), COMPILED)


def test_memory_that_comes_back_is_not_taken_for_the_old_weight():
    model, x, memory = tiny_mlp(), torch.randn(3, 64), torch.randn(48, 64).numpy()
    compiled = torch.compile(model, backend=without_inductor())
    addresses = set()
    for _ in range(2):  # new storages over the same memory, as an allocator gives it back
        memory *= -1.5
        memory[0] = 0
        model[0].weight.data = torch.from_numpy(memory)
        addresses.add(model[0].weight.data_ptr())
        assert_near(compiled(x), eager(model, x), COMPILED)
    assert len(addresses) == 1


def test_packing_happens_once_a_weight(monkeypatch):
    made = []
    original = BOUND._make
    monkeypatch.setattr(BOUND, "_make", lambda *a: made.append(1) or original(*a))
    model = tiny_mlp()
    compiled = torch.compile(model, backend=without_inductor(), dynamic=True)
    for length in (3, 4, 3):
        compiled(torch.randn(length, 64))
    assert len(made) == 2
    model[0].weight.add_(1)
    compiled(torch.randn(3, 64))
    compiled(torch.randn(3, 64))
    assert len(made) == 3


def test_changed_weights_keep_the_addresses_of_their_slices():
    model = tiny_mlp()
    compiled = torch.compile(model, backend=without_inductor())
    compiled(torch.randn(3, 64))
    before = {name: m.slices.data_ptr() for name, m in BOUND.of_model(model).items()}
    model[0].weight.mul_(3)
    compiled(torch.randn(3, 64))
    assert {name: m.slices.data_ptr() for name, m in BOUND.of_model(model).items()} == before


def test_slices_die_with_their_weights():
    model = tiny_mlp()
    torch.compile(model, backend=without_inductor())(torch.randn(3, 64))
    before = len(BOUND._entries)
    assert len(BOUND.of_model(model)) == 2
    del model
    torch._dynamo.reset()
    gc.collect()
    assert len(BOUND._entries) <= before - 2


def test_forgotten_slices_are_packed_anew():
    model, x = tiny_mlp(), torch.randn(3, 64)
    compiled = torch.compile(model, backend=without_inductor())
    compiled(x)
    model[0].weight.data.mul_(-1)  # leaves no trace that could be seen
    assert mq.refresh(model) == 2
    assert_near(compiled(x), eager(model, x), COMPILED)


@pytest.mark.slow
@pytest.mark.parametrize("elastic", [False, True], ids=["plain", "quantized"])
def test_compiling_layer_by_layer_is_right_for_every_layer(elastic):
    model, ids = tiny_lm(3), tokens(2, 7)
    wanted_model = copy.deepcopy(model)
    mq.quantize_(wanted_model, FLOAT32)
    wanted = wanted_model(ids)
    if elastic:
        mq.quantize_(model, FLOAT32)
    before = len(REPORTS)
    for layer in model.layers:
        layer.compile(backend="mobiquant", fullgraph=True)
    assert_near(model(ids), wanted, COMPILED)
    assert len(REPORTS) - before == 1, "one graph serves all layers"
    mq.set_budget(model, 4)
    mq.set_budget(wanted_model, 4)
    states = {id(r.router.state) for r in BOUND.of_model(model).values()}
    if elastic:
        assert_near(model(ids), wanted_model(ids), COMPILED)
    else:
        assert len(states) == 3
        mq.reset_telemetry(model)
        model(ids)
        assert float(mq.achieved_bits(model)) == pytest.approx(4, abs=0.2)


def test_one_weight_in_both_orientations():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.w) - x @ self.w

    model, x = Both(), torch.randn(5, 64)
    compiled = torch.compile(model, backend=without_inductor())
    for _ in range(2):
        spec = mq.SliceSpec((2, 2, 2, 2), 64)
        parts = [mq.MobiLinear.from_weight(w, None, spec, scale_dtype=torch.float32)(x) for w in (model.w, model.w.t())]
        assert_near(compiled(x), parts[0] - parts[1], COMPILED)


def test_two_compilations_of_one_model_do_not_take_each_others_slices():
    model, x = tiny_mlp(), torch.randn(3, 64)
    fine = torch.compile(model, backend=without_inductor())
    coarse = torch.compile(copy.copy(model), backend=without_inductor(slices={"widths": (2,)}))
    first, second = fine(x), coarse(x)
    assert not torch.equal(first, second)
    for _ in range(2):
        assert torch.equal(fine(x), first)
        assert torch.equal(coarse(x), second)


def test_a_weight_that_turns_bad_is_an_error_not_garbage():
    model, x = tiny_mlp(), torch.randn(3, 64)
    compiled = torch.compile(model, backend=without_inductor())
    compiled(x)
    model[0].weight[1, 2] = float("inf")
    with pytest.raises(NonFiniteWeight, match="0: weight has 1 non-finite"):
        compiled(x)


def test_weights_made_under_inference_mode():
    with torch.inference_mode():
        model = tiny_mlp()
        compiled = torch.compile(model, backend=without_inductor())
        x = torch.randn(3, 64)
        y = compiled(x)
        mq.set_budget(compiled, 4)
        compiled(x)
    assert_near(y, eager(model, x), COMPILED)


def test_slices_may_come_from_a_checkpoint(tmp_path):
    from mobiquant_compiler.checkpoint import save

    ids = tokens(2, 8)
    elastic = tiny_llama(1)
    mq.quantize_(elastic, FLOAT32, calibration=tokens(4, 16), budget=5)
    save(elastic, tmp_path / "packed")
    plain = tiny_llama(1)
    backend = without_inductor(checkpoint=str(tmp_path / "packed"))
    compiled = torch.compile(plain, backend=backend)
    assert_near(compiled(ids, use_cache=False).logits, elastic(ids).logits, COMPILED)
    # Router, table and budget are the checkpoint's, too.
    for bits in (3.3, 6.1):
        mq.set_budget(compiled, bits)
        mq.set_budget(elastic, bits)
        assert_near(compiled(ids, use_cache=False).logits, elastic(ids).logits, COMPILED)
    plain.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(mq.MobiQuantError, match="matches no linear in it"):
        compiled(ids, use_cache=False)


def test_linears_of_a_checkpoint_that_share_a_router_are_compiled_by_inductor(tmp_path):
    from mobiquant_compiler.checkpoint import save

    ids = tokens(2, 8)
    elastic = tiny_llama(1)
    mq.quantize_(elastic, FLOAT32, calibration=tokens(4, 16), budget=5)
    linears = elastic_linears(elastic).values()
    assert len({id(linear.router) for linear in linears}) < len(linears)
    save(elastic, tmp_path / "packed")
    options = {"checkpoint": str(tmp_path / "packed")}
    compiled = torch.compile(tiny_llama(1), backend="mobiquant", options=options)
    compiled(ids, use_cache=False)
    for bits in (5, 3.3):
        mq.set_budget(compiled, bits)
        mq.set_budget(elastic, bits)
        mq.reset_telemetry(compiled)
        mq.reset_telemetry(elastic)
        assert_near(compiled(ids, use_cache=False).logits, elastic(ids).logits, COMPILED)
        assert mq.achieved_bits(compiled).total == mq.achieved_bits(elastic).total


class TestTheBudgetOfAnOption:
    """It is what to start with: graphs that are compiled later leave what was set since."""

    @pytest.mark.parametrize("plain", [True, False])
    def test_later_graphs_leave_what_was_set(self, plain: bool):
        model = tiny_mlp()
        if not plain:
            mq.quantize_(model)
        compiled = torch.compile(model, backend=without_inductor(budget=6))
        compiled(torch.randn(4, 64))
        assert mq.get_budget(model) == 6
        mq.set_budget(model, 3)
        compiled(torch.randn(5, 64))
        assert mq.get_budget(model) == 3

    @pytest.mark.parametrize("plain", [True, False])
    def test_another_option_is_followed(self, plain: bool):
        model = tiny_mlp()
        if not plain:
            mq.quantize_(model)
        torch.compile(model, backend=without_inductor(budget=6))(torch.randn(4, 64))
        torch._dynamo.reset()
        torch.compile(model, backend=without_inductor(budget=3))(torch.randn(4, 64))
        assert mq.get_budget(model) == 3

    @pytest.mark.parametrize("plain", [True, False])
    def test_one_that_is_out_of_range_is_an_error_every_time(self, plain: bool):
        model, x = tiny_mlp(), torch.randn(4, 64)
        if not plain:
            mq.quantize_(model)
        compiled = torch.compile(model, backend=without_inductor(budget=9))
        for _ in range(2):
            with pytest.raises(Exception, match="budget 9"):
                compiled(x)
        torch._dynamo.reset()
        torch.compile(model, backend=without_inductor(budget=3))(x)
        assert mq.get_budget(model) == 3
