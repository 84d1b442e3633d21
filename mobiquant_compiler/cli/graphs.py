"""`mobiquant dump`, `explain` and `passes`: what the compiler does to a model's graphs."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mobiquant_compiler.cli.console import out, positive, progress, show, show_json
from mobiquant_compiler.cli.emit import TARGET_HELP, check_target, kernels_for
from mobiquant_compiler.cli.loading import MODEL_HELP, Loaded, load, trace
from mobiquant_compiler.errors import BadOption, BrokenPass
from mobiquant_compiler.spec import PREFILL_TOKENS

if TYPE_CHECKING:
    from mobiquant_compiler.dump import GraphReport

Passes = Annotated[
    str | None, typer.Option("--passes", "-p", help="Passes to run, as 'a,b{option=1}'; all by default.")
]
Tokens = Annotated[int, typer.Option(help="Tokens of the example input.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as stored by default.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(dump)
    app.command()(explain)
    app.command()(passes)


def dump(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    output: Annotated[Path, typer.Argument(help="New or empty directory.")],
    passes: Passes = None,
    tokens: Tokens = 16,
    dtype: Dtype = None,
    device: Device = "auto",
    target: Annotated[int, typer.Option(help=TARGET_HELP)] = 90,
    as_json: AsJson = False,
) -> None:
    """Write every graph before and after each pass, what changed, the kernels its linears run on CUDA, report.json."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        wanted = "a new or empty directory: stale graphs would mix with new ones"
        raise BadOption(where="dump", name="OUTPUT", got=str(output), wanted=wanted)
    check_target(target)
    loaded, reports = _reports(model, tokens, dtype, device, passes, {"dump": str(output)})
    for report in reports:
        _emit_kernels(loaded.model, report, tokens, target, output / report.graph / "kernels")
    if as_json:
        show_json([report.to_dict() for report in reports])
        return
    for report in reports:
        files = sorted(p.relative_to(output).as_posix() for p in (output / report.graph).rglob("*") if p.is_file())
        out().print(f"{report.graph}: {report.coverage}", markup=False, soft_wrap=True)
        for name in files:
            out().print(f"  {output / name}", markup=False, soft_wrap=True)


def explain(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    passes: Passes = None,
    tokens: Tokens = 16,
    dtype: Dtype = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Say which linears become elastic, which do not and why, and what each pass did. Nothing is compiled."""
    _, reports = _reports(model, tokens, dtype, device, passes, {})
    if as_json:
        show_json([report.to_dict() for report in reports])
        return
    for report in reports:
        out().print(f"{report.graph}: {report.coverage}", markup=False, soft_wrap=True)
        rows = [
            {"name": p.name, "ms": p.ms, "rewritten": p.rewritten, "skipped": len(p.skipped)} for p in report.passes
        ]
        show(rows, {"name": "pass", "ms": "ms", "rewritten": "rewritten", "skipped": "skipped"}, as_json=False)
        skips = [{"name": s.name, "reason": str(s.reason), "detail": s.detail or None} for s in report.coverage.skipped]
        if skips:
            show(skips, {"name": "left alone", "reason": "reason", "detail": "detail"}, as_json=False)
        ops = sorted({*report.nodes_before, *report.nodes_after})
        changed = [(op, report.nodes_before.get(op, 0), report.nodes_after.get(op, 0)) for op in ops]
        counts = [{"op": op, "before": b, "after": a} for op, b, a in changed if b != a]
        show(counts, {"op": "op", "before": "before", "after": "after"}, as_json=False)


def _reports(
    source: str, tokens: int, dtype: str | None, device: str, passes: str | None, options: dict[str, Any]
) -> tuple[Loaded, list[GraphReport]]:
    """Run the pipeline over a model's graphs, Inductor left out; returns what was loaded, and the reports."""
    positive(tokens, "--tokens")
    if passes is not None:
        options["passes"] = _check_passes(passes)
    with progress() as report:
        loaded = load(source, device, dtype, report)
    return loaded, trace(loaded, tokens, options)


def _emit_kernels(model: Any, report: GraphReport, tokens: int, cc: int, directory: Path) -> None:
    """Write the Triton source of every kernel that the elastic linears of a graph run: one token, and `tokens`."""
    from mobiquant_compiler.codegen import cache
    from mobiquant_compiler.launches import launches_of

    launches = launches_of(model, "dump", names=report.coverage.rewritten)
    for spec, _ in kernels_for(launches, cc, (1, tokens), tokens > PREFILL_TOKENS):
        cache.emit(spec, directory)


def _check_passes(text: str) -> tuple[str, ...]:
    """Split and build the passes before a model is loaded, so that a wrong name costs nothing."""
    from mobiquant_compiler.passes.registry import load_pass, split_pipeline

    names = tuple(split_pipeline(text))
    if not names:
        wanted = "names of passes, as 'normalise-linears,bind-slices'; all run without the option"
        raise BadOption(where="--passes", name="passes", got=text, wanted=wanted)
    for name in names:
        load_pass(name)
    return names


def passes(as_json: AsJson = False) -> None:
    """List the passes: those of the default pipeline in order, then plugins."""
    from mobiquant_compiler.passes.registry import DEFAULT_PIPELINE, load_pass, pass_names

    rows: list[dict[str, Any]] = []
    for name in sorted(pass_names(), key=lambda n: DEFAULT_PIPELINE.index(n) if n in DEFAULT_PIPELINE else 1000):
        try:
            graph_pass: Any = load_pass(name)
        except BrokenPass as broken:  # the others are listed all the same
            rows.append({"name": name, "about": str(broken)})
            continue
        options = {field.name: getattr(graph_pass, field.name) for field in dataclasses.fields(graph_pass)}
        rows.append(
            {
                "name": name,
                "step": DEFAULT_PIPELINE.index(name) + 1 if name in DEFAULT_PIPELINE else None,
                "after": ", ".join(sorted(graph_pass.after)) or None,
                "options": ", ".join(f"{key}={value}" for key, value in options.items()) or None,
                "about": (inspect.getdoc(type(graph_pass)) or "").partition("\n")[0],
                "class": f"{type(graph_pass).__module__}:{type(graph_pass).__qualname__}",
            }
        )
    columns = {"name": "pass", "step": "step", "after": "after", "options": "options", "about": "what it does"}
    show(rows, columns, as_json=as_json)
