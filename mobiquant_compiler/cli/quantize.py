"""`mobiquant quantize` and `mobiquant inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mobiquant_compiler.cli.checking import QuickCheck
from mobiquant_compiler.cli.console import note, out, positive, progress, show, show_json, whole_numbers
from mobiquant_compiler.cli.evaluate import RATIO_HELP
from mobiquant_compiler.cli.loading import PLAIN_HELP, Loaded, load, pick_device, spread_text_windows, text_windows
from mobiquant_compiler.errors import BadOption

ROUTER_WINDOWS = 16  # of calibration where slices come from the weights alone
WINDOWS_HELP = (
    "Calibration windows: 16 from the start of the text; with --calibrate 64 spread over it, fewer where it is short."
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(quantize)
    app.command()(inspect)


def quantize(
    model: Annotated[str, typer.Argument(help=PLAIN_HELP)],
    output: Annotated[Path, typer.Argument(help="Directory of the checkpoint: new, empty, or an older checkpoint.")],
    widths: Annotated[str, typer.Option(help="Bits of each slice, the base first.")] = "2,2,2,2",
    group: Annotated[str, typer.Option(help="auto, 128, 64 or 32 columns a scale.")] = "auto",
    layout: Annotated[str, typer.Option(help="slice_major or bit_major.")] = "slice_major",
    scope: Annotated[str, typer.Option(help="A router per distinct 'input' or per 'linear'.")] = "input",
    include: Annotated[list[str] | None, typer.Option(help="Name pattern of linears to quantize; repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Name pattern of linears left alone; repeatable.")] = None,
    floor: Annotated[list[str] | None, typer.Option(help="PATTERN=COUNT, least slices; repeatable.")] = None,
    ceiling: Annotated[list[str] | None, typer.Option(help="PATTERN=COUNT, most slices; repeatable.")] = None,
    calibration: Annotated[
        str, typer.Option(help="Text for the router: a file, 'pydoc-calibration' (ships with Python), or 'none'.")
    ] = "pydoc-calibration",
    windows: Annotated[int | None, typer.Option(help=WINDOWS_HELP)] = None,
    length: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Choose the slices on the calibration text too, block by block.")
    ] = False,
    steps: Annotated[int, typer.Option(help="With --calibrate: gradient steps on scales and zero points.")] = 160,
    state: Annotated[
        Path | None, typer.Option(help="With --calibrate: directory to keep finished steps in and go on from.")
    ] = None,
    router: Annotated[str, typer.Option(help="With --calibrate: 'energy', or 'mlp', trained networks.")] = "energy",
    offload: Annotated[bool, typer.Option("--offload", help="With --calibrate: blocks on --device in turn.")] = False,
    seed: Annotated[int, typer.Option(help="With --calibrate: of everything that is drawn.")] = 0,
    budget: Annotated[float | None, typer.Option(help="Bits to start with; all slices by default.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as stored by default.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    strict: Annotated[bool, typer.Option(help="Make a layer that is left alone an error.")] = False,
    check_windows: Annotated[
        int, typer.Option(help="Windows of Python's own documentation on which budgets are checked; 0 for no check.")
    ] = 2,
    warn_ratio: Annotated[float, typer.Option(help=RATIO_HELP)] = 1.25,
    as_json: Annotated[bool, typer.Option("--json", help="Print the coverage as JSON.")] = False,
) -> None:
    """Turn a model's linear layers into slices, check what budgets cost, and save the checkpoint."""
    QuickCheck.refuse(check_windows, warn_ratio)
    positive(length, "--length", 2)
    windows = _window_count(windows, calibrate)
    config = _config(widths, group, layout, scope, include, exclude, floor, ceiling)
    how = _calibration_config(calibrate, calibration, steps, state, router, seed, offload)
    _refuse(output, budget, config.widths)
    from mobiquant_compiler.checkpoint import save

    calibrating = {"state": state, "device": pick_device(device) if offload else None}
    with progress() as report:
        loaded = load(model, "cpu" if offload else device, dtype, report)
        _refuse_linears(loaded, model, config, strict)
        tokens = _calibration(loaded, model, calibration, windows, length, spread=calibrate)
        check = QuickCheck(loaded, model, check_windows, length, warn_ratio, report)
        shared: dict[str, Any] = {"budget": budget, "strict": strict, "progress": report}
        coverage = _slice(loaded.model, tokens, config, how, calibrating, shared)
        checked = check.run(budget)
    where = save(loaded.model, output, tokenizer=loaded.tokenizer)
    if as_json:
        show_json({"checkpoint": str(where), **coverage.to_dict(), "check": checked})
        return
    note(str(coverage))
    out().print(f"saved {where}", markup=False, soft_wrap=True)


def _refuse(output: Path, budget: float | None, widths: Sequence[int]) -> None:
    """Refuse a place that is taken, and a budget that no floors and ceilings allow, before anything is loaded."""
    from mobiquant_compiler.checkpoint.save import free_place

    free_place(output)
    low, high = widths[0], sum(widths)
    if budget is not None and not low <= budget <= high:
        wanted = f"{low} to {high} bits, those of the first slice and of all"
        raise BadOption(where="command line", name="--budget", got=budget, wanted=wanted)


def _refuse_linears(loaded: Loaded, source: str, config: Any, strict: bool) -> None:
    """Refuse what this model's linears do not allow before anything is measured, which takes far longer."""
    from mobiquant_compiler.quantize import check, select

    loaded.need_plain(source)
    linears, skipped = select(loaded.model, config)
    check(loaded.model, linears, skipped, config, strict)


def _slice(
    model: Any, tokens: Any, config: Any, how: Any, calibrating: Mapping[str, Any], shared: Mapping[str, Any]
) -> Any:
    """Make a model's linears elastic, on tokens where there is a CalibrationConfig; returns the coverage."""
    import mobiquant_compiler as mq

    if how is None:
        return mq.quantize_(model, config, calibration=tokens, **shared)
    return mq.calibrate_(model, tokens, how, slices=config, **calibrating, **shared)


def _window_count(windows: int | None, spread: bool) -> int:
    """Return how many windows are wanted, before anything is loaded."""
    from mobiquant_compiler.evaluation import CALIBRATION_WINDOWS

    if windows is None:
        return CALIBRATION_WINDOWS if spread else ROUTER_WINDOWS
    return positive(windows, "--windows")


def _calibration(loaded: Loaded, source: str, text: str, windows: int, length: int, *, spread: bool) -> Any:
    """Return the ids that are calibrated on, None without a text."""
    if text == "none":
        return None
    return (spread_text_windows if spread else text_windows)(loaded, source, text, windows, length)


def _calibration_config(
    calibrate: bool, text: str, steps: int, state: Path | None, router: str, seed: int, offload: bool
) -> Any:
    """Build the CalibrationConfig, None without --calibrate; before anything is loaded."""
    from mobiquant_compiler.calibration import CalibrationConfig

    if not calibrate:
        usual = CalibrationConfig()
        given: list[tuple[str, Any, Any]] = [
            ("--state", state, None),
            ("--offload", offload, False),
            ("--steps", steps, usual.tune_steps),
            ("--router", router, usual.router),
            ("--seed", seed, usual.seed),
        ]
        for name, value, default in given:
            if value != default:
                raise BadOption(where="command line", name=name, got=str(value), wanted="--calibrate with it")
        return None
    if text == "none":
        raise BadOption(where="command line", name="--calibration", got=text, wanted="a text, with --calibrate")
    return CalibrationConfig(tune_steps=steps, router=router, seed=seed)


def _config(
    widths: str,
    group: str,
    layout: str,
    scope: str,
    include: list[str] | None,
    exclude: list[str] | None,
    floor: list[str] | None,
    ceiling: list[str] | None,
) -> Any:
    """Build the SliceConfig, before anything is loaded: mistakes cost nothing."""
    from mobiquant_compiler.config import SliceConfig

    values: dict[str, Any] = {
        "layout": layout,
        "scope": scope,
        "group": _group(group),
        "widths": whole_numbers(widths, "--widths"),
    }
    if include:
        values["include"] = tuple(include)
    if exclude:
        values["exclude"] = tuple(exclude)
    return SliceConfig(**values, floor=_counts(floor, "--floor"), ceiling=_counts(ceiling, "--ceiling"))


def _group(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _counts(entries: list[str] | None, option: str) -> dict[str, int]:
    counts = {}
    for entry in entries or []:
        pattern, equals, count = entry.rpartition("=")
        if not equals or not count.isdigit():
            wanted = "PATTERN=COUNT, as in '*.down_proj=2'"
            raise BadOption(where="command line", name=option, got=entry, wanted=wanted)
        counts[pattern] = int(count)
    return counts


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="A mobiquant checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a checkpoint holds: layers, slices, bytes, routers, budgets. Reads no weights but scales."""
    from mobiquant_compiler.checkpoint.summary import summarize

    summary = summarize(checkpoint)
    if as_json:
        show_json(summary)
        return
    columns = {
        "name": "linear",
        "shape": "N x K",
        "widths": "slices",
        "group": "group",
        "layout": "layout",
        "bytes": "bytes",
        "scale": "scale range",
        "router": "router",
        "counts": "slices used",
    }
    show(summary["linears"], columns, as_json=False, title=str(checkpoint))
    totals = summary["totals"]
    budgets = "; ".join(
        f"budget {s['budget']:g} of {s['low']:g} to {s['high']:g} bits ({s['table']} table, {s['routers']} routers)"
        for s in summary["states"]
    )
    text = (
        f"{totals['linears']} linears, {totals['parameters'] / 1e6:.1f} M weights in {totals['bytes'] / 1e6:.1f} MB "
        f"({totals['bits_per_weight']:.2f} bits each with scales); other tensors {totals['other_bytes'] / 1e6:.1f} MB\n"
        f"format {summary['format_version']}; {budgets}"
    )
    out().print(text, markup=False, soft_wrap=True)
