"""`mobiquant analyze`: figures of the paper for any elastic model, each as PNG, CSV and JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mobiquant_compiler.cli.console import (
    Report,
    check_budgets,
    names,
    numbers,
    out,
    pick_budgets,
    positive,
    progress,
    show,
    show_json,
    whole_numbers,
)
from mobiquant_compiler.cli.evaluate import AGAINST_HELP, CALIBRATION_HELP, REFERENCE_HELP, TEXT_HELP, Plan, measure
from mobiquant_compiler.cli.loading import MODEL_HELP, Loaded, Slicing, load, text_windows
from mobiquant_compiler.errors import BadOption, NotADirectory

ANALYSES = ("curve", "migration", "precision", "tokens")
COLUMNS = {"analysis": "analysis", "what": "what", "value": "value"}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(analyze)


@dataclass(frozen=True)
class Job:
    """One run of the command: the model, the text, and where results go."""

    loaded: Loaded
    windows: Any
    title: str
    folder: Path
    png: bool
    report: Report
    facts: dict[str, Any]

    def write(
        self, name: str, rows: Sequence[Any], summary: Any, draw: Callable[..., Path], drawn: Any, title: str = ""
    ) -> dict[str, Any]:
        """Write NAME.csv, NAME.json and, if wanted, NAME.png; return the summary with the files."""
        from mobiquant_compiler.analysis.tables import write_csv, write_json

        files = [write_csv(self.folder / f"{name}.csv", rows)]
        files.append(write_json(self.folder / f"{name}.json", {**self.facts, "analysis": name, "summary": summary}))
        if self.png:
            files.append(draw(drawn, self.folder / f"{name}.png", title or self.title))
        return {"analysis": name, "summary": summary, "files": [str(file) for file in files]}


def analyze(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    output: Annotated[Path, typer.Argument(help="Folder for the results; made if missing, files in it replaced.")],
    what: Annotated[str, typer.Option(help="Of " + ", ".join(ANALYSES) + ".")] = ",".join(ANALYSES),
    text: Annotated[str, typer.Option(help=TEXT_HELP)] = "pydoc",
    windows: Annotated[int, typer.Option(help="Windows from the start of the text; tokens shows the first.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    budgets: Annotated[str | None, typer.Option(help="Of curve and precision; 8,6,5,4,3 by default.")] = None,
    pair: Annotated[str, typer.Option(help="The two budgets of migration.")] = "3,4",
    share: Annotated[float, typer.Option(help="Share of tokens that count as the worst, of migration.")] = 0.1,
    token_budget: Annotated[float, typer.Option(help="Budget of tokens.")] = 4.0,
    against: Annotated[str, typer.Option(help=AGAINST_HELP)] = "",
    against_bits: Annotated[str, typer.Option(help="Widths of the static methods.")] = "2,3,4",
    reference: Annotated[str | None, typer.Option(help=REFERENCE_HELP)] = None,
    calibration: Annotated[str, typer.Option(help=CALIBRATION_HELP)] = "pydoc-calibration",
    calibration_windows: Annotated[int, typer.Option(help="Windows of that text.")] = 16,
    group: Annotated[str, typer.Option(help="auto, 128, 64 or 32 columns a scale, of a plain MODEL.")] = "auto",
    png: Annotated[bool, typer.Option("--png/--no-png", help="Draw figures (needs matplotlib).")] = True,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as stored by default.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Measure what an elastic model does with its bits; docs/analysis.md says how to read each figure."""
    chosen = _check(what, windows, length, png, output)
    wanted = [] if budgets is None else numbers(budgets, "--budgets")
    slicing = Slicing(calibration, calibration_windows, length, group)
    widths = whole_numbers(against_bits, "--against-bits")
    plan = Plan(model, reference, names(against), widths, wanted, True, 1, False, 0.0, slicing)
    plan.check()
    if not 0 < share <= 0.5:
        raise BadOption(where="command line", name="--share", got=share, wanted="above 0, at most 0.5")
    options = {"pair": _pair(pair), "share": share, "token_budget": token_budget}
    with progress() as report:
        loaded = load(model, device, dtype, report)
        tokens = text_windows(loaded, model, text, windows, length)
        facts = {"model": model, "text": text, "windows": windows, "length": length}
        title = f"{Path(model).name}, {windows} windows of {length} tokens of {Path(text).name}"
        output.mkdir(parents=True, exist_ok=True)
        job = Job(loaded, tokens, title, output, png, report, facts)
        found = list(_run(job, plan, chosen, options))
    if as_json:
        show_json({**facts, "analyses": found})
        return
    show(list(_headlines(found)), COLUMNS, as_json=False, title=title)
    out().print("\n".join(file for part in found for file in part["files"]), markup=False, soft_wrap=True)


def _check(what: str, windows: int, length: int, png: bool, output: Path) -> list[str]:
    """Refuse mistakes before anything is loaded; return the analyses in the order they are run."""
    chosen = names(what)
    for name in chosen or [what]:
        if name not in ANALYSES:
            raise BadOption(where="command line", name="--what", got=name, wanted=f"some of {', '.join(ANALYSES)}")
    positive(windows, "--windows")
    positive(length, "--length", 2)
    if output.exists() and not output.is_dir():
        raise NotADirectory(path=output)
    if png:
        from mobiquant_compiler.analysis.figures import need_matplotlib

        need_matplotlib()
    return [name for name in ANALYSES if name in chosen]


def _pair(text: str) -> tuple[float, float]:
    values = numbers(text, "--pair")
    if len(values) != 2 or not values[0] < values[1]:
        wanted = "a lower and a higher budget, as in 3,4"
        raise BadOption(where="command line", name="--pair", got=text, wanted=wanted)
    return values[0], values[1]


def _run(job: Job, plan: Plan, chosen: Sequence[str], options: dict[str, Any]) -> Any:
    """Yield what each analysis found. The curve comes first: it needs the plain weights, and slices them after."""
    from mobiquant_compiler.linear import elastic_linears

    plain = load(plan.reference, str(job.loaded.device), None, job.report) if plan.reference else None
    model = job.loaded.model
    if elastic_linears(model):
        _check_budgets(model, plan, chosen, options)  # before the long part, if that is possible
    if "curve" in chosen:
        yield _curve(job, plan, plain)
    plan.slicing.apply(job.loaded, plan.model, job.report)
    _check_budgets(model, plan, chosen, options)
    if "migration" in chosen:
        yield _migration(job, options["pair"], options["share"])
    if "precision" in chosen:
        yield _precision(job, pick_budgets(model, plan.budgets))
    if "tokens" in chosen:
        yield _tokens(job, plan.model, options["token_budget"])


def _check_budgets(model: Any, plan: Plan, chosen: Sequence[str], options: dict[str, Any]) -> None:
    """Refuse budgets that the model cannot give, by the option they came with."""
    check_budgets(model, plan.budgets)
    if "migration" in chosen:
        check_budgets(model, options["pair"], "--pair")
    if "tokens" in chosen:
        check_budgets(model, [options["token_budget"]], "--token-budget")


def _curve(job: Job, plan: Plan, plain: Loaded | None) -> dict[str, Any]:
    from mobiquant_compiler.analysis.figures import draw_curve

    rows = measure(plan, job.loaded, plain, job.windows, job.report)
    plain_rows = [row.to_dict() for row in rows]
    return job.write("curve", plain_rows, plain_rows, draw_curve, rows)


def _migration(job: Job, pair: tuple[float, float], share: float) -> dict[str, Any]:
    from mobiquant_compiler.analysis import outlier_migration
    from mobiquant_compiler.analysis.figures import draw_migration
    from mobiquant_compiler.analysis.tables import write_csv

    found = outlier_migration(job.loaded.model, job.windows, pair, share=share, progress=job.report)
    result = job.write("migration", found.rows(), found.summary(), draw_migration, found)
    linears = write_csv(job.folder / "migration_linears.csv", found.linear_rows())
    return {**result, "files": [*result["files"], str(linears)]}


def _precision(job: Job, budgets: Sequence[float]) -> dict[str, Any]:
    from mobiquant_compiler.analysis import average_precision
    from mobiquant_compiler.analysis.figures import draw_precision
    from mobiquant_compiler.analysis.precision import by_layer

    rows = average_precision(job.loaded.model, job.windows, budgets, job.report)
    return job.write("precision", [row.to_dict() for row in rows], by_layer(rows), draw_precision, rows)


def _tokens(job: Job, source: str, budget: float) -> dict[str, Any]:
    from mobiquant_compiler.analysis import token_bits
    from mobiquant_compiler.analysis.figures import draw_tokens
    from mobiquant_compiler.analysis.token_page import token_page, token_texts

    found = token_bits(job.loaded.model, job.windows[0], budget, job.report)
    texts = token_texts(job.loaded.need_tokenizer(source), found.ids.tolist())
    title = f"Bits by token: {Path(source).name}, budget {budget:g}"
    result = job.write("tokens", found.rows(texts), found.summary(), draw_tokens, found, title)
    page = job.folder / "tokens.html"
    page.write_text(token_page(found, texts, title), encoding="utf-8")
    return {**result, "files": [*result["files"], str(page)]}


def _headlines(found: Sequence[dict[str, Any]]) -> Any:
    """Yield the few numbers of each analysis that a terminal shows; the rest is in the files."""
    for part in found:
        name, summary = part["analysis"], part["summary"]
        if name == "curve":
            for row in summary:
                at = "" if row["budget"] is None else f" at {row['budget']:g} bits"
                yield {"analysis": name, "what": f"perplexity, {row['method']}{at}", "value": row["perplexity"]}
        elif name == "migration":
            for row in summary:
                how = "with routing" if row["routed"] else "without routing"
                yield {"analysis": name, "what": f"worst tokens that stay, {how}", "value": row["overlap"]}
        elif name == "precision":
            for budget in dict.fromkeys(row["budget"] for row in summary):
                bits = [row["bits"] for row in summary if row["budget"] == budget]
                yield {"analysis": name, "what": f"fewest bits of a layer at {budget:g}", "value": min(bits)}
                yield {"analysis": name, "what": f"most bits of a layer at {budget:g}", "value": max(bits)}
        else:
            for key in ("achieved_bits", "least_bits", "greatest_bits"):
                yield {"analysis": name, "what": key.replace("_", " "), "value": summary[key]}
