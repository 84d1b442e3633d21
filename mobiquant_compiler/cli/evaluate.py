"""`mobiquant eval`: perplexity at several budgets, beside static methods and the unquantized model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from mobiquant_compiler.cli.console import (
    Report,
    names,
    note,
    numbers,
    pick_budgets,
    positive,
    progress,
    show,
    whole_numbers,
)
from mobiquant_compiler.cli.loading import MODEL_HELP, Loaded, Slicing, compiled, load, text_windows
from mobiquant_compiler.errors import BadOption

TEXT_HELP = "A file (*.raw WikiText, ptb*.txt, *.jsonl C4, others plain) or 'pydoc'."
AGAINST_HELP = "Static methods to measure in the same run, of rtn,hqq,gptq."
REFERENCE_HELP = "The unquantized model, where MODEL is a checkpoint; for --against and the warnings."
CALIBRATION_HELP = "Text for gptq and for slicing a plain MODEL: a file, 'pydoc-calibration', or 'none'."
FOLLOW_HELP = "Let thresholds follow what tokens use, so that achieved bits meet the budget on any text."
RATIO_HELP = "Warn of budgets whose perplexity is above this many times the unquantized one; 0 never warns."
COLUMNS = {
    "method": "method",
    "budget": "budget",
    "achieved_bits": "achieved bits",
    "perplexity": "perplexity",
    "ratio": "times reference",
    "tokens": "tokens",
    "seconds": "seconds",
    "followed": "followed",
    "implementation": "implementation",
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("eval")(evaluate)


@dataclass(frozen=True)
class Plan:
    """What to measure, as the command line says it.

    Attributes:
        model: Source of the model.
        reference: Source of the unquantized model, None if not given.
        against: Static methods.
        bits: Their widths.
        budgets: Budgets asked for.
        elastic: Whether a plain model is sliced.
        batch: Windows a call.
        compile: Compile the elastic model.
        warn_ratio: See `RATIO_HELP`.
        slicing: How a plain model is sliced.
        follow: See `FOLLOW_HELP`.
    """

    model: str
    reference: str | None
    against: Sequence[str]
    bits: Sequence[int]
    budgets: Sequence[float]
    elastic: bool
    batch: int
    compile: bool
    warn_ratio: float
    slicing: Slicing
    follow: bool = False

    def check(self) -> None:
        """Refuse mistakes before anything is loaded.

        Raises:
            BadOption: names the option.
        """
        from mobiquant_compiler.baselines.compare import check_methods, missing_library

        check_methods(self.against, self.bits, where="--against")
        self.slicing.config()
        positive(self.batch, "--batch")
        positive(self.slicing.windows, "--calibration-windows")
        if self.warn_ratio < 0:
            raise BadOption(where="command line", name="--warn-ratio", got=self.warn_ratio, wanted="0 or more")
        if "gptq" in self.against and self.slicing.calibration == "none":
            raise BadOption(where="command line", name="--calibration", got="none", wanted="a text, for gptq")
        for method in self.against:
            if command := missing_library(method):
                note(f"{method} is measured with our own implementation; for its library: {command}")


def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    text: Annotated[str, typer.Option(help=TEXT_HELP)] = "pydoc",
    budgets: Annotated[
        str | None, typer.Option(help="Bits, as in 8,4.5,3; 8,6,5,4,3 by default where slices are.")
    ] = None,
    against: Annotated[str, typer.Option(help=AGAINST_HELP)] = "",
    against_bits: Annotated[str, typer.Option(help="Widths of the static methods.")] = "2,3,4",
    reference: Annotated[str | None, typer.Option(help=REFERENCE_HELP)] = None,
    windows: Annotated[int, typer.Option(help="Windows from the start of the text.")] = 40,
    length: Annotated[int, typer.Option(help="Tokens a window; all but the first are scored.")] = 512,
    batch: Annotated[int, typer.Option(help="Windows a call.")] = 1,
    calibration: Annotated[str, typer.Option(help=CALIBRATION_HELP)] = "pydoc-calibration",
    calibration_windows: Annotated[int, typer.Option(help="Windows of that text.")] = 16,
    group: Annotated[str, typer.Option(help="auto, 128, 64 or 32 columns a scale, of both.")] = "auto",
    warn_ratio: Annotated[float, typer.Option(help=RATIO_HELP)] = 1.25,
    compile_: Annotated[bool, typer.Option("--compile/--eager", help="Compile with our backend.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help=FOLLOW_HELP)] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as stored by default.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure perplexity: windows that do not overlap, no beginning-of-text token, float32 loss.

    A plain MODEL is measured as it is, then with static methods, then sliced for the budgets, on the same windows.
    """
    wanted = [] if budgets is None else numbers(budgets, "--budgets")
    positive(windows, "--windows")
    positive(length, "--length", 2)
    methods, widths = names(against), whole_numbers(against_bits, "--against-bits")
    slicing = Slicing(calibration, calibration_windows, length, group)
    elastic = bool(wanted or methods or compile_ or follow)
    plan = Plan(model, reference, methods, widths, wanted, elastic, batch, compile_, warn_ratio, slicing, follow)
    plan.check()
    with progress() as report:
        loaded = load(model, device, dtype, report)
        tokens = text_windows(loaded, model, text, windows, length)
        plain = load(reference, str(loaded.device), dtype, report) if reference else None
        rows = measure(plan, loaded, plain, tokens, report)
    listed = [{"model": model, "text": text, **row.to_dict()} for row in rows]
    unasked = {name for name, asked in (("implementation", methods), ("followed", follow)) if not asked}
    columns = {key: name for key, name in COLUMNS.items() if key not in unasked}
    show(listed, columns, as_json=as_json, title=f"{model} on {text}: {windows} windows of {length}")
    warn(rows, warn_ratio)


def measure(plan: Plan, loaded: Loaded, plain: Loaded | None, tokens: Any, report: Report) -> list[Any]:
    """Return the rows: unquantized, static methods, budgets, all with ratios.

    Raises:
        BadOption: static methods, and no plain model to use them on.
        BudgetError: a budget that the model cannot give.
    """
    from mobiquant_compiler.analysis import quality
    from mobiquant_compiler.linear import elastic_linears

    sliced = bool(elastic_linears(loaded.model))
    if sliced:
        pick_budgets(loaded.model, plan.budgets)  # a mistake is found before the long part
    plain = plain or (None if sliced else loaded)
    if plan.against and (plain is None or elastic_linears(plain.model)):
        wanted = "a plain model as MODEL, or as --reference the one that the checkpoint was made from"
        raise BadOption(where="command line", name="--against", got=",".join(plan.against), wanted=wanted)
    rows = []
    if plain is not None:
        calibration = plan.slicing.tokens(plain, plan.reference or plan.model) if "gptq" in plan.against else None
        options = {"config": plan.slicing.config(), "calibration": calibration, "batch": plan.batch}
        rows += quality.plain_rows(plain.model, tokens, plan.against, plan.bits, **options, progress=report)
    if not (sliced or plan.elastic):
        return rows
    plan.slicing.apply(loaded, plan.model, report)
    budgets = pick_budgets(loaded.model, plan.budgets)
    runner = compiled(loaded.model) if plan.compile else loaded.model
    found = list(quality.elastic_rows(runner, tokens, budgets, batch=plan.batch, progress=report, follow=plan.follow))
    reference = rows[0] if rows else _all_slices(plan, loaded.model, runner, found, tokens, report)
    return quality.with_ratios([*rows, *found], reference) if reference else found


def _all_slices(plan: Plan, model: Any, runner: Any, found: list[Any], tokens: Any, report: Report) -> Any:
    """Return the row of the greatest budget, measured if it is not there; None where nobody asks for warnings."""
    from mobiquant_compiler.analysis import quality

    high = quality.greatest_budget(model)
    known = next((row for row in found if row.budget == high), None)
    if known or not plan.warn_ratio:
        return known
    return quality.reference_row(runner, tokens, batch=plan.batch, progress=report)


def warn(rows: Sequence[Any], worse_than: float) -> None:
    """Say on stderr which budgets cost more quality than they may."""
    from mobiquant_compiler.analysis import quality

    for row in rows:
        if quality.is_worse(row, worse_than):
            note(quality.warning(row, worse_than))
