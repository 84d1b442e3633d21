"""Budget -> thresholds: the tables, and the state that all routers of a model share.

Source: docs/architecture.md, "Router and budget".
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from mobiquant_compiler.config import is_number
from mobiquant_compiler.errors import BudgetOutOfRange
from mobiquant_compiler.linear import Router

_LOCK = threading.RLock()  # budgets may be set from another thread than the one that runs the model
_GRID = 1024  # points of the threshold grid on which the bits curve is kept
_LIVE: weakref.WeakSet[BudgetState] = weakref.WeakSet()  # registry: options={"budget"} knows tensors, not models
QUANTILES = 257  # points kept of each router's score distribution


class BudgetTable(Protocol):
    """Turns a budget into the thresholds of every router.

    Attributes:
        measured: Whether thresholds are scores that tokens meet or do not; else no token chooses anything.
    """

    measured: ClassVar[bool]

    def thresholds(self, routers: Sequence[Router], budget: float) -> Tensor:
        """Return float32 [R, E - 1] for `budget` bits, before floors and ceilings."""
        ...


def budget_range(routers: Sequence[Router]) -> tuple[float, float]:
    """Return the least and greatest average bits that floors and ceilings allow."""
    total = sum(r.params for r in routers)
    low = sum(r.params * sum(r.widths[: r.floor]) for r in routers) / total
    high = sum(r.params * sum(r.widths[: r.ceiling]) for r in routers) / total
    return low, high


def _allowed(routers: Sequence[Router]) -> tuple[Tensor, Tensor]:
    """Return bool [R, E - 1]: slices that are forced, and slices that may be used at all."""
    number = torch.arange(2, len(routers[0].widths) + 1)
    forced = torch.stack([number <= r.floor for r in routers])
    usable = torch.stack([number <= r.ceiling for r in routers])
    return forced, usable


@dataclass(slots=True)
class StaticTable:
    """Thresholds without calibration: every token of a linear uses the same count, chosen from the budget alone.

    Scores mean nothing before they were measured, so the budget is met exactly by counts per linear: all linears
    climb one slice after the other, spread evenly over the depth of the model.
    """

    measured: ClassVar[bool] = False

    def thresholds(self, routers: Sequence[Router], budget: float) -> Tensor:
        """See `BudgetTable.thresholds`; entries are ``-inf`` (use) or ``inf`` (do not)."""
        forced, usable = _allowed(routers)
        used = forced.clone()
        widths = torch.tensor(routers[0].widths[1:], dtype=torch.float64)
        params = torch.tensor([r.params for r in routers], dtype=torch.float64)
        left = (budget - budget_range(routers)[0]) * float(params.sum())
        for slice_index in range(used.shape[1]):
            for row in _spread(len(routers)):
                cost = float(params[row] * widths[slice_index])
                if not usable[row, slice_index] or used[row, slice_index] or left < cost / 2:
                    continue
                used[row, slice_index] = True
                left -= cost
        return torch.where(used, -torch.inf, torch.inf).float()


def _spread(count: int) -> list[int]:
    """Return 0..count-1 in bit-reversed order: any prefix is spread evenly."""
    bits = max(1, (count - 1).bit_length())
    reversed_bits = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits)]
    return [i for i in reversed_bits if i < count]


@dataclass(slots=True)
class CalibratedTable:
    """One global threshold per budget, from score distributions measured on calibration tokens.

    Attributes:
        anchors: Budgets at which scores were measured, rising, float64 [A].
        quantiles: Quantiles of the natural logarithm of each router's base score, float32 [A, R, Q]; or
            [A, R, E - 1, Q], of the least score up to each slice, where routers are trained.
    """

    measured: ClassVar[bool] = True

    anchors: Tensor
    quantiles: Tensor
    _curves: dict[tuple[object, ...], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def thresholds(self, routers: Sequence[Router], budget: float) -> Tensor:
        """See `BudgetTable.thresholds`: the threshold is interpolated between the two nearest anchors."""
        grid, curves = self._curve(routers)
        logs = torch.stack([_invert(grid, curve, budget) for curve in curves])
        log = _interpolate(self.anchors, logs, budget)
        return log.exp().float().expand(len(routers), len(routers[0].widths) - 1).clone()

    def _curve(self, routers: Sequence[Router]) -> tuple[Tensor, Tensor]:
        """Return the threshold grid [P] (log, falling) and the mean bits at each point [A, P] (rising)."""
        gains: list[list[float]] = [[]] * len(routers)
        if self.quantiles.dim() == 3:  # one read of the device, not one a router; none where gains do not matter
            gains = torch.stack([r.gain.to(routers[0].gain.device) for r in routers]).tolist()
        key = tuple((r.floor, r.ceiling, r.params, *gain) for r, gain in zip(routers, gains, strict=True))
        if key not in self._curves:
            self._curves[key] = self._measure(routers)
        return self._curves[key]

    def _measure(self, routers: Sequence[Router]) -> tuple[Tensor, Tensor]:
        gain = torch.stack([r.gain.double().cpu().log() for r in routers])  # [R, E - 1]
        quantiles = self.quantiles.double()
        if quantiles.dim() == 4:
            gain = torch.zeros_like(gain)
        else:
            quantiles = quantiles.unsqueeze(2).expand(-1, -1, gain.shape[1], -1)
        finite = quantiles[torch.isfinite(quantiles)]
        high, low = float(finite.max() + gain.max()) + 1e-3, float(finite.min() + gain.min()) - 1e-3
        grid = torch.linspace(high, low, _GRID, dtype=torch.float64)
        forced, usable = _allowed(routers)
        widths = torch.tensor(routers[0].widths, dtype=torch.float64)
        params = torch.tensor([r.params for r in routers], dtype=torch.float64)
        curves = []
        for anchor in quantiles:  # [R, E - 1, Q]
            needed = grid.view(1, 1, -1) - gain.unsqueeze(-1)  # score that slice e needs, [R, E - 1, P]
            share = _share_above(anchor.flatten(0, 1), needed.flatten(0, 1)).view(needed.shape)
            share = torch.where(forced.unsqueeze(-1), 1.0, torch.where(usable.unsqueeze(-1), share, 0.0))
            bits = widths[0] + (share * widths[1:].view(1, -1, 1)).sum(1)
            curves.append((bits * params.unsqueeze(1)).sum(0) / params.sum())
        return grid, torch.stack(curves)


def _share_above(quantiles: Tensor, values: Tensor) -> Tensor:
    """Return the share of scores at or above `values`, row by row; quantiles [R, Q], values [R, P]."""
    flat = values.contiguous()
    last = quantiles.shape[1] - 1
    right = torch.searchsorted(quantiles.contiguous(), flat).clamp(1, last)
    below, above = quantiles.gather(1, right - 1), quantiles.gather(1, right)
    inside = ((flat - below) / (above - below).clamp_min(1e-12)).clamp(0, 1)
    return 1 - (right - 1 + inside) / last


def _invert(grid: Tensor, curve: Tensor, budget: float) -> Tensor:
    """Return the threshold (log) at which the rising `curve` of mean bits meets `budget`."""
    right = int(torch.searchsorted(curve, torch.tensor(budget, dtype=curve.dtype)).clamp(1, len(curve) - 1))
    span = (curve[right] - curve[right - 1]).clamp_min(1e-12)
    part = ((budget - curve[right - 1]) / span).clamp(0, 1)
    return grid[right - 1] + part * (grid[right] - grid[right - 1])


def _interpolate(points: Tensor, values: Tensor, at: float) -> Tensor:
    if len(points) == 1 or at <= points[0]:
        return values[0]
    if at >= points[-1]:
        return values[-1]
    right = int(torch.searchsorted(points, torch.tensor(at, dtype=points.dtype)))
    part = (at - points[right - 1]) / (points[right] - points[right - 1])
    return values[right - 1] + part * (values[right] - values[right - 1])


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _budget_of(
    found: Tensor, thresholds: Callable[[float], Tensor], bits_of: Tensor, known: float, low: float, high: float
) -> float | None:
    """Return the budget that has these thresholds, `known` if it is one, or None.

    Shapes: found and what `thresholds` gives [R, E - 1]; `bits_of`, likewise, are what each slice costs, by which
    thresholds of a greater budget let tokens use more.
    """
    for bits in (known, low, high):
        if torch.equal(thresholds(bits), found):
            return bits
    for _ in range(60):
        bits = (low + high) / 2
        there = thresholds(bits)
        if torch.equal(there, found):
            short = (round(bits, digits) for digits in range(6))  # as a user would have said it
            return next((value for value in short if torch.equal(thresholds(value), found)), bits)
        fewer, more = (bits_of * (there > found)).sum(), (bits_of * (there < found)).sum()
        low, high = (bits, high) if bool(fewer > more) else (low, bits)
    return None


class BudgetState:
    """The routers that share one budget, their table, and the budget in force.

    Attributes:
        aim: The budget whose thresholds are written: the same, or what `steer` put in its place.
        started: The last budget that `start` was given, None if there was none.
    """

    started: float | None = None

    def __init__(self, routers: Sequence[Router], table: BudgetTable | None = None) -> None:
        self.routers = list(routers)
        self.table: BudgetTable = table or StaticTable()
        for router in self.routers:
            router.state = self
        self._budget = self.aim = self.range[1]
        self._written = self._marks()
        _LIVE.add(self)

    @property
    def budget(self) -> float:
        """What users asked for; once thresholds came from elsewhere (`load_state_dict`), the budget that has them."""
        with _LOCK:
            if not self._is_ours():
                self._adopt()
            return self._budget

    @property
    def range(self) -> tuple[float, float]:
        """The budgets that can be set, in bits."""
        return budget_range(self.routers)

    def check(self, budget: float, where: str = "set_budget") -> None:
        """Raise `BudgetOutOfRange` for a budget that floors and ceilings do not allow."""
        low, high = self.range
        if not (is_number(budget) and low - 1e-9 <= budget <= high + 1e-9):
            bounded = any(r.floor > 1 or r.ceiling < len(r.widths) for r in self.routers)
            hint = ", or change floors and ceilings" if bounded else ""
            raise BudgetOutOfRange(where=where, got=budget, low=low, high=high, hint=hint)

    def set(self, budget: float) -> None:
        """Write the thresholds of `budget` into the routers' own tensors; the next launch uses them.

        Raises:
            BudgetOutOfRange: nothing is changed then.
        """
        self.check(budget)
        with _LOCK:
            self._write(float(budget))
            self._budget = self.aim

    def start(self, budget: float) -> None:
        """Set the budget that an option of compiling asks for, once: later graphs leave what was set since.

        Raises:
            BudgetOutOfRange: nothing is changed then, and the next graph that asks for it raises too.
        """
        if budget != self.started:
            self.set(budget)
            self.started = budget

    def steer(self, aim: float, budget: float) -> None:
        """Write the thresholds of another budget while the one in force stays `budget`; nothing if it no longer is.

        Raises:
            BudgetOutOfRange: nothing is changed then.
        """
        self.check(aim)
        with _LOCK:
            if self.budget == budget:
                self._write(aim)

    def _write(self, aim: float) -> None:
        low, high = self.range
        values = self._thresholds(aim, low, high)
        moved = {device: values.to(device) for device in {r.thresholds.device for r in self.routers}}
        for number, router in enumerate(self.routers):
            router.thresholds.copy_(moved[router.thresholds.device][number])
        self.aim = aim
        self._written = self._marks()

    def _marks(self) -> list[tuple[Tensor, int]]:
        """Return the tensors that hold thresholds, and how often each was written."""
        return [(router.thresholds, _version(router.thresholds)) for router in self.routers]

    def _is_ours(self) -> bool:
        """Say whether nobody else has written thresholds, or put other tensors in their place, since `_write` did."""
        pairs = zip(self._marks(), self._written, strict=True)
        return all(now is then and version == before for (now, version), (then, before) in pairs)

    def _adopt(self) -> None:
        """Find the budget whose thresholds are there; the one in force stays where no budget has them."""
        if any(router.thresholds.is_meta for router in self.routers):
            return
        dtype = self.routers[0].thresholds.dtype
        found = torch.stack([router.thresholds.detach().cpu() for router in self.routers])
        params = torch.tensor([router.params for router in self.routers], dtype=torch.float64)
        bits_of = params.unsqueeze(1) * torch.tensor(self.routers[0].widths[1:], dtype=torch.float64)
        low, high = self.range
        aim = _budget_of(found, lambda bits: self._thresholds(bits, low, high).to(dtype), bits_of, self.aim, low, high)
        if aim is not None and aim != self.aim:
            self._budget = self.aim = aim
        self._written = self._marks()

    def _thresholds(self, budget: float, low: float, high: float) -> Tensor:
        forced, usable = _allowed(self.routers)
        if budget >= high - 1e-9:
            values = torch.full(forced.shape, -torch.inf)
        elif budget <= low + 1e-9:
            values = torch.full(forced.shape, torch.inf)
        else:
            values = self.table.thresholds(self.routers, float(budget))
        # A slice that only this budget leaves out stays finite: inf means never, in calls of all slices too.
        values = values.clamp(max=torch.finfo(values.dtype).max)
        return values.masked_fill(forced, -torch.inf).masked_fill(~usable, torch.inf)


def live_states() -> list[BudgetState]:
    """Return the budget states of all models that are alive."""
    return list(_LIVE)
