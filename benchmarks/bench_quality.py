"""Perplexity of one packed model at a list of budgets, by how its slices and routers were made.

    python benchmarks/bench_quality.py --data DIR                              # data-free: quality_datafree.json
    python benchmarks/bench_quality.py --data DIR --calibrate --state STATE    # calibrated, with all else: quality.json

DIR holds ``wikitext2/``, ``ptb/`` and ``c4/``. Data-free slices come from the weights alone; the calibration text
(WikiText-2's train head) serves the router. With --calibrate the slices are chosen on it too (`calibrate_`), once; all
routers of the ablation then work on the same slices, so their rows differ in routing alone. STATE keeps what is done.
Round to nearest, HQQ and GPTQ are measured beside them, each tuned for one width (`mobiquant_compiler.baselines`).
With --follow thresholds follow what tokens use (`follow_budget`), text by text and budget by budget; rows say so.
With --jobs N the slices are calibrated first, then N methods are measured at a time: one of them leaves most of a GPU,
and most of its time, to others.
The unquantized model is measured in the same run. SmolLM2 here is the dequantized Q4_1 model, not the original bf16
one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import quality_jobs
import record
import result_files
import torch
from safetensors.torch import load_file

import mobiquant_compiler as mq
from mobiquant_compiler.backend import REPORTS
from mobiquant_compiler.baselines.compare import check_methods, implementation_of, static_weights
from mobiquant_compiler.calibration.allocation import Costs, allocate
from mobiquant_compiler.evaluation import (
    CALIBRATION_WINDOWS,
    LENGTH,
    evaluate,
    load_text,
    make_windows,
    perplexity,
    spread_windows,
)
from mobiquant_compiler.linear import elastic_linears
from mobiquant_compiler.models import load_model

TEXTS = {
    "wikitext2": "wikitext2/wiki.test.raw",
    "ptb": "ptb/ptb.test.txt",
    "c4": "c4/c4_validation.head.jsonl",
}
CALIBRATION = {"wikitext2": "wikitext2/wiki.train.head.txt", "c4": "c4/c4_calibration.jsonl"}
BUDGETS = (8.0, 7.0, 6.0, 5.5, 5.0, 4.5, 4.0, 3.5, 3.0)
DATA_FREE = "mobiquant data-free slices, energy router"
METHODS = {  # of calibrated slices: kind of router and scope
    "trained-input": ("mlp", "input"),
    "energy-input": ("energy", "input"),
    "trained-linear": ("mlp", "linear"),
    "energy-linear": ("energy", "linear"),
    "static": (None, "linear"),
    "uniform": (None, "linear"),
}
STATIC = {"rtn": "round to nearest", "hqq": "HQQ", "gptq": "GPTQ"}
NAMES = {
    "trained-input": "calibrated slices, trained router per input",
    "energy-input": "calibrated slices, energy router per input",
    "trained-linear": "calibrated slices, trained router per linear",
    "energy-linear": "calibrated slices, energy router per linear",
    "static": "calibrated slices, best static count per linear",
    "uniform": "calibrated slices, one count for all",
    **STATIC,
}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--texts", nargs="+", default=["wikitext2"], choices=TEXTS)
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--fine-budgets", nargs="+", type=float, default=(), help="more, for trained-input alone")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--calibration-windows", type=int, help=f"8, or {CALIBRATION_WINDOWS} with --calibrate")
    parser.add_argument("--group", default="64")
    parser.add_argument("--scope", default="input", choices=("input", "linear"), help="without --calibrate")
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--calibration-text", default="wikitext2", choices=CALIBRATION)
    parser.add_argument("--methods", nargs="+", default=list(NAMES), choices=NAMES, help="with --calibrate")
    parser.add_argument("--static-bits", nargs="+", type=int, default=(2, 3, 4), help="widths of static methods")
    parser.add_argument("--unquantized", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--jobs", type=int, default=1, help="methods measured at a time, with --calibrate")
    parser.add_argument("--steps", type=int, default=mq.CalibrationConfig().tune_steps)
    parser.add_argument("--state", type=Path, help="directory of the calibration's finished steps")
    parser.add_argument("--follow", action="store_true", help="thresholds follow telemetry, where there is a router")
    parser.add_argument("--eager", action="store_true", help="without our backend")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep", action="store_true", help="keep rows that --out holds of methods not measured now")
    parser.add_argument("--out", type=result_files.output, metavar="FILE")
    args = parser.parse_args()
    if args.calibrate and args.state is None:
        parser.error("--calibrate needs --state")
    if args.jobs > 1 and not args.calibrate:
        parser.error("--jobs needs --calibrate: data-free slices are one method")
    check_methods([method for method in args.methods if method in STATIC], args.static_bits)
    return args


def row_of(
    name: str, text: str, method: str, budget: float | None, bits: float | None, value: float, **more: Any
) -> dict[str, Any]:
    """Return one row of the result, and say it."""
    print(f"{text}, {method}: {value:.3f}" + ("" if bits is None else f" at {bits:.3f} of {budget:g} bits"), flush=True)
    return {
        "model": name,
        "text": text,
        "method": method,
        "budget": budget,
        "achieved_bits": bits,
        "perplexity": value,
        **more,
    }


def routed_rows(
    model: Any, windows: dict[str, torch.Tensor], name: str, method: str, budgets: Sequence[float], follow: bool
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a routed model on every text."""
    for text, ids in windows.items():
        for row in evaluate(model, ids, budgets, batch=4, follow=follow):
            yield row_of(name, text, method, row.budget, row.achieved_bits, row.perplexity, followed=row.followed)


def static_rows(
    model: Any, windows: dict[str, torch.Tensor], name: str, method: str, budgets: Sequence[float], costs: Costs | None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of fixed counts: allocated per linear by `costs`, or one for all where the budget is a count's."""
    linears = elastic_linears(model)
    params = torch.tensor([float(m.in_features * m.out_features) for m in linears.values()]).double()
    bits = next(iter(linears.values())).router.bits_by_count()
    for budget in budgets:
        if costs is None and budget not in bits.tolist():
            continue
        one = int((bits == budget).nonzero()[0]) + 1 if costs is None else 0
        counts = allocate(costs, budget) if costs is not None else torch.full((len(linears),), one)
        for linear, count in zip(linears.values(), counts.tolist(), strict=True):
            linear.router.thresholds.fill_(-torch.inf)[count - 1 :] = torch.inf
        achieved = float((bits[counts - 1] * params).sum() / params.sum())
        for text, ids in windows.items():
            value = perplexity(model, ids, batch=4)
            yield row_of(name, text, method, budget, achieved, value, followed=False)


def costs_of(state: Path, model: Any) -> Costs:
    """Return what each linear's slices are worth, as the calibration kept it."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(state.glob("block-*.safetensors")):
        found |= {key: value for key, value in load_file(path).items() if key.endswith(".losses")}
    linears = elastic_linears(model)
    losses = torch.stack([found[f"{name}.losses"] for name in linears])
    params = torch.tensor([float(m.in_features * m.out_features) for m in linears.values()]).double()
    return Costs([[name] for name in linears], losses, params, next(iter(linears.values())).router.bits_by_count())


def fresh(args: argparse.Namespace) -> tuple[Any, torch.Tensor]:
    """Return the unquantized model, and the ids that calibration uses."""
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    text = args.data / CALIBRATION[args.calibration_text]
    tokens = spread_windows(tokenizer, load_text(text), args.calibration_windows, where=str(text))
    if len(tokens) < args.calibration_windows:  # the result file says how many
        sys.exit(f"{text} holds {len(tokens)} windows of {LENGTH}; give --calibration-windows {len(tokens)} or fewer")
    return model.to(args.device).eval(), tokens


def calibrated(args: argparse.Namespace, method: str, notes: dict[str, Any]) -> Any:
    """Return a calibrated model; `notes` gets how it was made and how long that took."""
    kind, scope = METHODS[method]
    model, tokens = fresh(args)
    config = mq.CalibrationConfig(tune_steps=args.steps, router=kind or "energy")
    slices = mq.SliceConfig(group=group_of(args), scope=scope)
    steps_before = sorted(path.name for path in args.state.glob("*.safetensors"))
    start = time.perf_counter()
    mq.calibrate_(model, tokens, config, slices=slices, state=args.state, progress=say)
    notes.setdefault("made", {})[NAMES[method]] = {
        "slices": slices.to_dict(),
        "calibration": config.to_dict(),
        "seconds": round(time.perf_counter() - start, 1),
        "steps_that_the_state_held": len(steps_before),
    }
    return model


def static_method_rows(
    args: argparse.Namespace, windows: dict[str, torch.Tensor], method: str, notes: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a method that makes one model a width."""
    model, tokens = fresh(args)
    made = notes.setdefault("made", {}).setdefault(NAMES[method], {"implementation": implementation_of(method)})
    config = mq.SliceConfig(group=group_of(args))  # which linears, and their groups
    for bits in args.static_bits:
        start = time.perf_counter()
        with static_weights(model, method, bits, config=config, calibration=tokens):
            made[f"seconds_at_{bits}_bits"] = round(time.perf_counter() - start, 1)
            for text, ids in windows.items():
                yield row_of(args.model, text, NAMES[method], bits, bits, perplexity(model, ids, batch=4))


def calibrated_rows(args: argparse.Namespace, windows: dict[str, torch.Tensor], notes: dict[str, Any]) -> Iterator[Any]:
    """Yield the rows of every method; all but the static ones have the same calibrated slices."""
    for method in args.methods:
        if method in STATIC:
            yield from static_method_rows(args, windows, method, notes)
            continue
        model, (kind, _) = calibrated(args, method, notes), METHODS[method]
        runner = model if args.eager else torch.compile(model, backend="mobiquant")
        if kind is None:
            costs = costs_of(args.state, model) if method == "static" else None
            yield from static_rows(runner, windows, args.model, NAMES[method], args.budgets, costs)
        else:
            fine = args.fine_budgets if method == "trained-input" else ()
            budgets = (*args.budgets, *fine)
            yield from routed_rows(runner, windows, args.model, NAMES[method], budgets, args.follow)


def data_free_rows(args: argparse.Namespace, windows: dict[str, torch.Tensor], notes: dict[str, Any]) -> Iterator[Any]:
    """Yield the rows of data-free slices."""
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    model.to(args.device).eval()
    start = time.perf_counter()
    tokens = make_windows(tokenizer, load_text(args.data / CALIBRATION["wikitext2"]), args.calibration_windows)
    config = mq.SliceConfig(group=group_of(args), scope=args.scope)
    print(mq.quantize_(model, config, calibration=tokens), flush=True)
    notes |= {"config": config.to_dict(), "quantize_seconds": round(time.perf_counter() - start, 1)}
    runner = model if args.eager else torch.compile(model, backend="mobiquant")
    yield from routed_rows(runner, windows, args.model, DATA_FREE, args.budgets, args.follow)


def group_of(args: argparse.Namespace) -> int | str:
    """Return the group size asked for."""
    return args.group if args.group == "auto" else int(args.group)


def say(stage: str, done: int, total: int) -> None:
    """Report progress in tenths."""
    if done == total or done % max(1, total // 10) == 0:
        print(f"{stage} {done}/{total}", flush=True)


def kept(out: Path, args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows of an earlier run that are of no method of this one, and how their models were made."""
    if not out.exists():
        return [], {}
    found = json.loads(out.read_text(encoding="utf-8"))
    mine = {*(["unquantized"] if args.unquantized else []), *(NAMES[method] for method in args.methods)}
    made = {name: how for name, how in found.get("made", {}).items() if name not in mine}
    return [row for row in found["rows"] if row["method"] not in mine], made


def protocol(args: argparse.Namespace) -> dict[str, Any]:
    """Return what a result file says of all its rows."""
    spread = ", spread evenly" if args.calibrate else ""
    return {
        "protocol": f"{args.windows} windows of {LENGTH} tokens, {LENGTH - 1} scored, no BOS, fp32",
        "reference": "the dequantized Q4_1 model, not the original bf16 one",
        "calibration": f"{CALIBRATION[args.calibration_text]}, {args.calibration_windows} windows of {LENGTH}{spread}",
    }


def unquantized_rows(args: argparse.Namespace, model: Any, windows: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Return the rows of the model as it is."""
    model.to(args.device).eval()
    return [
        row_of(args.model, text, "unquantized", None, None, perplexity(model, ids, batch=4))
        for text, ids in windows.items()
    ]


def measure_together(args: argparse.Namespace, out: Path, rows: list[dict[str, Any]]) -> None:
    """Calibrate, then measure several methods at a time."""
    notes: dict[str, Any] = {}
    others, made_before = kept(out, args) if args.keep else ([], {})  # the file is written over from here on
    ours = [method for method in args.methods if method in METHODS]
    if ours:
        calibrated(args, ours[0], notes)

    def join(parts: list[dict[str, Any]]) -> None:
        found = [row for part in parts for row in part["rows"]]
        made = made_before | {name: how for part in parts for name, how in part["made"].items()}
        told = {"made": made | notes.get("made", {}), "jobs": args.jobs, "compiles": sum(p["compiles"] for p in parts)}
        record.write(out, [*rows, *found, *others], args.device, **protocol(args), **told)

    quality_jobs.run(args.methods, args.jobs, sys.argv, join)


def main() -> None:
    """Measure and write; what is measured so far is written after each row."""
    args = arguments()
    args.calibration_windows = args.calibration_windows or (CALIBRATION_WINDOWS if args.calibrate else 8)
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    windows = {
        text: make_windows(tokenizer, load_text(args.data / TEXTS[text]), args.windows, where=text)
        for text in args.texts
    }
    rows = unquantized_rows(args, model, windows) if args.unquantized else []
    del model  # every method starts from one of its own
    out = args.out or record.folder(args.device) / ("quality.json" if args.calibrate else "quality_datafree.json")
    if args.jobs > 1:
        measure_together(args, out, rows)
        return
    notes: dict[str, Any] = {}
    REPORTS.clear()
    measured = calibrated_rows if args.calibrate else data_free_rows
    for row in measured(args, windows, notes):
        rows.append(row)
        others, made = kept(out, args) if args.keep else ([], {})
        told = notes | {"made": made | notes.get("made", {})} if args.calibrate else notes
        record.write(out, [*rows, *others], args.device, **protocol(args), **told, compiles=len(REPORTS))


if __name__ == "__main__":
    main()
