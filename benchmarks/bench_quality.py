"""Perplexity of one packed model at a list of budgets, by how its slices and routers were made.

    python benchmarks/bench_quality.py --data DIR                              # data-free: quality_datafree.json
    python benchmarks/bench_quality.py --data DIR --calibrate --state STATE    # calibrated, with ablation: quality.json

DIR holds ``wikitext2/``, ``ptb/`` and ``c4/``. Data-free slices come from the weights alone; the calibration text
(WikiText-2's train head) serves the router. With --calibrate the slices are chosen on it too (`calibrate_`), once; all
routers of the ablation then work on the same slices, so their rows differ in routing alone. STATE keeps what is done.
The unquantized model is measured in the same run. SmolLM2 here is the dequantized Q4_1 model, not the original bf16
one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import record
import torch
from safetensors.torch import load_file

import mobiquant_compiler as mq
from mobiquant_compiler.backend import REPORTS
from mobiquant_compiler.calibration.allocation import Costs, allocate
from mobiquant_compiler.evaluation import LENGTH, evaluate, load_text, make_windows, perplexity
from mobiquant_compiler.linear import elastic_linears
from mobiquant_compiler.models import load_model

TEXTS = {
    "wikitext2": "wikitext2/wiki.test.raw",
    "ptb": "ptb/ptb.test.txt",
    "c4": "c4/c4_validation.head.jsonl",
}
CALIBRATION = "wikitext2/wiki.train.head.txt"
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
NAMES = {
    "trained-input": "calibrated slices, trained router per input",
    "energy-input": "calibrated slices, energy router per input",
    "trained-linear": "calibrated slices, trained router per linear",
    "energy-linear": "calibrated slices, energy router per linear",
    "static": "calibrated slices, best static count per linear",
    "uniform": "calibrated slices, one count for all",
}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--texts", nargs="+", default=["wikitext2"], choices=TEXTS)
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--calibration-windows", type=int, help="8, or 64 with --calibrate")
    parser.add_argument("--group", default="64")
    parser.add_argument("--scope", default="input", choices=("input", "linear"), help="without --calibrate")
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--steps", type=int, default=mq.CalibrationConfig().tune_steps)
    parser.add_argument("--state", type=Path, help="directory of the calibration's finished steps")
    parser.add_argument("--eager", action="store_true", help="without our backend")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep", action="store_true", help="keep rows that --out holds of methods not measured now")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.calibrate and args.state is None:
        parser.error("--calibrate needs --state")
    return args


def spread_windows(tokenizer: Any, text: str, count: int) -> torch.Tensor:
    """Return windows spread evenly over a text, int64 [count, LENGTH]."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    starts = torch.linspace(0, len(ids) - LENGTH, count).long()
    return torch.stack([ids[start : start + LENGTH] for start in starts.tolist()])


def row_of(name: str, text: str, method: str, budget: float | None, bits: float | None, value: float) -> dict[str, Any]:
    """Return one row of the result, and say it."""
    print(f"{text}, {method}: {value:.3f}" + ("" if bits is None else f" at {bits:.3f} of {budget:g} bits"), flush=True)
    return {
        "model": name,
        "text": text,
        "method": method,
        "budget": budget,
        "achieved_bits": bits,
        "perplexity": value,
    }


def routed_rows(
    model: Any, windows: dict[str, torch.Tensor], name: str, method: str, budgets: Sequence[float]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a routed model on every text."""
    for text, ids in windows.items():
        for row in evaluate(model, ids, budgets, batch=4):
            yield row_of(name, text, method, row.budget, row.achieved_bits, row.perplexity)


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
            yield row_of(name, text, method, budget, achieved, perplexity(model, ids, batch=4))


def costs_of(state: Path, model: Any) -> Costs:
    """Return what each linear's slices are worth, as the calibration kept it."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(state.glob("block-*.safetensors")):
        found |= {key: value for key, value in load_file(path).items() if key.endswith(".losses")}
    linears = elastic_linears(model)
    losses = torch.stack([found[f"{name}.losses"] for name in linears])
    params = torch.tensor([float(m.in_features * m.out_features) for m in linears.values()]).double()
    return Costs([[name] for name in linears], losses, params, next(iter(linears.values())).router.bits_by_count())


def calibrated_rows(args: argparse.Namespace, windows: dict[str, torch.Tensor], notes: dict[str, Any]) -> Iterator[Any]:
    """Yield the rows of every method on the same calibrated slices; `notes` gets how long each model took to make."""
    for method in args.methods:
        kind, scope = METHODS[method]
        model, tokenizer = load_model(args.model, dtype=torch.float32)
        model.to(args.device).eval()
        tokens = spread_windows(tokenizer, load_text(args.data / CALIBRATION), args.calibration_windows)
        config = mq.CalibrationConfig(tune_steps=args.steps, router=kind or "energy")
        slices = mq.SliceConfig(group=group_of(args), scope=scope)
        start = time.perf_counter()
        mq.calibrate_(model, tokens, config, slices=slices, state=args.state, progress=say)
        notes.setdefault("made", {})[NAMES[method]] = {
            "slices": slices.to_dict(),
            "calibration": config.to_dict(),
            "seconds_with_what_the_state_held": round(time.perf_counter() - start, 1),
        }
        runner = model if args.eager else torch.compile(model, backend="mobiquant")
        if kind is None:
            costs = costs_of(args.state, model) if method == "static" else None
            yield from static_rows(runner, windows, args.model, NAMES[method], args.budgets, costs)
        else:
            yield from routed_rows(runner, windows, args.model, NAMES[method], args.budgets)


def data_free_rows(args: argparse.Namespace, windows: dict[str, torch.Tensor], notes: dict[str, Any]) -> Iterator[Any]:
    """Yield the rows of data-free slices."""
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    model.to(args.device).eval()
    start = time.perf_counter()
    tokens = make_windows(tokenizer, load_text(args.data / CALIBRATION), args.calibration_windows)
    config = mq.SliceConfig(group=group_of(args), scope=args.scope)
    print(mq.quantize_(model, config, calibration=tokens), flush=True)
    notes |= {"config": config.to_dict(), "quantize_seconds": round(time.perf_counter() - start, 1)}
    runner = model if args.eager else torch.compile(model, backend="mobiquant")
    yield from routed_rows(runner, windows, args.model, DATA_FREE, args.budgets)


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
    mine = {"unquantized", *(NAMES[method] for method in args.methods)}
    made = {name: how for name, how in found.get("made", {}).items() if name not in mine}
    return [row for row in found["rows"] if row["method"] not in mine], made


def main() -> None:
    """Measure and write; what is measured so far is written after each method."""
    args = arguments()
    args.calibration_windows = args.calibration_windows or (64 if args.calibrate else 8)
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    model.to(args.device).eval()
    windows = {
        text: make_windows(tokenizer, load_text(args.data / TEXTS[text]), args.windows, where=text)
        for text in args.texts
    }
    rows = [
        row_of(args.model, text, "unquantized", None, None, perplexity(model, ids, batch=4))
        for text, ids in windows.items()
    ]
    del model
    out = args.out or record.folder(args.device) / ("quality.json" if args.calibrate else "quality_datafree.json")
    spread = ", spread evenly" if args.calibrate else ""
    notes: dict[str, Any] = {
        "protocol": f"{args.windows} windows of {LENGTH} tokens, {LENGTH - 1} scored, no BOS, fp32",
        "reference": "the dequantized Q4_1 model, not the original bf16 one",
        "calibration": f"{CALIBRATION}, {args.calibration_windows} windows of {LENGTH}{spread}",
    }
    REPORTS.clear()
    measured = calibrated_rows if args.calibrate else data_free_rows
    for row in measured(args, windows, notes):
        rows.append(row)
        others, made = kept(out, args) if args.keep else ([], {})
        told = notes | {"made": made | notes.get("made", {})} if args.calibrate else notes
        record.write(out, [*rows, *others], args.device, **told, compiles=len(REPORTS))


if __name__ == "__main__":
    main()
