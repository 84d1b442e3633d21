"""`mobiquant tune`: from how many tokens on a path pays, measured on the present GPU."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mobiquant_compiler.cli.console import note, progress, show
from mobiquant_compiler.cli.loading import MODEL_HELP, load
from mobiquant_compiler.errors import BadOption

COLUMNS = {
    "n": "output rows",
    "k": "input columns",
    "tokens": "workspace before integers",
    "fused": "fused before integers",
    "routed": "workspace before fused",
    "full": "the same, all slices",
}
Shape = tuple[int, int]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(tune)


def tune(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP + " Its linears are measured.")] = None,
    shapes: Annotated[
        str | None, typer.Option(help="NxK,NxK: rows by columns; those of 7B to 70B models by default.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the table here; calls do not look there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure from how many tokens on which way of multiplying pays; later runs use the table."""
    given = None if shapes is None else parse_shapes(shapes)
    if given is not None and model is not None:
        raise BadOption(where="command line", name="--shapes", got=shapes, wanted="no MODEL beside it")
    from mobiquant_compiler import tuning
    from mobiquant_compiler.codegen.crossover import NEVER

    device, gpu = tuning.find_gpu()
    path = tuning.destination(gpu, output)
    with progress() as report:
        if model is not None:
            given = shapes_of(load(model, "cpu", None, report).model)
        rows = tuning.tune(given or tuning.SHAPES, tuning.device_timer(device), report)
    found = [{name: "never" if value == NEVER else value for name, value in asdict(row).items()} for row in rows]
    show(found, COLUMNS, as_json=as_json, title=f"{gpu}: from how many tokens on")
    tuning.keep(gpu, rows, path)
    note(f"saved {path}")


def parse_shapes(text: str) -> list[Shape]:
    """Read "NxK,NxK", each shape once.

    Raises:
        BadOption: names the option.
    """
    found: list[Shape] = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9][0-9]{0,6})x([1-9][0-9]{0,6})", part.strip())
        if match is None:
            wanted = "output rows by input columns, NxK,NxK, as in 4096x4096,14336x4096"
            raise BadOption(where="command line", name="--shapes", got=text, wanted=wanted)
        found.append((int(match[1]), int(match[2])))
    return list(dict.fromkeys(found))


def shapes_of(model: Any) -> list[Shape]:
    """Return the shapes of a model's elastic linears, those it would have where it is not quantized yet.

    Raises:
        NothingToQuantize: there are none.
    """
    from mobiquant_compiler.config import SliceConfig
    from mobiquant_compiler.errors import NothingToQuantize
    from mobiquant_compiler.linear import elastic_linears
    from mobiquant_compiler.quantize import select, weight_of

    elastic = elastic_linears(model)
    if elastic:
        return list(dict.fromkeys((m.out_features, m.in_features) for m in elastic.values()))
    linears, skipped = select(model, SliceConfig())
    if not linears:
        why = "; ".join(str(skip) for skip in skipped[:3]) or "no nn.Linear or Conv1D in it"
        raise NothingToQuantize(model=type(model).__name__, skipped=why)
    weights = map(weight_of, linears.values())
    return list(dict.fromkeys((weight.shape[0], weight.shape[1]) for weight in weights))
