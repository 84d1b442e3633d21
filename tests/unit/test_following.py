"""Thresholds that follow telemetry: the loop alone, on routers whose scores are shifted, and on whole models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import mobiquant_compiler as mq
from mobiquant_compiler.backend import REPORTS
from mobiquant_compiler.errors import (
    AlreadyFollowed,
    BadOption,
    BudgetOutOfRange,
    FollowingEnded,
    FullPrefill,
    NotElastic,
)
from mobiquant_compiler.evaluation import evaluate
from mobiquant_compiler.linear import MobiLinear, Router, elastic_linears
from mobiquant_compiler.runtime.budget import QUANTILES, BudgetState, CalibratedTable
from mobiquant_compiler.spec import SliceSpec
from tests.models_tiny import tiny_lm, tokens

WINDOW, WINDOWS = 2048, 60  # tokens a window, windows a text
CALIBRATION = tokens(4, 64)
TEXT = tokens(WINDOWS, 64, seed=9)


class Town(nn.Module):
    """Elastic linears whose routers see scores drawn by hand instead of activations.

    Log scores of a router are normal, with a mean and spread of its own, and (trained) fall by a random step from
    slice to slice. Another text shifts and stretches them, and moves them a little from window to window.
    """

    def __init__(self, trained: bool = False, limits: tuple[int, int] = (1, 4), linears: int = 8) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.linears = nn.ModuleList(
            MobiLinear.from_weight(torch.randn(8 + 8 * (i % 3), 32, generator=draw), None, SliceSpec((2,) * 4, 32))
            for i in range(linears)
        )
        self.routers: list[Router] = [m.router for m in self.linears]
        self.means, self.spreads = torch.randn(linears, generator=draw), 0.5 + torch.rand(linears, generator=draw)
        self.trained = trained
        for router in self.routers[:2]:
            router.floor, router.ceiling = limits
        shares = torch.linspace(0, 1, QUANTILES)
        sample = [self.scores(i, 20000, draw) for i in range(linears)]
        least = torch.stack([torch.quantile(s.cummin(1).values, shares, dim=0).T for s in sample])  # [R, E - 1, Q]
        gain = self.routers[0].gain[0].log()
        base = torch.stack([torch.quantile(s[:, 0] - gain, shares) for s in sample])
        quantiles = (least if trained else base).unsqueeze(0)
        self.state = BudgetState(self.routers, CalibratedTable(torch.tensor([4.0]).double(), quantiles))

    def scores(self, index: int, count: int, draw: torch.Generator) -> Tensor:
        """Return log scores [count, E - 1] of one router on calibration text."""
        base = self.means[index] + self.spreads[index] * torch.randn(count, 1, generator=draw)
        if not self.trained:
            return base + self.routers[index].gain.log()
        return base - (0.3 + torch.rand(count, 3, generator=draw)).cumsum(1)

    def read(self, draw: torch.Generator, shift: float, noise: float = 0.1, count: int = WINDOW) -> float:
        """Count a window of another text, as routers do; returns the bits its tokens got."""
        before = [router.hist.clone() for router in self.routers]
        wander = noise * float(torch.randn(1, generator=draw))
        for index, router in enumerate(self.routers):
            used = (self.scores(index, count, draw) + shift + wander).exp() >= router.thresholds
            counts = 1 + used.int().cumprod(1).sum(1)
            router.hist += torch.bincount(counts - 1, minlength=4)
        bits = [
            float(((r.hist - b).double() @ r.bits_by_count()) / (r.hist - b).sum())
            for r, b in zip(self.routers, before, strict=True)
        ]
        params = [r.params for r in self.routers]
        return sum(p * b for p, b in zip(params, bits, strict=True)) / sum(params)


def thresholds(model: nn.Module) -> Tensor:
    return torch.stack([m.router.thresholds for m in elastic_linears(model).values()])


def read_text(town: Town, shift: float, bits: float, steady: bool = False) -> list[float]:
    """Return the bits of every window of a text that is followed; all windows are alike where it is `steady`."""
    draw = torch.Generator().manual_seed(1)
    mq.reset_telemetry(town)
    with mq.follow_budget(town, bits, every=WINDOW) as follower:
        found = []
        for _ in range(WINDOWS):
            found.append(town.read(draw.manual_seed(1) if steady else draw, shift))
            follower.update(WINDOW)
            assert mq.get_budget(town) == bits
    return found


def read_tokens(model: nn.Module, follower: mq.BudgetFollower | None = None) -> float:
    """Return the bits that TEXT gets, window by window."""
    mq.reset_telemetry(model)
    with torch.no_grad():
        for window in TEXT:
            model(window.unsqueeze(0))
            if follower:
                follower.update()
    return float(mq.achieved_bits(model))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("shift", [-0.6, -0.15, 0.1, 0.5, 1.5])
@pytest.mark.parametrize("bits", [2.1, 2.5, 4, 5.5, 7.5, 7.9])
def test_the_average_of_a_text_meets_the_budget(trained: bool, shift: float, bits: float) -> None:
    town = Town(trained)
    found = read_text(town, shift, bits)
    assert sum(found) / WINDOWS == pytest.approx(bits, abs=0.03)
    assert float(mq.achieved_bits(town)) == pytest.approx(sum(found) / WINDOWS, abs=1e-6)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bits", [2.1, 2.5, 3, 4, 5.5, 7, 7.9])
@pytest.mark.parametrize("shift", [-0.5, 0.15, 0.8])
def test_no_oscillation_where_a_text_is_steady(trained: bool, bits: float, shift: float) -> None:
    found = read_text(Town(trained), shift, bits, steady=True)
    assert abs(found[0] - bits) > 0.01, "the text must be off to begin with"
    assert max(abs(b - bits) for b in found[5:]) < 0.05


@pytest.mark.parametrize("bits", [3.2, 4, 5, 6.1])
@pytest.mark.parametrize("limits", [(2, 4), (1, 2), (3, 3)])
def test_floors_and_ceilings_bound_the_range(limits: tuple[int, int], bits: float) -> None:
    town = Town(limits=limits)
    found = read_text(town, 0.4, bits)
    assert sum(found) / WINDOWS == pytest.approx(bits, abs=0.03)
    low, high = town.state.range
    assert low - 1e-9 <= min(found) <= max(found) <= high + 1e-9
    for router in town.routers[:2]:
        assert (router.thresholds[: limits[0] - 1] == -torch.inf).all()
        assert (router.thresholds[limits[1] - 1 :] == torch.inf).all()


@pytest.mark.parametrize("bits", [2, 8])
def test_ends_of_the_range_stay_exact(bits: float) -> None:
    town = Town()
    mq.set_budget(town, bits)
    before = thresholds(town)
    with mq.follow_budget(town, every=1) as follower:
        for _ in range(5):
            assert town.read(torch.Generator().manual_seed(2), 0.7) == bits
            follower.update()
            assert torch.equal(thresholds(town), before)


def test_traffic_that_changes_is_followed_and_nothing_winds_up() -> None:
    town = Town()
    with mq.follow_budget(town, 4, every=WINDOW) as follower:

        def run(shift: float, windows: int) -> list[float]:
            found = []
            for _ in range(windows):
                found.append(town.read(torch.Generator().manual_seed(3), shift))
                follower.update()
            return found

        run(0.3, 10)
        assert max(run(-40.0, 30)) < 4, "no threshold helps tokens whose scores are nothing"
        again = run(0.3, 30)
    assert max(abs(b - 4) for b in again[20:]) < 0.05
    assert all(2 <= b <= 8 for b in again)


def test_plain_thresholds_come_back_exactly() -> None:
    town = Town()
    mq.set_budget(town, 5.3)
    plain, addresses = thresholds(town), [r.thresholds.data_ptr() for r in town.routers]
    with mq.follow_budget(town, every=WINDOW) as follower:
        assert torch.equal(thresholds(town), plain), "nothing moves before the first update"
        town.read(torch.Generator().manual_seed(4), 0.8)
        follower.update()
        assert not torch.equal(thresholds(town), plain)
        assert mq.get_budget(town) == 5.3
    assert torch.equal(thresholds(town), plain)
    with pytest.raises(KeyError), mq.follow_budget(town, 3):
        raise KeyError
    assert mq.get_budget(town) == 5.3
    assert torch.equal(thresholds(town), plain)
    assert [r.thresholds.data_ptr() for r in town.routers] == addresses


def test_nothing_moves_before_enough_tokens_came() -> None:
    town, draw = Town(), torch.Generator().manual_seed(5)
    with mq.follow_budget(town, 4, every=100) as follower:
        plain = thresholds(town)
        follower.update()
        for _ in range(3):
            town.read(draw, 0.8, count=33)
            follower.update()
        assert torch.equal(thresholds(town), plain)
        town.read(draw, 0.8, count=1)
        follower.update()
        assert not torch.equal(thresholds(town), plain)


def test_told_tokens_spare_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    town, reads = Town(), []
    original = mq.following.telemetry.read
    monkeypatch.setattr(mq.following.telemetry, "read", lambda routers: reads.append(1) or original(routers))
    with mq.follow_budget(town, 4, every=10) as follower:
        for step in range(30):
            town.read(torch.Generator().manual_seed(step), 0.5, count=1)
            follower.update(1)
    assert len(reads) == 1 + 3, "one at the start, one an update"


def test_counters_are_left_alone_and_may_be_reset() -> None:
    def follow(reset: bool) -> Tensor:
        town, draw = Town(), torch.Generator().manual_seed(6)
        town.read(draw, 2.0)  # of before: must not count
        with mq.follow_budget(town, 4, every=WINDOW) as follower:
            for _ in range(4):
                if reset:
                    mq.reset_telemetry(town)
                before = mq.achieved_bits(town).tokens
                town.read(draw, 0.5)
                follower.update()
                assert mq.achieved_bits(town).tokens == before + WINDOW
            return thresholds(town)

    assert torch.equal(follow(True), follow(False))


def test_the_same_calls_in_the_same_order_give_the_same() -> None:
    assert read_text(Town(), 0.3, 4) == read_text(Town(), 0.3, 4)


def test_a_budget_set_meanwhile_is_followed_from_there() -> None:
    town, draw = Town(), torch.Generator().manual_seed(7)
    mq.set_budget(town, 6)
    with mq.follow_budget(town, every=WINDOW) as follower:
        for _ in range(3):
            town.read(draw, 0.6)
            follower.update()
        mq.set_budget(town, 3)
        plain = thresholds(town)
        follower.update()
        assert torch.equal(thresholds(town), plain)
        found = []
        for _ in range(40):
            found.append(town.read(draw, 0.6))
            follower.update()
            assert mq.get_budget(town) == 3
    assert sum(found) / 40 == pytest.approx(3, abs=0.03)
    assert mq.get_budget(town) == 6


class TestErrors:
    @pytest.mark.parametrize("every", [0, -1, 1.5, "64", None, True])
    def test_bad_every(self, every: object) -> None:
        town = Town()
        with pytest.raises(BadOption, match=r"follow_budget: option 'every' got .* wanted a whole number"):
            mq.follow_budget(town, 4, every=every)

    @pytest.mark.parametrize("bits", [1.9, 8.1, float("nan"), "4", True])
    def test_out_of_range_changes_nothing(self, bits: object) -> None:
        town = Town()
        mq.set_budget(town, 5)
        plain = thresholds(town)
        with pytest.raises(BudgetOutOfRange, match=r"follow_budget: budget .* this model can give 2 to 8"):
            mq.follow_budget(town, bits)
        assert torch.equal(thresholds(town), plain)
        mq.follow_budget(town, 4).close()

    def test_not_elastic(self) -> None:
        with pytest.raises(NotElastic, match="follow_budget: Linear has no elastic linear"):
            mq.follow_budget(nn.Linear(4, 4))

    def test_one_follower_a_model(self) -> None:
        town = Town()
        first = mq.follow_budget(town, 4)
        with pytest.raises(AlreadyFollowed, match=r"thresholds of Town already follow a budget \(4 bits\)"):
            mq.follow_budget(town, 5)
        assert mq.get_budget(town) == 4
        with mq.follow_budget(Town(), 5), mq.follow_budget(copy.deepcopy(town), 5):
            pass
        first.close()
        mq.follow_budget(town, 5).close()

    def test_a_lost_follower_is_in_nobodys_way(self) -> None:
        town = Town()
        mq.follow_budget(town, 4)
        mq.follow_budget(town, 5).close()

    def test_after_the_end(self) -> None:
        town = Town()
        follower = mq.follow_budget(town, 4)
        follower.close()
        mq.set_budget(town, 3)
        follower.close()
        assert mq.get_budget(town) == 3, "closing again does nothing"
        with pytest.raises(FollowingEnded, match="update: this follower of Town was closed"):
            follower.update()

    def test_full_prefill(self) -> None:
        town = Town()
        mq.set_execution(town, prefill="full")
        with pytest.raises(FullPrefill, match=r"follow_budget: linears\.0 has prefill='full'"):
            mq.follow_budget(town, 4)


class TestModels:
    def test_static_tables_do_not_move(self) -> None:
        model = tiny_lm(2)
        mq.quantize_(model)
        mq.set_budget(model, 4.37)  # whole linears cannot meet it
        plain = thresholds(model)
        with torch.no_grad(), mq.follow_budget(model, every=1) as follower:
            assert not follower.follows
            for window in TEXT[:8]:
                model(window.unsqueeze(0))
                follower.update()
                assert torch.equal(thresholds(model), plain)
        (row,) = evaluate(model, TEXT[:2], [4], follow=True)
        assert row.followed is False

    @pytest.mark.parametrize("router", ["energy", "mlp"])
    @pytest.mark.parametrize("scope", ["input", "linear"])
    def test_calibrated_models_meet_the_budget_on_other_text(self, router: str, scope: str) -> None:
        model = tiny_lm(2)
        config = mq.CalibrationConfig(router=router, tune_steps=0, router_steps=60)
        mq.calibrate_(model, CALIBRATION, config, slices=mq.SliceConfig(group=32, scope=scope))
        with torch.no_grad():
            model.layers[1].norm1.weight *= 1.6  # other scores than the table knows
            model.layers[0].norm2.weight *= 1.6
        for bits in (3.0, 5.0):
            mq.set_budget(model, bits)
            assert abs(read_tokens(model) - bits) > 0.05, "the table must be off"
            with mq.follow_budget(model, every=64) as follower:
                assert read_tokens(model, follower) == pytest.approx(bits, abs=0.03)

    def test_evaluation_says_what_followed(self) -> None:
        model = tiny_lm(1)
        mq.quantize_(model, calibration=CALIBRATION)
        with torch.no_grad():
            model.layers[0].norm2.weight *= 2
        plain = list(evaluate(model, TEXT, [4, 8], batch=6))
        mq.set_budget(model, 6)
        kept, seen = thresholds(model), []
        with pytest.raises(BudgetOutOfRange):
            list(evaluate(model, TEXT, [9], follow=True))
        rows = list(evaluate(model, TEXT, [4, 8], batch=6, follow=True, progress=lambda *step: seen.append(step)))
        assert [row.followed for row in [*plain, *rows]] == [False, False, True, True]
        assert abs(rows[0].achieved_bits - 4) < abs(plain[0].achieved_bits - 4)
        assert (rows[1].achieved_bits, rows[1].perplexity) == (8, plain[1].perplexity)
        assert torch.equal(thresholds(model), kept)
        assert seen[:2] == [("perplexity at 4 bits", 6, 60), ("perplexity at 4 bits", 12, 60)]
        assert rows[0].to_dict()["followed"] is True

    def test_compiled_models_are_not_compiled_anew(self) -> None:
        model = tiny_lm(2)
        mq.quantize_(model, calibration=CALIBRATION)
        mq.set_budget(model, 4)
        compiled = torch.compile(model, backend="mobiquant", fullgraph=True)
        eager = copy.deepcopy(model)
        with torch.no_grad():
            compiled(TEXT[:1])
            before, results = len(REPORTS), []
            for runner in (compiled, eager):
                with mq.follow_budget(runner, 5, every=64) as follower:
                    results.append(read_tokens(runner, follower))
        assert len(REPORTS) == before
        assert results[0] == pytest.approx(results[1], abs=0.01)
        assert results[0] == pytest.approx(5, abs=0.1)

    def test_plain_models_that_ran_compiled(self) -> None:
        model = tiny_lm(1)
        compiled = torch.compile(model, backend="mobiquant", options={"budget": 4})
        with torch.no_grad():
            compiled(TEXT[:1])
            with mq.follow_budget(compiled, 5, every=1) as follower:
                compiled(TEXT[:1])
                follower.update()
                assert not follower.follows, "their slices come from weights alone"
                assert mq.get_budget(model) == 5
        assert mq.get_budget(model) == 4
