"""Outlier migration of one packed model: do the tokens that suffer most move with the budget?

    python benchmarks/bench_migration.py --data DIR                  # data-free slices: outlier_migration.json
    python benchmarks/bench_migration.py --data DIR --state STATE    # calibrated: outlier_migration_calibrated.json

DIR holds ``wikitext2/``, ``ptb/`` and ``c4/``. Rows are `Migration.summary`, one with and one without routing for each
text and pair of budgets; the errors of every token of the first text at the first pair are kept for the figure, which
scripts/plot_migration.py draws. With --state slices are calibrated and routers trained; STATE keeps what is done, and
may be that of `bench_quality`. SmolLM2 here is the dequantized Q4_1 model, not the original bf16 one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import record
import result_files
import torch
from bench_quality import CALIBRATION as CALIBRATIONS
from bench_quality import TEXTS

import mobiquant_compiler as mq
from mobiquant_compiler.analysis import Migration, outlier_migration
from mobiquant_compiler.evaluation import CALIBRATION_WINDOWS, load_text, make_windows, spread_windows
from mobiquant_compiler.models import load_model

CALIBRATION = CALIBRATIONS["wikitext2"]
PAIRS = ((3.0, 4.0), (4.0, 5.0), (4.0, 6.0))


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """Return the parser of what benchmarks of outlier migration have in common."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), choices=TEXTS)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--calibration-windows", type=int, help=f"8, or {CALIBRATION_WINDOWS} with --state")
    parser.add_argument("--state", type=Path, help="calibrate, and keep finished steps here")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=result_files.output, metavar="FILE")
    return parser


def load(args: argparse.Namespace) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Return the model, its tokenizer, and windows of each text."""
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    windows = {
        text: make_windows(tokenizer, load_text(args.data / TEXTS[text]), args.windows, where=text)
        for text in args.texts
    }
    return model.to(args.device).eval(), tokenizer, windows


def token_errors(found: Migration) -> list[dict[str, Any]]:
    """Return the errors of every token, three digits each, an entry a budget and way of routing."""
    return [
        {
            "budget": part.budget,
            "routed": part.routed,
            "achieved_bits": part.achieved_bits,
            "errors": " ".join(f"{error:.3g}" for error in part.tokens.tolist()),
        }
        for part in (*found.low, *found.high)
    ]


def measure(model: Any, windows: Mapping[str, torch.Tensor], name: str) -> tuple[list[dict[str, Any]], Any]:
    """Return the rows of all texts and pairs, and the token errors of the first."""
    rows: list[dict[str, Any]] = []
    tokens = None
    for text, ids in windows.items():
        for pair in PAIRS:
            start = time.perf_counter()
            found = outlier_migration(model, ids, pair)
            tokens = tokens or token_errors(found)
            for row in found.summary():
                method = "routing" if row["routed"] else "one count a linear"
                rows.append({"model": name, "text": text, "method": method, **row, "share": found.share})
                print(
                    text, pair, method, f"overlap {row['overlap']:.3f}, {time.perf_counter() - start:.0f} s", flush=True
                )
    return rows, tokens


def make_elastic(args: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Make a model elastic in place; returns what the result file says of that."""
    config, text = mq.SliceConfig(group=args.group), load_text(args.data / CALIBRATION)
    count = args.calibration_windows or (8 if args.state is None else CALIBRATION_WINDOWS)
    if args.state is None:
        mq.quantize_(model, config, calibration=make_windows(tokenizer, text, count))
        how = f"{count} windows of 512, data-free slices, energy router"
        return {"config": config.to_dict(), "calibration": f"{CALIBRATION}, {how}"}
    tokens, options = spread_windows(tokenizer, text, count), mq.CalibrationConfig(router="mlp")
    mq.calibrate_(model, tokens, options, slices=config, state=args.state)
    how = f"{len(tokens)} windows of 512, spread evenly, calibrated slices, trained router"
    return {"config": config.to_dict(), "calibration": f"{CALIBRATION}, {how}", "options": options.to_dict()}


def main() -> None:
    """Measure and write."""
    args = parser_of(__doc__).parse_args()
    model, tokenizer, windows = load(args)
    made = make_elastic(args, model, tokenizer)
    rows, tokens = measure(model, windows, args.model)
    name = "outlier_migration.json" if args.state is None else "outlier_migration_calibrated.json"
    record.write(
        args.out or record.folder(args.device) / name,
        rows,
        args.device,
        protocol=f"{args.windows} windows of 512 tokens, no BOS, fp32; error: KL(all slices || budget) in nats",
        reference="the dequantized Q4_1 model with all slices, not the original bf16 one",
        **made,
        tokens={"text": args.texts[0], "share": rows[0]["share"], "settings": tokens},
    )


if __name__ == "__main__":
    main()
