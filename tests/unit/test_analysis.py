"""Outlier migration, precision of layers, bits of tokens: numbers by hand, then on a small model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import mobiquant_compiler as mq
from mobiquant_compiler.analysis import average_precision, outlier_migration, token_bits
from mobiquant_compiler.analysis.migration import (
    Migration,
    TokenErrors,
    fixed_counts,
    overlap,
    rank_correlation,
    worst,
)
from mobiquant_compiler.analysis.precision import LinearBits, by_layer, layer_of
from mobiquant_compiler.errors import BadOption, BudgetOutOfRange, EmptyBatch, NotElastic
from mobiquant_compiler.linear import elastic_linears
from tests.models_tiny import tiny_lm, tokens


@pytest.fixture(scope="module")
def elastic() -> nn.Module:
    model = tiny_lm()
    mq.quantize_(model, calibration=tokens(4, 32), budget=4.5)
    return model


def errors(values: list[float], budget: float = 3, routed: bool = False) -> TokenErrors:
    tensor = torch.tensor(values, dtype=torch.float64)
    return TokenErrors(budget, routed, budget, tensor, {"a": tensor, "b": tensor.flip(0)})


class TestWorstTokens:
    def test_are_those_of_the_greatest_errors(self) -> None:
        assert worst(torch.tensor([1.0, 9.0, 3.0, 7.0]), 0.5).tolist() == [False, True, False, True]

    def test_are_at_least_one_but_none_without_error(self) -> None:
        assert worst(torch.tensor([1.0, 2.0]), 0.01).tolist() == [False, True]
        assert not worst(torch.zeros(4), 0.5).any()

    def test_overlap(self) -> None:
        first = torch.tensor([4.0, 3.0, 2.0, 1.0])
        assert overlap(first, first, 0.5) == 1
        assert overlap(first, first.flip(0), 0.5) == 0
        assert overlap(first, torch.tensor([1.0, 4.0, 3.0, 2.0]), 0.5) == 0.5
        assert math.isnan(overlap(torch.zeros(4), torch.zeros(4), 0.5))
        assert overlap(first, torch.zeros(4), 0.5) == 0

    def test_rank_correlation(self) -> None:
        first = torch.tensor([1.0, 5.0, 2.0, 8.0])
        assert rank_correlation(first, first.square()) == pytest.approx(1)
        assert rank_correlation(first, -first) == pytest.approx(-1)


class TestMigration:
    def test_summary_by_hand(self) -> None:
        low, high = errors([8, 4, 2, 1]), errors([8, 1, 4, 3], budget=4)
        found = Migration(0.5, (low, low), (high, high))
        row = found.summary()[0]
        assert row["overlap"] == 0.5  # {0, 1} and {0, 2}
        assert row["worst_share"] == 12 / 16
        assert row["migrated_share"] == 4 / 16
        assert row["linear_overlap"] == 0.5
        assert (row["low_mean_error"], row["high_mean_error"]) == (3.75, 4)
        assert found.rows()[2] == {
            "token": 2,
            "fixed_3_error": 2,
            "fixed_3_worst": 0,
            "fixed_4_error": 4,
            "fixed_4_worst": 1,
        }
        assert found.linear_rows()[1] == {"linear": "b", "fixed_overlap": 0.5, "routed_overlap": 0.5}

    def test_outliers_have_one_scale_with_and_without_routing(self) -> None:
        fixed = errors([8, 4, 2, 1]), errors([8, 1, 4, 3], budget=4)
        routed = errors([5, 3, 1, 2], routed=True), errors([5, 1, 2, 3], budget=4, routed=True)
        rows = Migration(0.5, (fixed[0], routed[0]), (fixed[1], routed[1])).summary()
        assert [row["migrated_tokens"] for row in rows] == [0.5, 0]  # without routing 1 and 2 migrate
        assert [row["outlier_tokens"] for row in rows] == [0.75, 0.25]
        assert [row["overlap"] for row in rows] == [0.5, 0.5], "sets of worst tokens do not tell"
        same = errors([0, 0, 0, 0])
        assert Migration(0.5, (same, routed[0]), (same, routed[1])).summary()[0]["migrated_tokens"] == 0

    def test_on_a_model(self, elastic: nn.Module) -> None:
        stages = []
        before = mq.get_budget(elastic)
        found = outlier_migration(elastic, tokens(3, 16), (3, 5), progress=lambda *step: stages.append(step))
        assert mq.get_budget(elastic) == before
        assert stages[-1] == ("outlier migration", 6, 6)
        (fixed_low, routed_low), (fixed_high, routed_high) = found.low, found.high
        assert [e.routed for e in (*found.low, *found.high)] == [False, True] * 2
        for part in (*found.low, *found.high):
            assert part.tokens.shape == (48,)
            assert (part.tokens >= 0).all()
            assert part.achieved_bits == pytest.approx(part.budget, abs=0.5)
            assert set(part.linears) == set(elastic_linears(elastic))
        for fixed, routed in zip(found.low[:1] + found.high[:1], found.low[1:] + found.high[1:], strict=True):
            assert fixed.achieved_bits == pytest.approx(routed.achieved_bits, abs=0.3), "as many bits as routing took"
        assert fixed_high.tokens.mean() < fixed_low.tokens.mean()
        assert routed_high.tokens.mean() < routed_low.tokens.mean()
        assert not torch.equal(fixed_low.tokens, routed_low.tokens)
        assert found.summary()[1]["routed"]

    def test_errors_are_those_of_the_definition(self, elastic: nn.Module) -> None:
        ids = tokens(1, 12)
        found = outlier_migration(elastic, ids, (3, 4.5)).high[1]

        def shares(bits: float) -> Tensor:
            with mq.budget(elastic, bits), torch.no_grad():
                return torch.log_softmax(elastic(ids)[0].double(), -1)

        expected, quantized = shares(8), shares(4.5)
        divergence = (expected.exp() * (expected - quantized)).sum(-1)
        assert torch.allclose(found.tokens, divergence, rtol=1e-3, atol=1e-6)

    def test_linears_are_compared_on_one_input(self, elastic: nn.Module) -> None:
        """The first linear has its true input in either run: its error must be that of its weight alone."""
        ids = tokens(1, 12)
        name, linear = next(iter(elastic_linears(elastic).items()))
        caught = []
        handle = linear.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
        found = outlier_migration(elastic, ids, (3, 4)).high[0]
        handle.remove()
        x = caught[0].double()[0]
        count = fixed_counts(elastic, 4)[name]
        rebuilt = _weights(linear, 4), _weights(linear, count)
        y, part = (x @ w.t() for w in rebuilt)
        expected = (part - y).square().sum(-1) / y.square().sum(-1)
        assert torch.allclose(found.linears[name], expected, rtol=1e-3)

    def test_fixed_counts_meet_the_budget_within_limits(self) -> None:
        model = tiny_lm()
        mq.quantize_(model, mq.SliceConfig(floor={"*.down_proj": 3}, ceiling={"*.q_proj": 1, "*.k_proj": 1}))
        for bits in (3.5, 4, 5):
            counts = fixed_counts(model, bits)
            used = [(2 * counts[n], m.in_features * m.out_features) for n, m in elastic_linears(model).items()]
            assert sum(b * p for b, p in used) / sum(p for _, p in used) == pytest.approx(bits, abs=0.2)
            assert all(counts[n] >= 3 for n in counts if n.endswith("down_proj"))
            assert all(counts[n] == 1 for n in counts if n.endswith("q_proj"))

    @pytest.mark.parametrize(
        ("budgets", "share", "error", "words"),
        [
            ((4, 3), 0.1, BadOption, "a lower and a higher one"),
            ((4, 8), 0.1, BadOption, "budgets below 8"),
            ((3, 4), 0.0, BadOption, "share"),
            ((3, 4), 0.7, BadOption, "share"),
            ((1, 4), 0.1, BudgetOutOfRange, "2 to 8 bits"),
        ],
    )
    def test_bad_arguments(
        self, elastic: nn.Module, budgets: tuple[float, float], share: float, error: type, words: str
    ) -> None:
        with pytest.raises(error, match=words):
            outlier_migration(elastic, tokens(1, 8), budgets, share=share)

    def test_nothing_to_measure(self, elastic: nn.Module) -> None:
        with pytest.raises(EmptyBatch, match="outlier migration"):
            outlier_migration(elastic, tokens(0, 8))
        with pytest.raises(NotElastic):
            outlier_migration(tiny_lm(), tokens(1, 8))


def _weights(linear: mq.MobiLinear, count: int) -> Tensor:
    from mobiquant_compiler.packing import unpack
    from mobiquant_compiler.slices import reconstruct

    codes = unpack(linear.slices, linear.spec, count)
    weight = reconstruct(codes, linear.scale.double(), linear.zero.double(), linear.spec, count, torch.float64)
    return weight[:, : linear.in_features]


class TestPrecision:
    @pytest.mark.parametrize(
        ("name", "layer"),
        [("model.layers.12.mlp.up_proj", 12), ("0", 0), ("h.3", 3), ("lm_head", None), ("block2.conv", None)],
    )
    def test_layer_of_a_name(self, name: str, layer: int | None) -> None:
        assert layer_of(name) == layer

    def test_equals_telemetry(self, elastic: nn.Module) -> None:
        windows = tokens(2, 16)
        rows = average_precision(elastic, windows, [6, 3.5])
        assert [row.budget for row in rows] == [6] * 14 + [3.5] * 14
        for bits in (6, 3.5):
            with mq.budget(elastic, bits), torch.no_grad():
                mq.reset_telemetry(elastic)
                elastic(windows)
                expected = mq.achieved_bits(elastic).layers
            assert {row.linear: row.bits for row in rows if row.budget == bits} == pytest.approx(expected)
        assert {row.layer for row in rows} == {0, 1}
        assert all(sum(row.shares) == pytest.approx(1) for row in rows)
        plain = rows[-1].to_dict()
        assert plain["kind"] == "down_proj"
        assert sum(k * 2 * plain[f"share_of_{k}"] for k in (1, 2, 3, 4)) == pytest.approx(plain["bits"])

    def test_layers_weigh_linears_by_parameters(self) -> None:
        shares = (1.0,)
        rows = [
            LinearBits(4, "0.a", 0, "a", 300, 2.0, shares),
            LinearBits(4, "0.b", 0, "b", 100, 6.0, shares),
            LinearBits(4, "1.a", 1, "a", 100, math.nan, shares),
        ]
        assert by_layer(rows) == [{"budget": 4, "layer": 0, "bits": 3.0, "parameters": 400}]

    def test_bad_arguments(self, elastic: nn.Module) -> None:
        with pytest.raises(BudgetOutOfRange):
            average_precision(elastic, tokens(1, 8), [9])
        with pytest.raises(EmptyBatch):
            average_precision(elastic, tokens(0, 8), [4])


class TestTokenBits:
    def test_average_is_the_achieved_bits(self, elastic: nn.Module) -> None:
        ids = tokens(20)
        found = token_bits(elastic, ids, 4.5)
        with mq.budget(elastic, 4.5), torch.no_grad():
            mq.reset_telemetry(elastic)
            elastic(ids.unsqueeze(0))
            assert float(found.bits.mean()) == pytest.approx(mq.achieved_bits(elastic).total)
        assert found.layers == ("0", "1")
        assert found.counts.shape == (20, 2)
        assert len(set(found.bits.tolist())) > 1, "tokens differ"
        assert found.summary()["achieved_bits"] == pytest.approx(float(found.bits.mean()))
        assert (found.num_slices, found.left_out) == (4, ())

    def test_linears_that_see_other_tokens_are_left_out_by_name(self) -> None:
        class LastToken(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = tiny_lm()
                self.last = nn.Linear(128, 16)

            def forward(self, ids: Tensor) -> Tensor:
                return self.last(self.body(ids)[:, -1])

        model = LastToken().eval()
        mq.quantize_(model, mq.SliceConfig(exclude=("*lm_head",)))
        assert token_bits(model, tokens(8), 4).left_out == ("last",)

    def test_bad_arguments(self, elastic: nn.Module) -> None:
        with pytest.raises(EmptyBatch, match="token bits"):
            token_bits(elastic, tokens(0), 4)
        with pytest.raises(BudgetOutOfRange):
            token_bits(elastic, tokens(4), 1)
