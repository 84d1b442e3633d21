"""`mobiquant eval`: perplexity at several budgets."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mobiquant_compiler.cli.console import check_budgets, numbers, positive, progress, show
from mobiquant_compiler.cli.loading import MODEL_HELP, compiled, load, text_windows

COLUMNS = {
    "budget": "budget",
    "achieved_bits": "achieved bits",
    "perplexity": "perplexity",
    "tokens": "tokens",
    "seconds": "seconds",
}
DEFAULT_BUDGETS = (8.0, 6.0, 5.0, 4.0, 3.0)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("eval")(evaluate)


def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    text: Annotated[
        str, typer.Option(help="A file (*.raw WikiText, ptb*.txt, *.jsonl C4, others plain) or 'pydoc'.")
    ] = "pydoc",
    budgets: Annotated[
        str | None, typer.Option(help="Bits, as in 8,4.5,3; 8,6,5,4,3 by default where slices are.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows from the start of the text.")] = 40,
    length: Annotated[int, typer.Option(help="Tokens a window; all but the first are scored.")] = 512,
    batch: Annotated[int, typer.Option(help="Windows a call.")] = 1,
    compile_: Annotated[bool, typer.Option("--compile/--eager", help="Compile with our backend.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as stored by default.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure perplexity: windows that do not overlap, no beginning-of-text token, float32 loss."""
    wanted = [] if budgets is None else numbers(budgets, "--budgets")
    for value, option in ((windows, "--windows"), (length, "--length"), (batch, "--batch")):
        positive(value, option)
    from mobiquant_compiler import evaluation

    rows: list[dict[str, Any]] = []
    with progress() as report:
        loaded = load(model, device, dtype, report)
        tokens = text_windows(loaded, model, text, windows, length)
        wanted = _budgets(loaded.model, wanted)
        runner = compiled(loaded.model) if compile_ else loaded.model
        for row in evaluation.evaluate(runner, tokens, wanted, batch=batch, progress=report):
            rows.append({"model": model, "text": text, **row.to_dict()})
    show(rows, COLUMNS, as_json=as_json, title=f"{model} on {text}: {windows} windows of {length}")


def _budgets(model: Any, wanted: list[float]) -> list[float]:
    """Return the budgets to measure: those asked for, the default ones that an elastic model can give, or none."""
    from mobiquant_compiler.linear import elastic_linears

    if wanted:
        check_budgets(model, wanted)
        return wanted
    states = {id(m.router.state): m.router.state for m in elastic_linears(model).values() if m.router.state}.values()
    if not states:
        return []
    low, high = max(s.range[0] for s in states), min(s.range[1] for s in states)
    return [bits for bits in DEFAULT_BUDGETS if low <= bits <= high] or [high]
