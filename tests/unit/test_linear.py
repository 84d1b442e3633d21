"""MobiLinear: the weight stand-in, buffers under casts, state dicts, copies, and the models it must fit into."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import mobiquant_compiler as mq
from mobiquant_compiler.errors import BadInput, TrainingGraph
from mobiquant_compiler.linear import MobiLinear, column_energy, elastic_linears, score_gain
from mobiquant_compiler.slices import reconstruct
from mobiquant_compiler.spec import SliceSpec
from tests.models_tiny import tiny_bert, tiny_gpt2, tiny_lm, tiny_t5, tokens, with_rebuilt_weights
from tests.tolerances import EXACT_MATH, SEVERAL_LAYERS, assert_near, relative_error

SPEC = SliceSpec((2, 2, 2, 2), 32)


def make(n: int = 24, k: int = 96, bias: bool = True, **options) -> MobiLinear:
    return MobiLinear.from_weight(torch.randn(n, k), torch.randn(n) if bias else None, SPEC, **options)


def packed(linear: MobiLinear) -> dict[str, torch.dtype]:
    return {name: b.dtype for name, b in linear.named_buffers() if name != "weight_like"}


def test_weight_stand_in_tells_shape_and_dtype_but_no_values():
    linear = make()
    assert linear.weight.shape == (24, 96)
    assert linear.weight.dtype == torch.float32
    assert linear.weight.isnan().all()
    assert linear.weight.untyped_storage().nbytes() == 4, "no memory behind it"


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_casts_move_the_stand_in_and_leave_packed_data(cast):
    linear = make()
    before, slices = packed(linear), linear.slices.clone()
    cast(linear)
    assert linear.weight.dtype in (torch.float16, torch.bfloat16, torch.float64)
    assert packed(linear) == before
    assert torch.equal(linear.slices, slices)
    x = torch.randn(3, 96, dtype=linear.weight.dtype)
    assert linear(x).dtype == x.dtype


def test_stand_in_follows_the_device():
    linear = make().to("meta")
    assert linear.weight.device.type == "meta"
    assert linear.slices.device.type == "meta"
    assert linear.slices.dtype == torch.int32


def test_casting_a_shared_router_keeps_it_shared():
    model = tiny_lm(1)
    mq.quantize_(model, calibration=tokens(2, 16))
    model.half()
    layer = model.layers[0]
    assert layer.q_proj.router is layer.k_proj.router
    assert layer.q_proj.router.token_mask is layer.down_proj.router.token_mask
    mq.set_budget(model, 2)
    assert (layer.k_proj.router.thresholds == torch.finfo(torch.float32).max).all()


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: torch.compile(m, backend="eager")], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "x", [torch.ones(3, 95), torch.ones(()), torch.ones(3, 96, dtype=torch.int32)], ids=["columns", "0-d", "int32"]
)
@pytest.mark.usefixtures("fresh_dynamo")
def test_wrong_inputs_are_an_error_that_names_them_and_the_wanted_shape(x, wrap):
    got = f"the input has dtype {x.dtype} and shape {tuple(x.shape)}; wanted floating point and shape [..., 96]."
    with pytest.raises(BadInput, match=re.escape(f"MobiLinear: {got}")):
        wrap(make())(x)


def test_full_precision_of_all_slices():
    weight, x = torch.randn(24, 96), torch.randn(5, 96)
    linear = MobiLinear.from_weight(weight, None, SPEC)
    codes = torch.as_tensor(linear.slices)
    from mobiquant_compiler.packing import unpack

    back = reconstruct(unpack(codes, SPEC, 4), linear.scale.double(), linear.zero.double(), SPEC, 4, torch.float64)
    assert_near(linear(x), x.double() @ back.t(), EXACT_MATH)
    assert relative_error(linear(x), x @ weight.t()) < 0.02


def test_deepcopy_is_independent_and_equal():
    model = tiny_lm(1)
    mq.quantize_(model, calibration=tokens(2, 16), budget=5)
    ids = tokens(1, 8)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        wanted = model(ids)
        assert torch.equal(twin(ids), wanted)
        mq.set_budget(twin, 2)
        assert torch.equal(model(ids), wanted)
        assert not torch.equal(twin(ids), wanted)
    assert mq.get_budget(model) == 5


def test_state_dict_round_trip():
    model, other = tiny_lm(1, seed=1), tiny_lm(1, seed=2)
    for each in (model, other):
        mq.quantize_(each, budget=4)
    missing = other.load_state_dict(model.state_dict())
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    with torch.no_grad():
        assert torch.equal(other(tokens(1, 8)), model(tokens(1, 8)))
    assert not any("hist" in key or "token_mask" in key or "weight_like" in key for key in model.state_dict())


def test_gain_falls_by_the_energy_that_each_slice_removes_per_bit():
    gain = score_gain((2, 2, 2, 2))
    assert gain.tolist() == pytest.approx([15 / 32, 15 / 32 / 16, 15 / 32 / 256])
    assert score_gain((4, 1)).tolist() == pytest.approx([3 / 4])
    assert score_gain((8 // 2,)).numel() == 0


def test_column_energy_is_the_variance_of_the_base_cells():
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    energy = column_energy(scale, SPEC, 40, torch.tensor([1.0, 0.5]))
    assert energy.shape == (40,)
    assert energy[0] == pytest.approx((1 + 0.5 * 9) / 12)
    assert energy[39] == pytest.approx((4 + 0.5 * 16) / 12)


def test_a_linear_of_one_slice_has_nothing_to_route():
    linear = MobiLinear.from_weight(torch.randn(8, 32), None, SliceSpec((4,), 32))
    assert linear(torch.randn(3, 32)).shape == (3, 8)
    assert linear.router.hist.tolist() == [3]


def test_empty_batch_gives_an_empty_result():
    assert make()(torch.randn(0, 96)).shape == (0, 24)
    assert make()(torch.randn(2, 0, 96)).shape == (2, 0, 24)


def test_backward_through_slices_is_an_error_even_beside_a_residual():
    linear, x = make(24, 24 * 4), torch.randn(3, 96, requires_grad=True)
    y = linear(x).sum() + x.sum()
    with pytest.raises(TrainingGraph, match="slices cannot be trained"):
        y.backward()
    with torch.no_grad():
        assert linear(x).shape == (3, 24)


def _run(model: nn.Module) -> torch.Tensor:
    ids = tokens(2, 6)
    with torch.no_grad():
        if type(model).__name__.startswith("T5"):
            return model(input_ids=ids, decoder_input_ids=ids).logits
        return model(ids)[0]


@pytest.mark.parametrize(("build", "linears"), [(tiny_gpt2, 4), (tiny_bert, 7), (tiny_t5, 16)])
def test_other_architectures_equal_themselves_with_rebuilt_weights(build, linears):
    model = build()
    coverage = mq.quantize_(model)
    assert len(coverage.rewritten) == linears
    assert_near(_run(model), _run(with_rebuilt_weights(build(), model)), SEVERAL_LAYERS)
    mq.set_budget(model, 2)
    assert _run(model).isfinite().all()


def test_half_precision_t5_reads_the_stand_in():
    model = tiny_t5()
    mq.quantize_(model)
    assert _run(model.to(torch.bfloat16)).dtype == torch.bfloat16


def test_conv1d_is_the_transpose():
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(24, 64))
    nn.init.normal_(model[0].weight)
    x = torch.randn(3, 64)
    wanted = model(x)
    mq.quantize_(model)
    assert (model[0].in_features, model[0].out_features) == (64, 24)
    assert relative_error(model(x), wanted) < 0.02


def test_elastic_linears_are_listed_once_by_name():
    model = tiny_lm(1)
    mq.quantize_(model)
    assert list(elastic_linears(model)) == [
        f"layers.0.{name}" for name in ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    ]
    assert "widths=(2, 2, 2, 2), group=64" in repr(model.layers[0].q_proj)
