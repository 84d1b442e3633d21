"""Budgets: ranges, tables, floors and ceilings, telemetry, and what a calibrated model really achieves."""

from __future__ import annotations

import copy
import io
import threading

import numpy as np
import pytest
import torch
from torch import nn

import mobiquant_compiler as mq
from mobiquant_compiler import checkpoint
from mobiquant_compiler.errors import BudgetOutOfRange, MaskTooLong, NotAModule, NotElastic
from mobiquant_compiler.linear import MASK_CAPACITY, MobiLinear, Router, elastic_linears
from mobiquant_compiler.runtime.budget import BudgetState, CalibratedTable, StaticTable, budget_range
from mobiquant_compiler.spec import SliceSpec
from tests.models_tiny import tiny_lm, tokens

CALIBRATION = tokens(4, 64)
NEVER = torch.finfo(torch.float32).max  # what no score reaches
BUDGETS = [2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5]


def routers(params: list[int], widths: tuple[int, ...] = (2, 2, 2, 2)) -> list[Router]:
    made = []
    for count in params:
        router = Router(torch.rand(32), widths)
        router.params = count
        made.append(router)
    return made


def mean_bits(state: BudgetState) -> float:
    """Return the bits that slices come to which all tokens use or none; only for tables that write nothing else."""
    total = 0.0
    for router in state.routers:
        used = (router.thresholds == -torch.inf).int().cumprod(0)
        assert (router.thresholds.abs() >= NEVER).all()
        total += router.params * (router.widths[0] + int(used @ torch.tensor(router.widths[1:])))
    return total / sum(r.params for r in state.routers)


@pytest.fixture(scope="module")
def calibrated() -> nn.Module:
    """A model with a table measured on CALIBRATION."""
    model = tiny_lm(2)
    mq.quantize_(model, calibration=CALIBRATION)
    return model


def run(model: nn.Module, ids: torch.Tensor = CALIBRATION) -> mq.AchievedBits:
    mq.reset_telemetry(model)
    with torch.no_grad():
        for window in ids:
            model(window.unsqueeze(0))
    return mq.achieved_bits(model)


@pytest.mark.parametrize("bits", BUDGETS)
def test_calibration_tokens_get_the_bits_that_were_asked_for(calibrated, bits):
    mq.set_budget(calibrated, bits)
    achieved = run(calibrated)
    assert float(achieved) == pytest.approx(bits, abs=0.1)
    assert achieved.tokens == CALIBRATION.numel()
    assert f"{achieved:.2f}" == f"{achieved.total:.2f}"


def test_other_text_comes_close(calibrated):
    mq.set_budget(calibrated, 5)
    assert float(run(calibrated, tokens(4, 64, seed=9))) == pytest.approx(5, abs=0.25)


def test_fractional_budgets_are_mixtures_within_a_linear(calibrated):
    mq.set_budget(calibrated, 5)
    run(calibrated)
    used = [int((m.router.hist > 0).sum()) for m in elastic_linears(calibrated).values()]
    assert max(used) >= 2
    together = sum(m.router.hist for m in elastic_linears(calibrated).values())
    assert together[1] > 0
    assert together[2] > 0


def test_more_budget_never_gives_a_token_fewer_slices(calibrated):
    before = None
    for bits in [2, *BUDGETS, 8]:
        mq.set_budget(calibrated, bits)
        thresholds = torch.stack([m.router.thresholds for m in elastic_linears(calibrated).values()])
        assert before is None or (thresholds <= before).all()
        before = thresholds


def test_ends_of_the_range_are_exact(calibrated):
    for bits in (2, 8):
        mq.set_budget(calibrated, bits)
        assert float(run(calibrated)) == bits


def test_one_threshold_serves_all_linears(calibrated):
    mq.set_budget(calibrated, 4)
    values = {float(v) for m in elastic_linears(calibrated).values() for v in m.router.thresholds}
    assert len(values) == 1


@pytest.mark.parametrize("bits", [1.9, 8.1, -1, 0, float("nan"), float("inf"), "4", None, True])
def test_out_of_range_names_the_range_and_changes_nothing(calibrated, bits):
    mq.set_budget(calibrated, 3.5)
    with pytest.raises(BudgetOutOfRange, match=r"this model can give 2 to 8 bits per weight"):
        mq.set_budget(calibrated, bits)
    assert mq.get_budget(calibrated) == 3.5


@pytest.mark.parametrize("bits", [np.float32(4), np.float64(4), np.int64(4), 4])
def test_any_real_number_is_a_budget(calibrated, bits):
    mq.set_budget(calibrated, bits)
    assert mq.get_budget(calibrated) == 4


def test_plain_models_have_no_budget():
    for call in (mq.achieved_bits, mq.get_budget, mq.reset_telemetry, lambda m: mq.set_budget(m, 4)):
        with pytest.raises(NotElastic, match="Linear has no elastic linear; call"):
            call(nn.Linear(4, 4))


def test_what_is_no_module_has_no_budget(tmp_path):
    calls = {
        "set_budget": lambda: mq.set_budget(None, 4),
        "refresh": lambda: mq.refresh(None),
        "save": lambda: checkpoint.save(None, tmp_path / "out"),
    }
    for name, call in calls.items():
        with pytest.raises(NotAModule, match=f"{name}: the model is of type NoneType; wanted a torch"):
            call()
    assert not list(tmp_path.iterdir())


def test_context_manager_restores_even_after_an_error(calibrated):
    mq.set_budget(calibrated, 6)
    before = [m.router.thresholds.clone() for m in elastic_linears(calibrated).values()]
    with mq.budget(calibrated, 3):
        assert mq.get_budget(calibrated) == 3
        with mq.budget(calibrated, 2):
            assert mq.get_budget(calibrated) == 2
        assert mq.get_budget(calibrated) == 3
    with pytest.raises(KeyError), mq.budget(calibrated, 3):
        raise KeyError
    assert mq.get_budget(calibrated) == 6
    after = [m.router.thresholds for m in elastic_linears(calibrated).values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_thresholds_keep_their_addresses(calibrated):
    before = [m.router.thresholds.data_ptr() for m in elastic_linears(calibrated).values()]
    mq.set_budget(calibrated, 2.75)
    assert [m.router.thresholds.data_ptr() for m in elastic_linears(calibrated).values()] == before


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bits", [2, 3.7, 8])
def test_loaded_thresholds_bring_their_budget(bits, assign, tmp_path):
    first, second = tiny_lm(1), tiny_lm(1)
    for model in (first, second):
        mq.quantize_(model, calibration=CALIBRATION)
    mq.set_budget(first, bits)
    mq.set_budget(second, 5)
    second.load_state_dict(first.state_dict(), assign=assign)
    assert mq.get_budget(second) == bits
    wanted = [m.router.thresholds.clone() for m in elastic_linears(first).values()]
    with mq.budget(second, 6):
        assert mq.get_budget(second) == 6
    mq.save(second, tmp_path / "saved")
    assert mq.get_budget(mq.load_into(tiny_lm(1), tmp_path / "saved")) == bits
    found = [m.router.thresholds for m in elastic_linears(second).values()]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_loaded_thresholds_of_a_static_table_have_a_budget_that_has_them():
    first, second = tiny_lm(2), tiny_lm(2)
    for model in (first, second):
        mq.quantize_(model)
    mq.set_budget(first, 4.3)
    second.load_state_dict(first.state_dict())
    found = mq.get_budget(second)
    assert found < 8
    mq.set_budget(second, found)
    pairs = zip(elastic_linears(first).values(), elastic_linears(second).values(), strict=True)
    assert all(torch.equal(a.router.thresholds, b.router.thresholds) for a, b in pairs)


def test_thresholds_that_no_budget_has_leave_the_one_in_force(calibrated):
    mq.set_budget(calibrated, 4)
    routers_of = {m.router for m in elastic_linears(calibrated).values()}
    for number, router in enumerate(routers_of):
        router.thresholds.fill_(float(number))
    assert mq.get_budget(calibrated) == 4
    mq.set_budget(calibrated, 4)


def test_a_model_that_moves_keeps_its_budget(calibrated):
    mq.set_budget(calibrated, 4.4)
    assert mq.get_budget(calibrated.double().float()) == 4.4
    assert mq.get_budget(copy.deepcopy(calibrated).to("meta")) == 4.4, "where there are no thresholds to read"


def test_copied_and_pickled_models_have_a_budget_of_their_own(calibrated):
    mq.set_budget(calibrated, 4.4)
    file = io.BytesIO()
    torch.save(calibrated, file)
    file.seek(0)
    for other in (copy.deepcopy(calibrated), torch.load(file, weights_only=False)):
        assert mq.get_budget(other) == 4.4
        mq.set_budget(other, 3)
        assert (mq.get_budget(other), mq.get_budget(calibrated)) == (3, 4.4)


def test_floors_and_ceilings_hold_and_the_average_is_still_met():
    model = tiny_lm(2)
    config = mq.SliceConfig(floor={"layers.1.down_proj": 3}, ceiling={"layers.0.*": 3})
    mq.quantize_(model, config, calibration=CALIBRATION)
    for bits in (3.5, 4.5, 5.5, 6.5):
        mq.set_budget(model, bits)
        achieved = run(model)
        assert float(achieved) == pytest.approx(bits, abs=0.1)
        assert achieved.layers["layers.1.down_proj"] >= 6
        assert max(v for name, v in achieved.layers.items() if name.startswith("layers.0")) <= 6
    low, high = budget_range([m.router for m in elastic_linears(model).values()])
    assert low > 2
    assert high < 8
    with pytest.raises(BudgetOutOfRange, match="or change floors and ceilings"):
        mq.set_budget(model, 7.9)


def test_limits_that_leave_no_choice_give_one_budget():
    model = tiny_lm(1)
    mq.quantize_(model, mq.SliceConfig(floor={"*": 2}, ceiling={"*": 2}))
    mq.set_budget(model, 4)
    assert float(run(model)) == 4
    with pytest.raises(BudgetOutOfRange, match="4 to 4"):
        mq.set_budget(model, 5)


@pytest.mark.parametrize("params", [[10] * 8, [1, 100, 7, 30], [5]])
def test_static_table_meets_the_budget_as_well_as_whole_linears_can(params):
    state = BudgetState(routers(params))
    step = max(params) * 2 / sum(params)
    for bits in np.linspace(2, 8, 25):
        state.set(float(bits))
        assert abs(mean_bits(state) - bits) <= step / 2 + 1e-9


def test_static_table_is_exact_where_whole_linears_can_be():
    state = BudgetState(routers([10] * 8))
    for bits in (2, 2.5, 3, 4, 4.75, 6, 8):
        state.set(bits)
        assert mean_bits(state) == bits


def test_static_table_is_monotone_and_spreads_over_the_depth():
    state = BudgetState(routers([10] * 8))
    state.set(3)  # half the linears use two slices
    half = [int((r.thresholds == -torch.inf).sum()) for r in state.routers]
    assert sum(half) == 4
    assert sum(half[:4]) == 2
    before = None
    for bits in np.linspace(2, 8, 49):
        state.set(float(bits))
        now = torch.stack([r.thresholds for r in state.routers])
        assert before is None or (now <= before).all()
        before = now


def test_static_table_keeps_limits():
    made = routers([10] * 4)
    made[0].floor, made[1].ceiling = 3, 2
    state = BudgetState(made)
    state.set(5)
    assert (made[0].thresholds[:2] == -torch.inf).all()
    assert (made[1].thresholds[1:] == torch.inf).all()
    assert not any((r.thresholds == torch.inf).any() for r in [made[0], *made[2:]]), "infinity is for ceilings alone"
    assert mean_bits(state) == pytest.approx(5, abs=0.25)


def test_uncalibrated_models_use_the_static_table():
    model = tiny_lm(2)
    mq.quantize_(model, budget=5)
    assert float(run(model)) == pytest.approx(5, abs=0.1)
    assert all(int((m.router.hist > 0).sum()) == 1 for m in elastic_linears(model).values())


def test_unequal_widths_and_one_slice():
    for widths, low, high in [((4, 2, 2), 4, 8), ((1, 1, 4), 1, 6), ((4,), 4, 4)]:
        model = tiny_lm(1)
        mq.quantize_(model, mq.SliceConfig(widths=widths), calibration=CALIBRATION)
        for bits in np.linspace(low, high, 4):
            mq.set_budget(model, float(bits))
            assert float(run(model)) == pytest.approx(bits, abs=0.15), widths


def test_between_anchors_the_threshold_is_interpolated():
    both = routers([100, 300])
    low = torch.linspace(-2, 2, 33).expand(2, -1)
    high = low + 1  # the same scores, e times larger at the greater budget
    anchors = torch.tensor([3.0, 5.0], dtype=torch.float64)
    pair = CalibratedTable(anchors, torch.stack([low, high]))
    one = CalibratedTable(anchors[:1], low.unsqueeze(0))
    for budget, share in ((3.0, 0.0), (3.5, 0.25), (4.0, 0.5), (4.5, 0.75), (5.0, 1.0)):
        shift = pair.thresholds(both, budget).log() - one.thresholds(both, budget).log()
        # The grids of the two tables differ by a hundredth or so in the logarithm.
        assert torch.allclose(shift, torch.full_like(shift, share), atol=0.03), (budget, shift)


def test_calibrated_table_survives_scores_of_nothing():
    dead = CalibratedTable(torch.tensor([4.0]).double(), torch.zeros(1, 2, 257))
    assert dead.thresholds(routers([1, 1]), 5).isfinite().all()


def test_states_made_by_hand_start_at_all_slices():
    linear = MobiLinear.from_weight(torch.randn(8, 32), None, SliceSpec((2, 2), 32))
    model = nn.Sequential(linear)
    assert mq.get_budget(model) == 4
    mq.set_budget(model, 2)
    model(torch.randn(3, 32))
    assert linear.router.hist.tolist() == [3, 0]
    assert isinstance(linear.router.state.table, StaticTable)


def test_achieved_bits_are_weighted_by_parameters():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 128))
    mq.quantize_(model, mq.SliceConfig(ceiling={"0": 1}))
    assert np.isnan(float(mq.achieved_bits(model)))
    model(torch.randn(5, 64))
    achieved = mq.achieved_bits(model)
    assert achieved.layers == {"0": 2.0, "1": 8.0}
    assert achieved.total == pytest.approx((2 * 64 * 32 + 8 * 32 * 128) / (64 * 32 + 32 * 128))


def test_padding_is_left_out_of_achieved_bits(calibrated):
    ids, mask = CALIBRATION[:2], torch.ones(2, 64, dtype=torch.long)
    mask[1, 10:] = 0
    mq.set_budget(calibrated, 5)
    mq.reset_telemetry(calibrated)
    with torch.no_grad(), mq.padding_mask(calibrated, mask):
        calibrated(ids)
    assert mq.achieved_bits(calibrated).tokens == 74
    mq.reset_telemetry(calibrated)
    with torch.no_grad():
        calibrated(ids)
    assert mq.achieved_bits(calibrated).tokens == 128


def test_inner_mask_gives_way_to_the_outer_one_again(calibrated):
    outer = torch.tensor([[1, 1, 1, 0]])
    with torch.no_grad(), mq.padding_mask(calibrated, outer):
        with mq.padding_mask(calibrated, torch.ones(1, 2)):
            pass
        mq.reset_telemetry(calibrated)
        calibrated(CALIBRATION[:1, :4])
    assert mq.achieved_bits(calibrated).tokens == 3


def test_a_mask_beyond_capacity_is_an_error(calibrated):
    mask = mq.padding_mask(calibrated, torch.ones(MASK_CAPACITY + 1))
    with pytest.raises(MaskTooLong, match=f"{MASK_CAPACITY + 1} tokens; at most {MASK_CAPACITY}"):
        mask.__enter__()


def test_budgets_may_move_in_another_thread(calibrated):
    stop, errors = threading.Event(), []

    def move() -> None:
        try:
            while not stop.is_set():
                for bits in (2, 5.3, 8):
                    mq.set_budget(calibrated, bits)
        except Exception as error:  # noqa: BLE001  whatever it is, the test must see it
            errors.append(error)

    threads = [threading.Thread(target=move) for _ in range(2)]
    for thread in threads:
        thread.start()
    with torch.no_grad():
        outputs = [calibrated(CALIBRATION[:1]) for _ in range(20)]
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(y.isfinite().all() for y in outputs)
    # Whoever came last set all routers: none is left at another budget.
    rows = {tuple(m.router.thresholds.tolist()) for m in elastic_linears(calibrated).values()}
    assert len(rows) == 1
