"""Our linear as the benchmark calls it: which cases there are, their operands, checks and times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from linear_timing import Call, Sample, Timing, WrongResult, check, copies_for, l2_bytes, measure
from torch import Tensor

from mobiquant_compiler import reference, wiring
from mobiquant_compiler.packing import unit_views
from mobiquant_compiler.runtime.launch import Weight
from mobiquant_compiler.spec import Activation, Layout, Prefill, SliceSpec

WIDTHS, GROUP = (2, 2, 2, 2), 128
SMALL_BATCH = 64  # up to here the multiplication is also timed alone, on prepared activations
A8_TOKENS = BIT_MAJOR_TOKENS = (1, 8)
BIT_MAJOR_SHAPE = (4096, 4096)  # here all slices, and eight tokens too; elsewhere one token, these slices
BIT_MAJOR_SLICES = (2, 4)
PREFILL_SHARES = (0.4, 0.3, 0.2, 0.1)  # of tokens that use 1, 2, 3 and 4 slices: 2 on average
TRAINED_WIDTH = 12  # hidden units of the trained router, those of a calibration's default
TOLERANCES = {"a16": 1e-2, "a8": 3e-2}


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured at one shape and number of tokens.

    Attributes:
        slices: The largest slice count of a token.
        counts: "uniform"; "mixed" (1, 2, .. in turn, or PREFILL_SHARES shuffled); "full" (prefill with all slices).
        activation: "a16" or "a8".
        layout: "slice_major" or "bit_major".
    """

    slices: int
    counts: str = "uniform"
    activation: str = "a16"
    layout: str = "slice_major"


def cases(n: int, k: int, tokens: int, slices: Sequence[int]) -> list[Case]:
    """Return the cases of a shape and number of tokens, the ones that promises are about first."""
    most = len(WIDTHS)
    if tokens > SMALL_BATCH:
        found = [Case(2), Case(most, "mixed"), Case(most, "full")]
        return [case for case in found if case.slices in slices]
    found = [Case(count) for count in slices]
    found += [Case(count, "mixed") for count in slices if count in (2, most) and count <= tokens]
    if tokens in A8_TOKENS:
        found += [Case(count, activation="a8") for count in slices]
    if tokens in BIT_MAJOR_TOKENS:
        whole = (n, k) == BIT_MAJOR_SHAPE
        chosen = slices if whole else [count for count in slices if tokens == 1 and count in BIT_MAJOR_SLICES]
        found += [Case(count, layout="bit_major") for count in chosen]
    return found


def counts_of(case: Case, tokens: int, device: torch.device) -> Tensor:
    """Return the slice count of each token, int32 [T]."""
    if case.counts != "mixed":
        return torch.full((tokens,), case.slices, dtype=torch.int32, device=device)
    if tokens <= SMALL_BATCH:
        return torch.arange(tokens, dtype=torch.int32, device=device) % case.slices + 1
    limits = (torch.tensor(PREFILL_SHARES, dtype=torch.float64).cumsum(0) * tokens).round()
    ordered = 1 + torch.searchsorted(limits, torch.arange(tokens, dtype=torch.float64), right=True, out_int32=True)
    return ordered.to(device)[torch.randperm(tokens, device=device)]


def traffic(case: Case, n: int, k: int, tokens: int) -> int:
    """Return the bytes that must be read or written once: slices used, scale, zero point, activations, outputs."""
    weight = n * k * sum(WIDTHS[: case.slices]) // 8 + 2 * 2 * n * k // GROUP
    return weight + tokens * k * (1 if case.activation == "a8" else 2) + tokens * n * 2


class Weights:
    """One random weight, copied for rotation, and what routing needs.

    Attributes:
        spec: Widths, group and layout.
        copies: Its slices, scale and zero point, once for each copy.
    """

    def __init__(self, n: int, k: int, layout: str, device: torch.device, copies: int | None = None) -> None:
        self.n, self.k, self.device = n, k, device
        self.spec = spec = SliceSpec(WIDTHS, GROUP, Layout(layout))
        cells = 1 << WIDTHS[0]
        slices = torch.randint(-(1 << 31), 1 << 31, spec.packed_shape(n, k), dtype=torch.int32, device=device)
        scale = (0.5 + torch.rand(spec.scale_shape(n, k), device=device)) * 12**0.5 / cells / k**0.5
        zero = (cells - 1) / 2 + torch.rand(spec.scale_shape(n, k), device=device) - 0.5
        first = (slices, scale.half(), zero.half())
        count = copies or self._needed(1)
        clones = [(first[0].clone(), first[1].clone(), first[2].clone()) for _ in range(count - 1)]
        self.copies = [first, *clones]
        self.router = (torch.rand(k, device=device), 4.0 ** -torch.arange(spec.num_slices - 1, device=device))
        units, scores = TRAINED_WIDTH, spec.num_slices - 1
        shapes = ((units, k + 2), (units,), (scores, units), (scores,))
        self.network = tuple(torch.randn(shape, device=device).div(shape[-1] ** 0.5).half() for shape in shapes)
        self.hist = torch.zeros(spec.num_slices, dtype=torch.int64, device=device)
        self.mask = torch.zeros(1, dtype=torch.int32, device=device)

    def _needed(self, slices: int) -> int:
        return copies_for(traffic(Case(slices), self.n, self.k, 0), l2_bytes(self.device))

    def rotation(self, slices: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return as many copies as it takes to find none cached when `slices` of each are read."""
        return self.copies[: self._needed(slices)]

    def order_of(self, x: Tensor) -> wiring.Order:
        """Return how tokens lie that are routed for it."""
        return wiring.order_of(x, [Weight(*self.copies[0], None)], self.spec)

    def prepare(
        self, x: Tensor, case: Case, *, counts: Tensor | None = None, trained: bool = False
    ) -> Callable[[], Any]:
        """Return route and quantize as a call, by a data-free router or a trained one.

        Its thresholds give every token `case.slices`; `counts` take the place of what it chose.
        """
        numbers = torch.arange(1, self.spec.num_slices, device=self.device)
        thresholds = torch.where(numbers < case.slices, -torch.inf, torch.inf)
        activation = Activation(case.activation)
        router = (*self.router, *self.network) if trained else self.router
        weights = [Weight(*self.copies[0], None)]
        routing = (x, router, thresholds, self.hist, self.mask, "mlp" if trained else "energy")

        order = self.order_of(x)
        given = placed = None
        if counts is not None and order is wiring.Order.SORTED:
            # Sorted rows lie where their counts say. What is timed routes and sorts too, but these are multiplied.
            given = wiring.quantize(x, counts, self.spec, activation, token_rows=True)
        elif counts is not None and order is wiring.Order.ROWS:
            placed = torch.stack((counts, torch.arange(len(counts), dtype=torch.int32, device=self.device)))

        def prepared() -> Any:
            found = wiring.prepare_for(weights, *routing, self.spec, activation)
            if counts is None:
                return found
            return replace(found, counts=counts, placed=placed) if given is None else given

        return prepared

    def expected(self, x: Tensor, counts: Tensor, sample: Sample) -> Tensor:
        """Return the float64 result of the sampled tokens and output rows."""
        slices, scale, zero = self.copies[0]
        rows, tokens = sample.rows, sample.tokens
        chosen = [view[rows].reshape(-1) for view in unit_views(slices, self.spec, self.spec.num_slices)]
        weight = (torch.cat(chosen).view(self.spec.packed_shape(len(rows), self.k)), scale[rows], zero[rows])
        return reference.routed_linear(x[tokens].double(), counts[tokens], *weight, None, self.spec)


@dataclass(frozen=True, slots=True)
class Measured:
    """Times of one case: the multiplication, the whole linear, and how far the result is off."""

    alone: Timing
    whole: Timing
    path: str
    relative_error: float
    mean_slices: float


def calls_of(weights: Weights, case: Case, x: Tensor, counts: Tensor) -> tuple[Sequence[Call], Sequence[Call], str]:
    """Return the calls to time: the multiplication alone, the whole linear, and the name of the path.

    Beyond `SMALL_BATCH` tokens there is one list: the linear takes activations as they are and counts as given.
    """
    spec, activation = weights.spec, Activation(case.activation)
    rotation = weights.rotation(case.slices)
    if x.shape[0] > SMALL_BATCH:
        prefill = Prefill.FULL if case.counts == "full" else Prefill.ROUTED
        whole = [partial(wiring.routed_linear, x, counts, *w, None, spec, activation, prefill) for w in rotation]
        return whole, whole, f"routed_linear, prefill {prefill}"
    prepare = weights.prepare(x, case, counts=counts)
    ready = prepare()

    def chain(slices: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return wiring.multiply(prepare(), slices, scale, zero, None, spec, activation)

    alone = [partial(wiring.multiply, ready, *w, None, spec, activation) for w in rotation]
    whole = [partial(chain, *w) for w in rotation]
    return alone, whole, "prepare, multiply"


def measure_case(weights: Weights, case: Case, x: Tensor) -> Measured:
    """Check and time one case.

    Raises:
        WrongResult: the multiplication or the whole linear computes something else.
    """
    counts = counts_of(case, x.shape[0], x.device)
    alone, whole, path = calls_of(weights, case, x, counts)
    sample = Sample.of(x.shape[0], weights.n, x.device)
    expected, tolerance = weights.expected(x, counts, sample), TOLERANCES[case.activation]
    error = check(whole[0], expected, sample, tolerance)
    if alone is not whole:
        error = max(error, check(alone[0], expected, sample, tolerance))
    timing = measure(alone, x.device)
    total = timing if alone is whole else measure(whole, x.device)
    return Measured(timing, total, path, error, float(counts.double().mean()))


def measure_prepare(weights: Weights, x: Tensor) -> tuple[Timing, Timing]:
    """Time route and quantize alone, by a data-free router and by a trained one.

    Raises:
        WrongResult: a trained router's thresholds are not followed.
    """
    trained = weights.prepare(x, Case(2), trained=True)
    wrong = int((trained().counts != 2).sum())
    if wrong:
        raise WrongResult(f"{wrong} of {x.shape[0]} tokens have another slice count than the thresholds say")
    return measure([weights.prepare(x, Case(2))] * 16, x.device), measure([trained] * 16, x.device)
