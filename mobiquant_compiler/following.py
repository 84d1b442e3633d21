"""`follow_budget`: thresholds that follow what tokens really use, on text that the budget table was not measured on."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from torch import Tensor, nn

from mobiquant_compiler.budgets import linears_of, states_of
from mobiquant_compiler.errors import AlreadyFollowed, BadOption, FollowingEnded, FullPrefill
from mobiquant_compiler.linear import MobiLinear, Router
from mobiquant_compiler.runtime import telemetry
from mobiquant_compiler.runtime.budget import BudgetState
from mobiquant_compiler.runtime.steering import Steering
from mobiquant_compiler.spec import Prefill

EVERY = 1024  # tokens
_LOCK = threading.RLock()
_OPEN: weakref.WeakSet[BudgetFollower] = weakref.WeakSet()  # registry: two followers of one model would fight


@dataclass(slots=True)
class _Course:
    """One budget state on its way.

    Attributes:
        state: What is steered.
        steering: By which loop.
        before: Counts at the last update, and how often they had been reset then.
        since: Counts from the start of this course to the last update.
    """

    state: BudgetState
    steering: Steering
    before: dict[Router, tuple[Tensor, int]]
    since: dict[Router, Tensor]

    @classmethod
    def start(cls, state: BudgetState, counts: dict[Router, Tensor], every: int) -> _Course:
        steering = Steering(state.budget, *state.range, every, state.aim)
        return cls(state, steering, _marked(counts), {router: hist * 0 for router, hist in counts.items()})

    def is_current(self, counts: dict[Router, Tensor]) -> bool:
        """Say whether nobody set a budget, moved its range or replaced routers since the last update."""
        state, steering = self.state, self.steering
        told = (steering.wanted, steering.aim, (steering.low, steering.high), self.before.keys())
        return (state.budget, state.aim, state.range, counts.keys()) == told

    def advance(self, linears: dict[str, MobiLinear], counts: dict[Router, Tensor]) -> None:
        """Steer by what was counted, once enough tokens have come."""
        fresh = {}
        for router, hist in counts.items():
            before, resets = self.before[router]
            fresh[router] = hist - before if resets == router.resets else hist
        lately = telemetry.average(linears, fresh)
        if lately.tokens < self.steering.every:
            return
        self.before = _marked(counts)
        self.since = {router: hist + fresh[router] for router, hist in self.since.items()}
        overall = telemetry.average(linears, self.since)
        aim = self.steering.update(lately.total, lately.tokens, overall.total, overall.tokens)
        if aim != self.state.aim:
            self.state.steer(aim, self.steering.wanted)


def _marked(counts: dict[Router, Tensor]) -> dict[Router, tuple[Tensor, int]]:
    return {router: (hist, router.resets) for router, hist in counts.items()}


class BudgetFollower:
    """Moves the thresholds of a model so that the bits of its tokens meet a budget on average; see `follow_budget`.

    Attributes:
        model: Whose thresholds.
        every: Tokens between two changes, at least.
    """

    def __init__(self, model: nn.Module, bits: float | None, every: int) -> None:
        linears = linears_of(model, "follow_budget")
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise BadOption(where="follow_budget", name="every", got=every, wanted="a whole number of at least 1")
        _refuse_full(linears)
        states = states_of(linears)
        if bits is not None:
            for state in states:
                state.check(bits, "follow_budget")
        self.model, self.every = model, every
        self._pending, self._closed = 0, False
        self._before = [(state, state.budget) for state in states]
        with _LOCK:
            for other in _OPEN:
                if any(state in other._courses for state in states):
                    raise AlreadyFollowed(model=type(model).__name__, got=f"{states[0].budget:g}")
            for state in states:
                state.set(state.budget if bits is None else bits)
            counts = telemetry.read(telemetry.routers_of(linears))
            self._courses = {s: _Course.start(s, _of_state(s, counts), every) for s in states}
            _OPEN.add(self)

    @property
    def follows(self) -> bool:
        """Whether thresholds can follow: without a measured table (calibration tokens) no token chooses anything."""
        return any(state.table.measured for state in self._courses)

    def update(self, tokens: int | None = None) -> None:
        """Look at what tokens used, and move the thresholds if `every` tokens have come since they last moved.

        Call it between two calls of the model, as often as you like. It reads all counters at once from the device.

        Args:
            tokens: How many tokens the model was given since the last call of `update`, if known: then nothing is
                read before `every` have come together (a loop of single tokens does not wait for the device).

        Raises:
            FollowingEnded: `close` was called.
            FullPrefill: as of `follow_budget`.
        """
        if self._closed:
            raise FollowingEnded(where="update", model=type(self.model).__name__)
        with _LOCK:
            if tokens is not None:
                self._pending += tokens
                if self._pending < self.every:
                    return
            self._pending = 0
            self._advance()

    def _advance(self) -> None:
        linears = linears_of(self.model, "follow_budget")  # anew: a plain model may have got other slices
        _refuse_full(linears)
        states = [state for state in states_of(linears) if state.table.measured]
        everything = telemetry.read([r for r in telemetry.routers_of(linears) if r.state in states])
        for state in states:
            counts = _of_state(state, everything)
            course = self._courses.get(state)
            if course is None or not course.is_current(counts):  # a budget set meanwhile is followed from here on
                self._courses[state] = _Course.start(state, counts, self.every)
                continue
            course.advance({name: m for name, m in linears.items() if m.router in counts}, counts)

    def close(self) -> None:
        """Return to the budget before, with the thresholds that its table has; more than once does no harm."""
        with _LOCK:
            if self._closed:
                return
            self._closed = True
            _OPEN.discard(self)
            before = dict(self._before)
            for state in before | self._courses:  # courses: slices that came later too
                state.set(before.get(state, state.budget))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _refuse_full(linears: dict[str, MobiLinear]) -> None:
    for name, linear in linears.items():
        if linear.prefill == Prefill.FULL:
            raise FullPrefill(where=name, got=linear.prefill, wanted=str(Prefill.ROUTED))


def _of_state(state: BudgetState, counts: dict[Router, Tensor]) -> dict[Router, Tensor]:
    return {router: hist for router, hist in counts.items() if router.state is state}


def follow_budget(model: nn.Module, bits: float | None = None, *, every: int = EVERY) -> BudgetFollower:
    """Let thresholds follow telemetry, so that tokens of any text use `bits` on average.

        with mq.follow_budget(model, 4) as follower:
            for batch in batches:
                model(batch)
                follower.update()

    The budget table was measured on calibration tokens; scores of other text differ, and then so do achieved bits.
    `update` compares them with the budget and asks the table for more or less. Thresholds are written in place, as by
    `set_budget`: no recompile, no new CUDA graph. `get_budget` keeps naming the budget that was asked for, and
    `achieved_bits` counts as ever.

    The price: what a token gets depends on what came before. Results are the same for the same calls in the same
    order only, so a request alone and the same request in a busy server may differ, and the promise of equal results in
    any batch holds between two updates. Nothing follows unless you ask for it.

    Updates are explicit calls. A forward hook would be traced wherever the hooked module is compiled, and waiting for
    the device inside a forward pass breaks graphs.

    Args:
        model: Quantized model, compiled or not; or a plain one that ran compiled with backend="mobiquant".
        bits: Wanted average, as in `set_budget`; the budget in force by default. One set later is followed from the
            next update on, as from a new start.
        every: Tokens between two changes of thresholds, at least.

    Returns:
        The follower, at work. Leaving its block, or `close`, returns to the budget before it, with the thresholds that
        the table has for that.

    Raises:
        NotElastic: the model has no elastic linear.
        BudgetOutOfRange: names the range; nothing is changed.
        AlreadyFollowed: by another follower that is not closed.
        FullPrefill: a linear uses all slices in long calls, whatever the thresholds. (One compiled with
            ``options={"prefill": "full"}`` cannot be told from its model: do not follow there.)
        BadOption: `every` is no number of tokens.
    """
    return BudgetFollower(model, bits, every)
