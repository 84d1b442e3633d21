"""Scales tuned through the model, and the allocation that draws slice counts for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div

import mobiquant_compiler as mq
from mobiquant_compiler.calibration.allocation import Costs, allocate, falling_gains
from mobiquant_compiler.calibration.tuning import TOP, Teacher, _Adam, _Multiply, _Tunable, answers
from mobiquant_compiler.linear import MobiLinear, elastic_linears
from mobiquant_compiler.packing import unpack
from mobiquant_compiler.slices import reconstruct
from mobiquant_compiler.spec import SliceSpec
from tests.models_tiny import tiny_lm, tokens

BITS = torch.tensor([2.0, 4.0, 6.0, 8.0], dtype=torch.float64)


def costs_of(losses: list[list[float]], params: list[float]) -> Costs:
    groups = [[f"l{i}"] for i in range(len(params))]
    return Costs(groups, torch.tensor(losses, dtype=torch.float64), torch.tensor(params, dtype=torch.float64), BITS)


class TestAllocation:
    def test_bits_go_where_they_take_most_away(self) -> None:
        costs = costs_of([[16, 1, 0.1, 0.01], [1600, 100, 10, 1], [1.6, 0.1, 0.01, 0.001]], [1, 1, 1])
        assert allocate(costs, 2.0).tolist() == [1, 1, 1]
        assert allocate(costs, 2.7).tolist() == [1, 2, 1]
        assert allocate(costs, 8.0).tolist() == [4, 4, 4]

    def test_large_linears_are_dearer(self) -> None:
        assert allocate(costs_of([[16, 1, 0.1, 0], [16, 1, 0.1, 0]], [1, 100]), 2.02).tolist() == [2, 1]

    def test_budgets_are_met_and_never_fall(self) -> None:
        generator = torch.Generator().manual_seed(0)
        base = torch.exp(2 * torch.randn(60, 1, generator=generator, dtype=torch.float64))
        costs = costs_of((base * torch.tensor([16.0, 1.0, 0.07, 0.004])).tolist(), [1.0] * 60)
        before = torch.ones(60, dtype=torch.int64)
        for budget in (2.5, 3.0, 4.0, 5.5, 7.0):
            counts = allocate(costs, budget)
            assert float(BITS[counts - 1].mean()) == pytest.approx(budget, abs=0.05)
            assert bool((counts >= before).all())
            before = counts

    def test_noise_moves_counts_but_not_the_average(self) -> None:
        costs = costs_of([[16.0 * (i + 1), i + 1.0, 0.1, 0.01] for i in range(40)], [1.0] * 40)
        noise = torch.randn(40, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        plain, moved = allocate(costs, 4.0), allocate(costs, 4.0, noise)
        assert not torch.equal(plain, moved)
        assert float(BITS[moved - 1].mean()) == pytest.approx(4.0, abs=0.1)

    def test_a_slice_that_makes_it_worse_is_worth_next_to_nothing(self) -> None:
        gains = falling_gains(torch.tensor([[4.0, 5.0, 1.0, 1.0]], dtype=torch.float64), BITS)
        assert gains.tolist() == [[1e-9, 1e-9, 1e-9]]


class TestTeacher:
    def test_divergence_is_exact_where_all_tokens_are_kept(self) -> None:
        original, other = torch.randn(3, 5, TOP), torch.randn(3, 5, TOP)
        teacher = Teacher(*answers(original))
        windows = torch.tensor([2, 0])
        got = teacher.divergence(other[windows], windows)
        logs = [t[windows].log_softmax(-1) for t in (other, original)]
        wanted = kl_div(*logs, log_target=True, reduction="sum") / 10
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)

    def test_tokens_that_are_not_kept_count_as_one(self) -> None:
        original = torch.randn(1, 4, 3 * TOP)
        teacher, window = Teacher(*answers(original)), torch.tensor([0])
        assert float(teacher.divergence(original, window)) == pytest.approx(0, abs=1e-5)
        full = kl_div(
            torch.zeros(1, 4, 3 * TOP).log_softmax(-1), original.log_softmax(-1), log_target=True, reduction="sum"
        )
        lumped = float(teacher.divergence(torch.zeros(1, 4, 3 * TOP), window))
        assert 0.5 * float(full) / 4 < lumped < float(full) / 4


def linear(count: int, k: int = 48) -> tuple[MobiLinear, _Tunable]:
    torch.manual_seed(0)
    source = MobiLinear.from_weight(torch.randn(6, k), torch.randn(6), SliceSpec((2, 2, 2, 2), 32))
    stand_in = _Tunable(source)
    stand_in.count = count
    return source, stand_in


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_stand_in_multiplies_like_the_linear(count):
    source, stand_in = linear(count)
    source.router.thresholds[count - 1 :] = torch.inf
    x = torch.randn(3, 5, 48)
    torch.testing.assert_close(stand_in(x), source(x), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_gradients_are_those_of_the_arithmetic(count):
    """Against autograd through `reconstruct` in float32; the stand-in's own arithmetic is bfloat16."""
    source, stand_in = linear(count)
    x, direction = torch.randn(64, 48), torch.randn(64, 6)
    log_scale, zero = torch.zeros_like(stand_in.scale), source.zero.float()
    inputs = [t.clone().requires_grad_() for t in (x, log_scale, zero)]
    codes = unpack(source.slices, source.spec, count)
    weight = reconstruct(codes, source.scale.float() * inputs[1].exp(), inputs[2], source.spec, count)[:, :48]
    wanted = torch.autograd.grad((inputs[0] @ weight.t() * direction).sum(), inputs)
    ours = [t.clone().requires_grad_() for t in (x, log_scale, zero)]
    y = _Multiply.apply(ours[0].to(torch.bfloat16), ours[1], ours[2], stand_in)
    got = torch.autograd.grad((y.float() * direction).sum(), ours)
    for a, b in zip(got, wanted, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.02


def weight_of(linear: MobiLinear) -> torch.Tensor:
    """Return ``W_E`` without padding."""
    spec = linear.spec
    codes = unpack(linear.slices, spec, spec.num_slices)
    return reconstruct(codes, linear.scale, linear.zero, spec, spec.num_slices)[:, : linear.in_features]


@pytest.mark.parametrize(
    ("widths", "held"), [((2, 2, 2, 2), 2), ((4, 2, 2), 1), ((1,) * 8, 4), ((2, 4, 2), 1), ((4,), 1), ((2,), 1)]
)
def test_the_last_slices_take_back_what_the_grid_moved(widths, held):
    torch.manual_seed(0)
    spec = SliceSpec(widths, 32)
    source = MobiLinear.from_weight(torch.randn(6, 48), None, spec)
    stand_in = _Tunable(source)
    original = weight_of(source)
    first = unpack(source.slices, spec, held)
    with torch.no_grad():
        stand_in.log_scale.add_(0.02 * torch.randn(stand_in.log_scale.shape))
        stand_in.zero.add_(0.05 * torch.randn(stand_in.zero.shape))
    scale = stand_in.scale * stand_in.log_scale.exp()
    kept = reconstruct(stand_in.codes, scale, stand_in.zero, spec, spec.num_slices)[:, :48]
    stand_in.store()
    assert torch.equal(unpack(source.slices, spec, held), first)
    torch.testing.assert_close(source.scale.float(), scale.detach(), rtol=1e-3, atol=0)
    taken, moved = (float((w - original).norm()) for w in (weight_of(source), kept))
    assert taken < 0.7 * moved if spec.total_bits > spec.bits(held) else taken == pytest.approx(moved, rel=0.01)


def test_a_group_of_zeros_keeps_its_codes():
    weight = torch.randn(3, 64)
    weight[1, 32:] = 0
    source = MobiLinear.from_weight(weight, None, SliceSpec((2, 2, 2, 2), 32))
    before = source.slices.clone()
    _Tunable(source).store()
    assert torch.equal(weight_of(source)[1, 32:], torch.zeros(32))
    assert torch.equal(source.slices, before), "nothing was tuned"


def test_what_moves_without_pause_ends_one_over_the_decay_away():
    config = mq.CalibrationConfig(tune_decay=20.0)
    pushed, noisy = nn.Parameter(torch.full((4,), 1.5)), nn.Parameter(torch.zeros(500))
    draw = torch.Generator().manual_seed(0)
    optimizer = _Adam([pushed, noisy], config.tune_decay)
    for _ in range(4000):
        pushed.grad, noisy.grad = torch.full((4,), -7.0), torch.randn(500, generator=draw)
        optimizer.step([config.tune_rate] * 2)
    torch.testing.assert_close(pushed.detach(), torch.full((4,), 1.5 + 1 / 20), rtol=1e-3, atol=0)
    assert float(noisy.detach().square().mean().sqrt()) < 0.5 / 20


def test_first_slices_stay_and_scales_and_zero_points_change():
    made, ids = [tiny_lm() for _ in range(2)], tokens(4, 32)
    for model, steps in zip(made, (0, 12), strict=True):
        mq.calibrate_(model, ids, mq.CalibrationConfig(tune_steps=steps))
    before, after = (elastic_linears(model) for model in made)
    for name, old in before.items():
        assert isinstance(after[name], MobiLinear)
        first = (unpack(m.slices, m.spec, 2) for m in (old, after[name]))
        assert torch.equal(*first)
        assert after[name].scale.dtype is torch.float16
        changed = (old.scale != after[name].scale).float().mean()
        assert changed > 0.5, name
        assert torch.allclose(old.scale.float(), after[name].scale.float(), rtol=0.1)
    plain = [dict(model.named_parameters()) for model in made]
    assert all(torch.equal(p, plain[1][n]) for n, p in plain[0].items())
    assert not any(isinstance(m, nn.Module) and type(m) is _Tunable for m in made[1].modules())
