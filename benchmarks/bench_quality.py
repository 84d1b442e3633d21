"""Perplexity of one packed, data-free model at a list of budgets, compiled by the backend.

    python benchmarks/bench_quality.py --data DIR        # benchmarks/results/cpu/quality_datafree.json

DIR holds ``wikitext2/``, ``ptb/`` and ``c4/``. Slices come from the weights alone; the calibration text (WikiText-2's
train head) serves the router: one gradient pass for sensitivities, a few forward passes for the budget table. The
unquantized model is measured in the same run. SmolLM2 here is the dequantized Q4_1 model, not the original bf16 one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record
import torch

import mobiquant_compiler as mq
from mobiquant_compiler.backend import REPORTS
from mobiquant_compiler.evaluation import evaluate, load_text, make_windows, perplexity
from mobiquant_compiler.models import load_model

TEXTS = {
    "wikitext2": "wikitext2/wiki.test.raw",
    "ptb": "ptb/ptb.test.txt",
    "c4": "c4/c4_validation.head.jsonl",
}
CALIBRATION = "wikitext2/wiki.train.head.txt"
BUDGETS = (8.0, 7.0, 6.0, 5.5, 5.0, 4.5, 4.0, 3.5, 3.0)
METHOD = "mobiquant data-free slices, energy router"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--texts", nargs="+", default=["wikitext2"], choices=TEXTS)
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--calibration-windows", type=int, default=8)
    parser.add_argument("--group", default="64")
    parser.add_argument("--scope", default="input", choices=("input", "linear"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def measure_text(
    model: Any, windows: torch.Tensor, name: str, text: str, reference: float, budgets: Sequence[float]
) -> list[dict[str, Any]]:
    """Return the rows of one text, the unquantized model's first."""
    rows: list[dict[str, Any]] = [
        {
            "model": name,
            "text": text,
            "budget": None,
            "achieved_bits": None,
            "perplexity": reference,
            "method": "unquantized",
        }
    ]
    for row in evaluate(model, windows, budgets, batch=4):
        rows.append(
            {
                "model": name,
                "text": text,
                "budget": row.budget,
                "achieved_bits": row.achieved_bits,
                "perplexity": row.perplexity,
                "method": METHOD,
            }
        )
        print(
            f"{text} {row.budget:g} bits: {row.perplexity:.3f} at {row.achieved_bits:.3f}, {row.seconds:.0f} s",
            flush=True,
        )
    return rows


def main() -> None:
    """Measure and write."""
    args = arguments()
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    model.to(args.device).eval()
    windows = {
        text: make_windows(tokenizer, load_text(args.data / TEXTS[text]), args.windows, where=text)
        for text in args.texts
    }
    references = {text: perplexity(model, ids, batch=4) for text, ids in windows.items()}
    print({text: round(value, 3) for text, value in references.items()}, flush=True)

    start = time.perf_counter()
    calibration = make_windows(tokenizer, load_text(args.data / CALIBRATION), args.calibration_windows)
    group = args.group if args.group == "auto" else int(args.group)
    config = mq.SliceConfig(group=group, scope=args.scope)
    coverage = mq.quantize_(model, config, calibration=calibration)
    quantize_seconds = time.perf_counter() - start
    print(coverage, f"{quantize_seconds:.0f} s", flush=True)

    compiled = torch.compile(model, backend="mobiquant")
    REPORTS.clear()
    rows = []
    for text, ids in windows.items():
        rows += measure_text(compiled, ids, args.model, text, references[text], args.budgets)
    out = args.out or record.folder(args.device) / "quality_datafree.json"
    record.write(
        out,
        rows,
        args.device,
        protocol=f"{args.windows} windows of 512 tokens, 511 scored, no BOS, fp32",
        reference="the dequantized Q4_1 model, not the original bf16 one",
        config=config.to_dict(),
        calibration=f"{CALIBRATION}, {args.calibration_windows} windows of 512",
        quantize_seconds=round(quantize_seconds, 1),
        compiles=len(REPORTS),
    )


if __name__ == "__main__":
    main()
