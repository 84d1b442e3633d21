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
from mobiquant_compiler.linear import elastic_linears
from tests.models_tiny import tiny_lm, tokens
from tests.scored_linears import ScoredLinears

WINDOW, WINDOWS = 2048, 60  # tokens a window, windows a text
CALIBRATION = tokens(4, 64)
TEXT = tokens(WINDOWS, 64, seed=9)


def thresholds(model: nn.Module) -> Tensor:
    return torch.stack([m.router.thresholds for m in elastic_linears(model).values()])


def read_text(model: ScoredLinears, shift: float, bits: float, steady: bool = False) -> list[float]:
    """Return the bits of every window of a text that is followed; all windows are alike where it is `steady`."""
    draw = torch.Generator().manual_seed(1)
    mq.reset_telemetry(model)
    with mq.follow_budget(model, bits, every=WINDOW) as follower:
        found = []
        for _ in range(WINDOWS):
            found.append(model.read(draw.manual_seed(1) if steady else draw, shift))
            follower.update(WINDOW)
            assert mq.get_budget(model) == bits
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
    model = ScoredLinears(trained)
    found = read_text(model, shift, bits)
    assert sum(found) / WINDOWS == pytest.approx(bits, abs=0.03)
    assert float(mq.achieved_bits(model)) == pytest.approx(sum(found) / WINDOWS, abs=1e-6)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bits", [2.1, 2.5, 3, 4, 5.5, 7, 7.9])
@pytest.mark.parametrize("shift", [-0.5, 0.15, 0.8])
def test_no_oscillation_where_a_text_is_steady(trained: bool, bits: float, shift: float) -> None:
    found = read_text(ScoredLinears(trained), shift, bits, steady=True)
    assert abs(found[0] - bits) > 0.01, "the text must be off to begin with"
    assert max(abs(b - bits) for b in found[5:]) < 0.05


@pytest.mark.parametrize("bits", [3.2, 4, 5, 6.1])
@pytest.mark.parametrize("limits", [(2, 4), (1, 2), (3, 3)])
def test_floors_and_ceilings_bound_the_range(limits: tuple[int, int], bits: float) -> None:
    model = ScoredLinears(limits=limits)
    found = read_text(model, 0.4, bits)
    assert sum(found) / WINDOWS == pytest.approx(bits, abs=0.03)
    low, high = model.state.range
    assert low - 1e-9 <= min(found) <= max(found) <= high + 1e-9
    for router in model.routers[:2]:
        assert (router.thresholds[: limits[0] - 1] == -torch.inf).all()
        assert (router.thresholds[limits[1] - 1 :] == torch.inf).all()


@pytest.mark.parametrize("bits", [2, 8])
def test_ends_of_the_range_stay_exact(bits: float) -> None:
    model = ScoredLinears()
    mq.set_budget(model, bits)
    before = thresholds(model)
    with mq.follow_budget(model, every=1) as follower:
        for _ in range(5):
            assert model.read(torch.Generator().manual_seed(2), 0.7) == bits
            follower.update()
            assert torch.equal(thresholds(model), before)


def test_traffic_that_changes_is_followed_and_nothing_winds_up() -> None:
    model = ScoredLinears()
    with mq.follow_budget(model, 4, every=WINDOW) as follower:

        def run(shift: float, windows: int) -> list[float]:
            found = []
            for _ in range(windows):
                found.append(model.read(torch.Generator().manual_seed(3), shift))
                follower.update()
            return found

        run(0.3, 10)
        assert max(run(-40.0, 30)) < 4, "no threshold helps tokens whose scores are nothing"
        again = run(0.3, 30)
    assert max(abs(b - 4) for b in again[20:]) < 0.05
    assert all(2 <= b <= 8 for b in again)


def test_plain_thresholds_come_back_exactly() -> None:
    model = ScoredLinears()
    mq.set_budget(model, 5.3)
    plain, addresses = thresholds(model), [r.thresholds.data_ptr() for r in model.routers]
    with mq.follow_budget(model, every=WINDOW) as follower:
        assert torch.equal(thresholds(model), plain), "nothing moves before the first update"
        model.read(torch.Generator().manual_seed(4), 0.8)
        follower.update()
        assert not torch.equal(thresholds(model), plain)
        assert mq.get_budget(model) == 5.3
    assert torch.equal(thresholds(model), plain)
    with pytest.raises(KeyError), mq.follow_budget(model, 3):
        raise KeyError
    assert mq.get_budget(model) == 5.3
    assert torch.equal(thresholds(model), plain)
    assert [r.thresholds.data_ptr() for r in model.routers] == addresses


def test_nothing_moves_before_enough_tokens_came() -> None:
    model, draw = ScoredLinears(), torch.Generator().manual_seed(5)
    with mq.follow_budget(model, 4, every=100) as follower:
        plain = thresholds(model)
        follower.update()
        for _ in range(3):
            model.read(draw, 0.8, count=33)
            follower.update()
        assert torch.equal(thresholds(model), plain)
        model.read(draw, 0.8, count=1)
        follower.update()
        assert not torch.equal(thresholds(model), plain)


def test_told_tokens_spare_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reads = ScoredLinears(), []
    original = mq.following.telemetry.read
    monkeypatch.setattr(mq.following.telemetry, "read", lambda routers: reads.append(1) or original(routers))
    with mq.follow_budget(model, 4, every=10) as follower:
        for step in range(30):
            model.read(torch.Generator().manual_seed(step), 0.5, count=1)
            follower.update(1)
    assert len(reads) == 1 + 3, "one at the start, one an update"


@pytest.mark.parametrize("trained", [False, True])
def test_an_update_reads_all_counters_at_once(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = ScoredLinears(trained), []
    with mq.follow_budget(model, 4, every=1) as follower:
        model.read(torch.Generator().manual_seed(9), 0.5)
        cpu, tolist = Tensor.cpu, Tensor.tolist
        monkeypatch.setattr(Tensor, "cpu", lambda t: seen.append("cpu") or cpu(t))
        monkeypatch.setattr(Tensor, "tolist", lambda t: seen.append("tolist") or tolist(t))
        follower.update()
    assert seen == (["cpu"] if trained else ["cpu", "tolist"]), "of data-free routers their gains too"


def test_counters_are_left_alone_and_may_be_reset() -> None:
    def follow(reset: bool) -> Tensor:
        model, draw = ScoredLinears(), torch.Generator().manual_seed(6)
        model.read(draw, 2.0)  # of before: must not count
        with mq.follow_budget(model, 4, every=WINDOW) as follower:
            for _ in range(4):
                if reset:
                    mq.reset_telemetry(model)
                before = mq.achieved_bits(model).tokens
                model.read(draw, 0.5)
                follower.update()
                assert mq.achieved_bits(model).tokens == before + WINDOW
            return thresholds(model)

    assert torch.equal(follow(True), follow(False))


def test_the_same_calls_in_the_same_order_give_the_same() -> None:
    assert read_text(ScoredLinears(), 0.3, 4) == read_text(ScoredLinears(), 0.3, 4)


def test_a_budget_set_meanwhile_is_followed_from_there() -> None:
    model, draw = ScoredLinears(), torch.Generator().manual_seed(7)
    mq.set_budget(model, 6)
    with mq.follow_budget(model, every=WINDOW) as follower:
        for _ in range(3):
            model.read(draw, 0.6)
            follower.update()
        mq.set_budget(model, 3)
        plain = thresholds(model)
        follower.update()
        assert torch.equal(thresholds(model), plain)
        found = []
        for _ in range(40):
            found.append(model.read(draw, 0.6))
            follower.update()
            assert mq.get_budget(model) == 3
    assert sum(found) / 40 == pytest.approx(3, abs=0.03)
    assert mq.get_budget(model) == 6


def test_linears_that_come_later_are_followed_and_restored() -> None:
    model, draw = nn.Sequential(ScoredLinears()), torch.Generator().manual_seed(8)
    with mq.follow_budget(model, 4, every=WINDOW) as follower:
        model.append(ScoredLinears())
        mq.set_budget(model[1], 4)
        plain = thresholds(model)
        for _ in range(3):
            follower.update()
            for part in model:
                part.read(draw, 0.6)
        assert not (thresholds(model) == plain).all(1).any()
    mq.set_budget(model[0], 4)
    assert torch.equal(thresholds(model), plain)


class TestErrors:
    @pytest.mark.parametrize("every", [0, -1, 1.5, "64", None, True])
    def test_bad_every(self, every: object) -> None:
        model = ScoredLinears()
        with pytest.raises(BadOption, match=r"follow_budget: option 'every' got .* wanted a whole number"):
            mq.follow_budget(model, 4, every=every)

    @pytest.mark.parametrize("bits", [1.9, 8.1, float("nan"), "4", True])
    def test_out_of_range_changes_nothing(self, bits: object) -> None:
        model = ScoredLinears()
        mq.set_budget(model, 5)
        plain = thresholds(model)
        with pytest.raises(BudgetOutOfRange, match=r"follow_budget: budget .* this model can give 2 to 8"):
            mq.follow_budget(model, bits)
        assert torch.equal(thresholds(model), plain)
        mq.follow_budget(model, 4).close()

    def test_not_elastic(self) -> None:
        with pytest.raises(NotElastic, match="follow_budget: Linear has no elastic linear"):
            mq.follow_budget(nn.Linear(4, 4))

    def test_one_follower_a_model(self) -> None:
        model = ScoredLinears()
        first = mq.follow_budget(model, 4)
        with pytest.raises(AlreadyFollowed, match=r"thresholds of ScoredLinears already follow a budget \(4 bits\)"):
            mq.follow_budget(model, 5)
        assert mq.get_budget(model) == 4
        with mq.follow_budget(ScoredLinears(), 5), mq.follow_budget(copy.deepcopy(model), 5):
            pass
        first.close()
        mq.follow_budget(model, 5).close()

    def test_a_lost_follower_is_in_nobodys_way(self) -> None:
        model = ScoredLinears()
        mq.follow_budget(model, 4)
        mq.follow_budget(model, 5).close()

    def test_after_the_end(self) -> None:
        model = ScoredLinears()
        follower = mq.follow_budget(model, 4)
        follower.close()
        mq.set_budget(model, 3)
        follower.close()
        assert mq.get_budget(model) == 3, "closing again does nothing"
        with pytest.raises(FollowingEnded, match="update: this follower of ScoredLinears was closed"):
            follower.update()

    def test_full_prefill(self) -> None:
        model = ScoredLinears()
        mq.set_execution(model, prefill="full")
        with pytest.raises(FullPrefill, match=r"follow_budget: linears\.0 has prefill='full'"):
            mq.follow_budget(model, 4)
        mq.set_execution(model, prefill="exact")
        with mq.follow_budget(model, 4) as follower:
            mq.set_execution(model, prefill="full")
            with pytest.raises(FullPrefill, match="wanted routed"):
                follower.update()


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
