"""Outlier migration: do the tokens that suffer most at one precision suffer most at another?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mobiquant_compiler.analysis.watch import Call, watch_linears
from mobiquant_compiler.budgets import budget, linears_of
from mobiquant_compiler.errors import BadOption, EmptyBatch
from mobiquant_compiler.evaluation import logits_of
from mobiquant_compiler.linear import MobiLinear
from mobiquant_compiler.runtime.budget import StaticTable, budget_range
from mobiquant_compiler.runtime.telemetry import routers_of

SHARE = 0.1  # of all tokens that count as the worst
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TokenErrors:
    """Errors of every token at one budget, with or without routing.

    Attributes:
        budget: Wanted average weight bits.
        routed: Whether tokens choose their slice counts; if not, all tokens of a linear use one.
        achieved_bits: What it really was.
        tokens: Error of each token at the model's output, float64 [T].
        linears: Error of each token at the output of each linear, float64 [T] by name.
    """

    budget: float
    routed: bool
    achieved_bits: float
    tokens: Tensor
    linears: Mapping[str, Tensor]


@dataclass(frozen=True)
class Migration:
    """Errors at two budgets, with and without routing.

    Attributes:
        share: Share of tokens that count as the worst.
        low: Lower budget: without routing, then with it.
        high: Higher budget, likewise.
    """

    share: float
    low: tuple[TokenErrors, TokenErrors]
    high: tuple[TokenErrors, TokenErrors]

    def summary(self) -> list[dict[str, Any]]:
        """Return one row without routing and one with it, for JSON.

        Keys: ``overlap``, the share of the worst tokens that both budgets have in common (1 - overlap migrated;
        tokens taken at random would share `share`); ``rank_correlation`` of all tokens' errors; ``worst_share``, the
        part of the whole error at the higher budget that its worst tokens bear; ``migrated_share``, the part of it
        that tokens bear which were not among the worst at the lower one; ``linear_overlap``, the mean of the same
        overlap at the output of each linear; and the mean error at either budget.

        Sets of worst tokens are as large with routing as without, however small the errors in them. So there is a
        measure with one scale for both: ``migrated_tokens``, the share of all tokens that are outliers at one of the
        two budgets only, where an outlier errs by more than all but `share` of the tokens do without routing at that
        budget; and ``outlier_tokens``, the share of tokens that are outliers at either.
        """
        limits = tuple(least_of_worst(errors[0].tokens, self.share) for errors in (self.low, self.high))
        return [self._row(low, high, limits) for low, high in zip(self.low, self.high, strict=True)]

    def _row(self, low: TokenErrors, high: TokenErrors, limits: tuple[float, ...]) -> dict[str, Any]:
        outliers = [errors.tokens >= limit for errors, limit in zip((low, high), limits, strict=True)]
        before, after = worst(low.tokens, self.share), worst(high.tokens, self.share)
        new = after & ~before
        whole = float(high.tokens.sum()) or 1.0
        overlaps = [overlap(low.linears[name], high.linears[name], self.share) for name in low.linears]
        overlaps = [value for value in overlaps if not math.isnan(value)] or [math.nan]
        return {
            "routed": low.routed,
            "low_budget": low.budget,
            "high_budget": high.budget,
            "low_achieved_bits": low.achieved_bits,
            "high_achieved_bits": high.achieved_bits,
            "overlap": overlap(low.tokens, high.tokens, self.share),
            "rank_correlation": rank_correlation(low.tokens, high.tokens),
            "worst_share": float(high.tokens[after].sum()) / whole,
            "migrated_share": float(high.tokens[new].sum()) / whole,
            "migrated_tokens": float((outliers[0] ^ outliers[1]).double().mean()),
            "outlier_tokens": float((outliers[0] | outliers[1]).double().mean()),
            "linear_overlap": sum(overlaps) / len(overlaps),
            "low_mean_error": float(low.tokens.mean()),
            "high_mean_error": float(high.tokens.mean()),
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return the errors of every token, for CSV: four columns, and whether the token is among the worst."""
        columns: dict[str, list[Any]] = {}
        for errors in (*self.low, *self.high):
            key = f"{'routed' if errors.routed else 'fixed'}_{errors.budget:g}"
            columns[f"{key}_error"] = errors.tokens.tolist()
            columns[f"{key}_worst"] = worst(errors.tokens, self.share).int().tolist()
        count = len(self.low[0].tokens)
        return [{"token": i, **{name: values[i] for name, values in columns.items()}} for i in range(count)]

    def linear_rows(self) -> list[dict[str, Any]]:
        """Return the overlap at the output of every linear without routing and with it, for CSV."""
        found = []
        for name in self.low[0].linears:
            pairs = zip(("fixed_overlap", "routed_overlap"), self.low, self.high, strict=True)
            overlaps = {key: overlap(a.linears[name], b.linears[name], self.share) for key, a, b in pairs}
            found.append({"linear": name, **overlaps})
        return found


def worst(errors: Tensor, share: float) -> Tensor:
    """Return which tokens [T] have the greatest errors, bool [T]: `share` of them, at least one, none without error."""
    chosen = torch.zeros(len(errors), dtype=torch.bool)
    chosen[errors.topk(max(1, round(share * len(errors)))).indices] = True
    return chosen & (errors > 0)


def least_of_worst(errors: Tensor, share: float) -> float:
    """Return the least error [T] among the worst tokens, infinity where nothing errs."""
    found = errors[worst(errors, share)]
    return float(found.min()) if len(found) else math.inf


def overlap(first: Tensor, second: Tensor, share: float = SHARE) -> float:
    """Return the share of the worst tokens that two lists of errors [T] have in common; NaN where nothing errs."""
    a, b = worst(first, share), worst(second, share)
    most = max(int(a.sum()), int(b.sum()))
    return int((a & b).sum()) / most if most else math.nan


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Return Spearman's correlation of two lists of errors [T]; NaN for fewer than two tokens."""
    ranks = torch.stack([first.argsort().argsort(), second.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def outlier_migration(
    model: nn.Module,
    windows: Tensor,
    budgets: tuple[float, float] = (3.0, 4.0),
    *,
    share: float = SHARE,
    progress: Progress | None = None,
) -> Migration:
    """Measure every token's quantization error at two budgets, with and without routing.

    What is measured. The reference is the same model with all slices. The error of a token at a budget is how far the
    model's next-token distribution after it moves: ``KL(p_all || p_budget)`` in nats, the whole model running at that
    budget. *Worst* tokens are the `share` with the greatest errors; they *migrate* where the sets at the two budgets
    differ. *With routing* the model runs as it does under `set_budget`. *Without*, it takes as many bits as that,
    by one slice count a linear for all tokens (`StaticTable`): at 4 bits two slices everywhere, at 3 two in some.

    Besides, the relative squared error ``|y_k - y|^2 / |y|^2`` of each token at the output of each linear, on the
    inputs that the linear has in the reference run; there, what routing does to the layers before plays no part.

    Args:
        model: Elastic model; what of it is compiled runs eagerly.
        windows: Ids [count, length].
        budgets: The lower and the higher budget.
        share: See above.
        progress: Called with stage, done, total.

    Raises:
        NotElastic: the model has no elastic linear.
        BadOption: budgets that do not rise, or a share outside (0, 0.5].
        BudgetOutOfRange: a budget that the model cannot give.
        EmptyBatch: no tokens.

    Source: MoBiQuant, arXiv 2602.20191, which calls it "a precision-dependent outlier migration phenomenon where the
    distribution of PTQ-sensitive tokens changes across precisions"; the error, the share of worst tokens, and the way
    to run without routing are our reading of it.
    """
    low, high = budgets
    if not low < high:
        raise BadOption(where="outlier migration", name="budgets", got=budgets, wanted="a lower and a higher one")
    if not 0 < share <= 0.5:
        raise BadOption(where="outlier migration", name="share", got=share, wanted="above 0, at most 0.5")
    if windows.dim() != 2 or windows.numel() == 0:
        raise EmptyBatch(where="outlier migration", got=tuple(windows.shape))
    report = progress or (lambda stage, done, total: None)
    least, greatest = budget_range(routers_of(linears_of(model, "outlier migration")))
    if high >= greatest:
        wanted = f"budgets below {greatest:g}, where all slices are used and no token errs"
        raise BadOption(where="outlier migration", name="budgets", got=budgets, wanted=wanted)
    routed = [_Setting(model, bits) for bits in budgets]
    done = itertools.count(1)

    def step() -> None:
        report("outlier migration", next(done), 2 * len(windows))

    _measure_all(model, windows, routed, step)
    used = [min(max(setting.bits_used, least), greatest) for setting in routed]
    fixed = [_Setting(model, bits, fixed_at=at) for bits, at in zip(budgets, used, strict=True)]
    _measure_all(model, windows, fixed, step)
    low, high = (tuple(s.result() for s in pair) for pair in zip(fixed, routed, strict=True))
    return Migration(share, low, high)  # type: ignore[arg-type]  # two of each


def _measure_all(model: nn.Module, windows: Tensor, settings: Sequence[_Setting], step: Callable[[], None]) -> None:
    """Measure settings on all windows; `step` is called after each."""
    device = next(model.parameters()).device
    with torch.no_grad():
        for window in windows:
            ids = window.unsqueeze(0).to(device)
            expected = _reference(model, ids, settings)
            for setting in settings:
                setting.measure(ids, expected)
            step()


def fixed_counts(model: nn.Module, bits: float) -> dict[str, int]:
    """Return the slice count of each linear, one for all its tokens, that meets a budget without a router.

    Raises:
        NotElastic: the model has no elastic linear.
    """
    linears = linears_of(model, "fixed_counts")
    routers = routers_of(linears)
    used = StaticTable().thresholds(routers, bits) == -torch.inf
    counts = {id(router): 1 + int(row.cumprod(0).sum()) for router, row in zip(routers, used.int(), strict=True)}
    return {name: counts[id(linear.router)] for name, linear in linears.items()}


@dataclass
class _Setting:
    """One budget, with or without routing, and the errors found so far.

    Attributes:
        bits: Budget.
        fixed_at: Bits that one count a linear is chosen for; tokens are routed without.
    """

    model: nn.Module
    bits: float
    fixed_at: float | None = None
    outputs: list[Tensor] = field(default_factory=list)
    linears: dict[str, list[Tensor]] = field(default_factory=dict)
    used: float = 0.0  # bits, over all calls, each weighted by the linear's parameters
    weight: float = 0.0

    def __post_init__(self) -> None:
        members = linears_of(self.model, "outlier migration")
        with budget(self.model, self.bits):  # also refuses budgets that cannot be
            self.thresholds = {name: m.router.thresholds.clone() for name, m in members.items()}
        self.fixed = None if self.fixed_at is None else fixed_counts(self.model, self.fixed_at)

    def counts(self, call: Call) -> Tensor | int:
        """Return the counts that a linear uses here, on whatever input it has."""
        return call.route(self.thresholds[call.name]) if self.fixed is None else self.fixed[call.name]

    def compare(self, call: Call, expected: Tensor) -> None:
        """Note the errors of one linear on the reference run's input."""
        errors = (call.multiply(self.counts(call)) - expected).double().square().sum(-1)
        size = expected.double().square().sum(-1).clamp_min(1e-30)
        self.linears.setdefault(call.name, []).append((errors / size).flatten().cpu())

    def measure(self, ids: Tensor, expected: Tensor) -> None:
        """Run the model at this budget; note the divergence of each token's prediction from `expected`."""

        def observe(call: Call) -> Tensor:
            counts = self.counts(call)
            self._note_bits(call.linear, counts)
            return call.multiply(counts)

        with watch_linears(self.model, observe):
            found = _log_shares(self.model, ids)
        divergence = (expected.exp() * (expected - found)).sum(-1)
        self.outputs.append(divergence.clamp_min(0).double().cpu())

    def _note_bits(self, linear: MobiLinear, counts: Tensor | int) -> None:
        by_count = linear.router.bits_by_count()
        bits = by_count[counts - 1] if isinstance(counts, int) else by_count[counts.cpu().long() - 1].mean()
        parameters = linear.in_features * linear.out_features
        self.used += parameters * float(bits)
        self.weight += parameters

    @property
    def bits_used(self) -> float:
        """Average weight bits over all calls."""
        return self.used / self.weight

    def result(self) -> TokenErrors:
        """Return everything noted."""
        linears = {name: torch.cat(parts) for name, parts in self.linears.items()}
        return TokenErrors(self.bits, self.fixed is None, self.bits_used, torch.cat(self.outputs), linears)


def _reference(model: nn.Module, ids: Tensor, settings: Sequence[_Setting]) -> Tensor:
    """Run the model with all slices, each linear compared on the way; returns log probabilities [S, V]."""

    def observe(call: Call) -> Tensor:
        y = call.multiply(call.linear.spec.num_slices)
        for setting in settings:
            setting.compare(call, y)
        return y

    with watch_linears(model, observe):
        return _log_shares(model, ids)


def _log_shares(model: nn.Module, ids: Tensor) -> Tensor:
    return torch.log_softmax(logits_of(model, ids)[0].float(), -1)
