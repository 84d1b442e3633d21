"""Codes with error compensation: exact per column, the same as GPTQ for one slice, better than rounding for several."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mobiquant_compiler.calibration.codes import Prefixes, closest_codes, compensated_codes, factorize, values_at
from mobiquant_compiler.calibration.grids import clipped, nearest_codes, sliced, stretches, weighted_grid
from mobiquant_compiler.slices import affine_at, reconstruct
from mobiquant_compiler.spec import SliceSpec

EVEN = SliceSpec((2, 2, 2, 2), 32)
SPECS = [EVEN, SliceSpec((4, 4), 32), SliceSpec((1, 2, 1), 32), SliceSpec((4,), 32)]


def hessian_of(k: int, seed: int = 0) -> Tensor:
    """The Hessian of correlated inputs with columns of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    few = k // 8  # directions that most of the inputs lie in
    x = torch.randn(4 * k, few, generator=generator) @ torch.randn(few, k, generator=generator) / few**0.5
    x = x + 0.3 * torch.randn(4 * k, k, generator=generator)
    x = x * torch.exp(0.5 * torch.randn(k, generator=generator))
    return x.t() @ x / len(x)


def loss_of(values: Tensor, weight: Tensor, hessian: Tensor) -> float:
    error = values - weight
    return float(((error @ hessian) * error).sum())


def positions(targets: Tensor, scale: Tensor, zero: Tensor, spec: SliceSpec) -> Tensor:
    """Return targets [E, N] in steps of their slice count."""
    affine = (affine_at(scale, zero, spec, k) for k in range(1, spec.num_slices + 1))
    return torch.stack([t / step + centre for t, (step, centre) in zip(targets, affine, strict=True)])


def wide(tensor: Tensor, spec: SliceSpec, k: int) -> Tensor:
    return tensor.float().repeat_interleave(spec.group, 1)[:, :k]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: str(s.widths))
@given(seed=st.integers(0, 10_000), growth=st.sampled_from([1.0, 4.0, 16.0, 100.0]))
def test_the_code_of_a_column_is_the_best_of_all_codes(spec, seed, growth):
    generator = torch.Generator().manual_seed(seed)
    count, rows = spec.num_slices, 7
    targets = torch.randn(count, rows, generator=generator)
    scale, zero = torch.rand(rows, generator=generator) + 0.1, 3 * torch.rand(rows, generator=generator)
    weights = [growth**k for k in range(count)]
    got = closest_codes(positions(targets, scale, zero, spec), Prefixes.of(spec, weights, targets.device))
    every = torch.arange(1 << spec.total_bits, dtype=torch.float32).expand(rows, -1)
    values = values_at(every, scale.unsqueeze(1), zero.unsqueeze(1), spec).double()
    cost = sum(w * (t.unsqueeze(1) - v).square() for w, t, v in zip(weights, targets, values, strict=True))
    chosen = cost.gather(1, got.long().unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(chosen, cost.amin(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: str(s.widths))
def test_values_are_what_slices_reconstruct(spec):
    codes = torch.randint(0, 1 << spec.total_bits, (5, 64)).to(torch.uint8)
    scale, zero = torch.rand(5, 2) + 0.1, torch.rand(5, 2)
    values = values_at(codes.float(), wide(scale, spec, 64), wide(zero, spec, 64), spec)
    for k in range(1, spec.num_slices + 1):
        first = codes >> (spec.total_bits - spec.bits(k))
        torch.testing.assert_close(values[k - 1], reconstruct(first, scale, zero, spec, k))


def test_one_slice_is_gptq():
    spec, k = SliceSpec((4,), 32), 96
    torch.manual_seed(0)
    weight, hessian = torch.randn(6, k), hessian_of(k)
    scale, zero = weighted_grid(weight, hessian.diagonal(), spec, [1.0], 1.0, torch.float32)
    got = compensated_codes(weight, factorize(hessian, 0.01, "w"), scale, zero, spec, [1.0])
    # The definition: round a column, move its error on, take the column out of the inverse Hessian.
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(k)
    inverse, left = torch.linalg.inv(damped), weight.double().clone()
    steps, zeros = wide(scale, spec, k).double(), wide(zero, spec, k).double()
    for column in hessian.diagonal().argsort(descending=True, stable=True).tolist():
        code = (left[:, column] / steps[:, column] + zeros[:, column]).round().clamp(0, 15)
        assert (code != got[:, column]).sum() <= 1, "one tie of float32 against float64 at most"
        code = got[:, column].double()
        error = (left[:, column] - (code - zeros[:, column]) * steps[:, column]) / inverse[column, column]
        left -= error.unsqueeze(1) * inverse[column]
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]


@pytest.mark.parametrize(("growth", "share"), [(1.0, 0.7), (4.0, 0.7), (16.0, 0.98)])
def test_compensation_beats_rounding_over_all_slice_counts(growth, share):
    torch.manual_seed(1)
    k, weights = 128, [growth**i for i in range(4)]
    weight, hessian = torch.randn(24, k), hessian_of(k)
    scale, zero = weighted_grid(weight, hessian.diagonal(), EVEN, weights, 0.6, torch.float16)
    steps, zeros = wide(scale, EVEN, k), wide(zero, EVEN, k)
    codes = compensated_codes(weight, factorize(hessian, 0.01, "w"), scale, zero, EVEN, weights)
    rounded = nearest_codes(weight, steps, zeros, EVEN)
    ours, plain = (
        [loss_of(v, weight, hessian) for v in values_at(c.float(), steps, zeros, EVEN)] for c in (codes, rounded)
    )
    total = [sum(w * loss for w, loss in zip(weights, losses, strict=True)) for losses in (ours, plain)]
    assert total[0] < share * total[1]
    assert ours[0] < share * plain[0]
    assert ours[1] < share * plain[1]
    assert sorted(ours, reverse=True) == ours, "each slice takes some of the error away"


def test_more_weight_on_many_slices_moves_error_to_few():
    torch.manual_seed(1)
    weight, hessian = torch.randn(24, 128), hessian_of(128)
    factor = factorize(hessian, 0.01, "w")
    scale, zero = weighted_grid(weight, hessian.diagonal(), EVEN, [1.0] * 4, 0.6, torch.float16)
    steps, zeros = wide(scale, EVEN, 128), wide(zero, EVEN, 128)
    losses = []
    for growth in (1.0, 256.0):
        codes = compensated_codes(weight, factor, scale, zero, EVEN, [growth**i for i in range(4)])
        losses.append([loss_of(v, weight, hessian) for v in values_at(codes.float(), steps, zeros, EVEN)])
    assert losses[0][0] < losses[1][0]
    assert losses[0][3] > losses[1][3]


def test_uncorrelated_inputs_leave_nothing_to_compensate():
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    scale, zero = weighted_grid(weight, torch.ones(64), EVEN, [1.0] * 4, 1.0, torch.float32)
    codes = compensated_codes(weight, factorize(torch.eye(64), 0.01, "w"), scale, zero, EVEN, [1.0] * 4)
    prefixes = Prefixes.of(EVEN, [1.0] * 4, weight.device)
    alone = [
        closest_codes(positions(weight[:, i].expand(4, -1), scale[:, i // 32], zero[:, i // 32], EVEN), prefixes)
        for i in range(64)
    ]
    assert torch.equal(codes.float(), torch.stack(alone, 1))


def test_columns_that_are_always_zero_do_no_harm():
    torch.manual_seed(0)
    weight, hessian = torch.randn(8, 64), hessian_of(64)
    hessian[5] = hessian[:, 5] = 0
    scale, zero = weighted_grid(weight, hessian.diagonal(), EVEN, [1.0] * 4, 0.6, torch.float32)
    codes = compensated_codes(weight, factorize(hessian, 0.01, "w"), scale, zero, EVEN, [1.0] * 4)
    values = values_at(codes.float(), wide(scale, EVEN, 64), wide(zero, EVEN, 64), EVEN)
    assert loss_of(values[3], weight, hessian) < 0.02 * loss_of(torch.zeros_like(weight), weight, hessian)


class TestGrid:
    def test_nothing_is_clipped_unless_asked(self):
        weight = torch.randn(16, 96)
        for narrowest, some in ((1.0, False), (0.5, True)):
            grid = weighted_grid(weight, torch.ones(96), EVEN, [1.0, 0, 0, 0], narrowest, torch.float16)
            assert (clipped(weight, *grid, EVEN) > 0) is some
        assert stretches(1.0) == [1.1, 1.05, 1.0]
        assert stretches(0.5)[-1] == pytest.approx(0.5)

    def test_a_narrower_base_is_chosen_where_it_helps(self):
        weight, counted = torch.randn(16, 64), [1.0, 0.0, 0.0, 0.0]
        weight[:, ::32] *= 4  # one outlier a group
        errors = []
        for narrowest in (1.0, 0.5):
            scale, zero = (
                wide(t, EVEN, 64)
                for t in weighted_grid(weight, torch.ones(64), EVEN, counted, narrowest, torch.float32)
            )
            codes = nearest_codes(weight, scale, zero, EVEN)
            errors.append(float((values_at(codes, scale, zero, EVEN)[0] - weight).square().sum()))
        assert errors[1] < 0.96 * errors[0]

    def test_padding_does_not_change_a_grid(self):
        weight = torch.randn(4, 48) + 2  # far from zero: padding with zeros would stretch the range
        padded = weighted_grid(weight, torch.ones(48), EVEN, [1.0] * 4, 1.0, torch.float32)
        scale, zero = (t[:, 1:] for t in padded)
        inside = (weight[:, 32:] / scale + zero).round()
        assert bool((inside.amin(1) == 0).all() and (inside.amax(1) == 3).all())

    def test_zero_groups_stay_zero(self):
        weight = torch.randn(4, 64)
        weight[:, :32] = 0
        hessian = hessian_of(64)
        scale, zero = weighted_grid(weight, hessian.diagonal(), EVEN, [1.0] * 4, 0.5, torch.float16)
        assert bool((scale[:, 0] == 0).all())
        codes = compensated_codes(weight, factorize(hessian, 0.01, "w"), scale, zero, EVEN, [1.0] * 4)
        made = sliced(codes, weight, scale, zero, EVEN)
        assert not reconstruct(made.codes, scale.float(), zero.float(), EVEN, 4)[:, :32].any()
