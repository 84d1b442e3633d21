"""Quality against budget: one elastic model at many budgets, beside static methods and the model as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from mobiquant_compiler.baselines.compare import OURS, measure_static
from mobiquant_compiler.budgets import linears_of
from mobiquant_compiler.config import SliceConfig
from mobiquant_compiler.evaluation import evaluate
from mobiquant_compiler.runtime.budget import budget_range
from mobiquant_compiler.runtime.telemetry import routers_of

WORSE_THAN = 1.25  # times the reference perplexity from which on a budget is warned of: a quarter worse
UNQUANTIZED, ALL_SLICES = "unquantized", "all slices"
ELASTIC = "mobiquant"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class QualityRow:
    """Perplexity of one way to run a model.

    Attributes:
        method: "mobiquant", "unquantized", or a static method.
        budget: Wanted average weight bits; None for the unquantized model.
        achieved_bits: What it really was.
        perplexity: Of the next token.
        tokens: How many were scored.
        seconds: Wall clock of the evaluation.
        implementation: Who computed the weights; None for the unquantized model.
        ratio: Perplexity over that of `reference`, None where there is none.
        reference: "unquantized", or "all slices" where no unquantized model was measured.
        followed: Whether thresholds followed what tokens used (`follow_budget`).
    """

    method: str
    budget: float | None
    achieved_bits: float | None
    perplexity: float
    tokens: int
    seconds: float
    implementation: str | None = None
    ratio: float | None = None
    reference: str | None = None
    followed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)


def plain_rows(
    model: nn.Module,
    windows: Tensor,
    methods: Sequence[str] = (),
    bits: Sequence[int] = (),
    *,
    config: SliceConfig | None = None,
    calibration: Tensor | None = None,
    batch: int = 1,
    progress: Progress | None = None,
) -> Iterator[QualityRow]:
    """Yield the unquantized model's row, then one a static method and width; arguments as of `measure_static`."""
    for row in evaluate(model, windows, batch=batch, progress=progress):
        yield QualityRow(UNQUANTIZED, None, None, row.perplexity, row.tokens, row.seconds)
    options = {"config": config, "calibration": calibration, "batch": batch, "progress": progress}
    for static in measure_static(model, windows, methods, bits, **options):
        measured = (static.perplexity, static.tokens, static.seconds)
        yield QualityRow(static.method, float(static.bits), float(static.bits), *measured, static.implementation)


def elastic_rows(
    model: nn.Module,
    windows: Tensor,
    budgets: Sequence[float],
    *,
    batch: int = 1,
    progress: Progress | None = None,
    follow: bool = False,
) -> Iterator[QualityRow]:
    """Yield a row a budget; arguments and errors as of `evaluation.evaluate`."""
    for row in evaluate(model, windows, budgets, batch=batch, progress=progress, follow=follow):
        measured = (row.achieved_bits, row.perplexity, row.tokens, row.seconds)
        yield QualityRow(ELASTIC, row.budget, *measured, OURS, followed=row.followed)


def greatest_budget(model: nn.Module) -> float:
    """Return the budget at which a model uses all the slices that its ceilings allow."""
    return budget_range(routers_of(linears_of(model, "greatest_budget")))[1]


def reference_row(model: nn.Module, windows: Tensor, *, batch: int = 1, progress: Progress | None = None) -> QualityRow:
    """Measure an elastic model with all slices: what stands for the unquantized model where that is not at hand."""
    return next(iter(elastic_rows(model, windows, [greatest_budget(model)], batch=batch, progress=progress)))


def with_ratios(rows: Sequence[QualityRow], reference: QualityRow) -> list[QualityRow]:
    """Return the rows with their perplexity over the reference's."""
    name = UNQUANTIZED if reference.method == UNQUANTIZED else ALL_SLICES
    return [replace(row, ratio=row.perplexity / reference.perplexity, reference=name) for row in rows]


def is_worse(row: QualityRow, worse_than: float = WORSE_THAN) -> bool:
    """Say whether a row of ours is worse than it may be without a warning; a perplexity that is no number is."""
    if row.method != ELASTIC or row.ratio is None or not worse_than:
        return False
    return not (math.isfinite(row.ratio) and row.ratio <= worse_than)


def warning(row: QualityRow, worse_than: float = WORSE_THAN) -> str:
    """Return the line that tells a user how much quality a budget costs."""
    of = "unquantized model" if row.reference == UNQUANTIZED else "model with all slices"
    return (
        f"warning: budget {row.budget:g} makes perplexity {row.ratio:.2f} times that of the {of} ({row.perplexity:.4g} "
        f"on this text; warned of above {worse_than:g} times). Use a higher budget, or calibrate for this one."
    )


def quick_check(
    model: nn.Module,
    windows: Tensor,
    budgets: Sequence[float],
    reference: QualityRow | None = None,
    *,
    progress: Progress | None = None,
) -> list[QualityRow]:
    """Measure budgets on few windows, with ratios.

    Args:
        model: Elastic model.
        windows: Ids [count, length].
        budgets: Average weight bits.
        reference: The unquantized model's row on the same windows; all slices stand in for it by default.
        progress: Called with stage, done, total.
    """
    rows = list(elastic_rows(model, windows, budgets, progress=progress))
    return with_ratios(rows, reference or reference_row(model, windows, progress=progress))
