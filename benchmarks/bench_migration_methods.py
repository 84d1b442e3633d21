"""Outlier migration of one packed model beside that of static methods, which have a model for every width.

    python benchmarks/bench_migration_methods.py --data DIR --state STATE    # outlier_migration_methods.json

What `bench_migration` compares is one packed model with and without routing, each against all its slices. Here every
error is against the unquantized model, ``KL(unquantized || quantized)`` of a token's prediction in nats, and what
stands beside routing was tuned for each width by itself. DIR holds ``wikitext2/``, ``ptb/`` and ``c4/``; without
--state slices are data-free. SmolLM2 here is the dequantized Q4_1 model, not the original bf16 one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import record
import torch
from bench_migration import CALIBRATION, load, make_elastic, parser_of
from torch import Tensor, nn

import mobiquant_compiler as mq
from mobiquant_compiler.analysis.migration import SHARE, fixed_counts, least_of_worst, overlap, rank_correlation, worst
from mobiquant_compiler.analysis.watch import Call, watch_linears
from mobiquant_compiler.baselines.compare import METHODS, static_weights
from mobiquant_compiler.evaluation import CALIBRATION_WINDOWS, load_text, logits_of, spread_windows

PAIRS = ((2, 3), (3, 4))
ROUTED, FIXED = "routing", "one count a linear"
Errors = dict[tuple[str, str, int], Tensor]  # by text, method and width, float64 [T]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--methods", nargs="+", default=["gptq", "rtn"], choices=METHODS)
    return parser.parse_args()


def log_shares(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the log probabilities [S, V] of a window [S]."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.log_softmax(logits_of(model, ids.to(device).unsqueeze(0))[0].float(), -1)


def divergence(model: nn.Module, windows: Tensor, expected: list[Tensor]) -> Tensor:
    """Return every token's error, float64 [T], against the log probabilities of the unquantized model."""
    found = []
    for ids, wanted in zip(windows, expected, strict=True):
        wanted = wanted.to(next(model.parameters()).device)
        error = (wanted.exp() * (wanted - log_shares(model, ids))).sum(-1)
        found.append(error.clamp_min(0).double().cpu())
    return torch.cat(found)


def static_errors(
    model: nn.Module, args: argparse.Namespace, calibration: Tensor, measure: Callable[[], Mapping[str, Tensor]]
) -> Iterator[tuple[tuple[str, str, int], Tensor]]:
    """Yield the errors of every static method at every width, each a model of its own."""
    config = mq.SliceConfig(group=args.group)
    for method in args.methods:
        for bits in sorted({width for pair in PAIRS for width in pair}):
            start = time.perf_counter()
            with static_weights(model, method, bits, config=config, calibration=calibration):
                for text, errors in measure().items():
                    yield (text, method, bits), errors
            print(f"{method} at {bits} bits: {time.perf_counter() - start:.0f} s", flush=True)


def elastic_errors(
    model: nn.Module, measure: Callable[[], Mapping[str, Tensor]]
) -> Iterator[tuple[tuple[str, str, int], Tensor]]:
    """Yield the errors of the packed model at every width, with routing and with one count for all tokens."""
    for bits in sorted({width for pair in PAIRS for width in pair}):
        with mq.budget(model, float(bits)):
            for text, errors in measure().items():
                yield (text, ROUTED, bits), errors
        counts = fixed_counts(model, float(bits))

        def observe(call: Call, counts: Mapping[str, int] = counts) -> Tensor:
            return call.multiply(counts[call.name])

        with watch_linears(model, observe):
            for text, errors in measure().items():
                yield (text, FIXED, bits), errors


def rows_of(errors: Errors, texts: list[str], methods: list[str], scale: str) -> list[dict[str, Any]]:
    """Return a row a text, pair of widths and method.

    ``migrated_tokens`` has one scale for all: an outlier errs by more than nine tenths of the tokens do by method
    `scale` at that width.
    """
    rows = []
    for text in texts:
        for low, high in PAIRS:
            limits = [least_of_worst(errors[text, scale, bits], SHARE) for bits in (low, high)]
            for method in methods:
                before, after = errors[text, method, low], errors[text, method, high]
                new = worst(after, SHARE) & ~worst(before, SHARE)
                outliers = [found >= limit for found, limit in zip((before, after), limits, strict=True)]
                rows.append(
                    {
                        "text": text,
                        "low_bits": low,
                        "high_bits": high,
                        "method": method,
                        "overlap": overlap(before, after),
                        "rank_correlation": rank_correlation(before, after),
                        "migrated_share": float(after[new].sum() / after.sum()),
                        "migrated_tokens": float((outliers[0] ^ outliers[1]).double().mean()),
                        "low_mean_error": float(before.mean()),
                        "high_mean_error": float(after.mean()),
                    }
                )
    return rows


def main() -> None:
    """Measure and write."""
    args = arguments()
    model, tokenizer, windows = load(args)
    expected = {text: [log_shares(model, ids).cpu() for ids in found] for text, found in windows.items()}

    def measure() -> dict[str, Tensor]:
        return {text: divergence(model, windows[text], expected[text]) for text in windows}

    count = args.calibration_windows or (8 if args.state is None else CALIBRATION_WINDOWS)
    calibration = spread_windows(tokenizer, load_text(args.data / CALIBRATION), count)
    errors: Errors = dict(static_errors(model, args, calibration, measure))
    made = make_elastic(args, model, tokenizer)
    errors |= dict(elastic_errors(model, measure))
    rows = rows_of(errors, args.texts, [*args.methods, FIXED, ROUTED], args.methods[0])
    for row in rows:
        print(
            row["text"], row["low_bits"], row["high_bits"], row["method"], f"overlap {row['overlap']:.3f}", flush=True
        )
    record.write(
        args.out or record.folder(args.device) / "outlier_migration_methods.json",
        [{"model": args.model, **row, "share": SHARE} for row in rows],
        args.device,
        protocol=f"{args.windows} windows of 512 tokens, no BOS, fp32; error: KL(unquantized || quantized) in nats",
        reference="the dequantized Q4_1 model, not the original bf16 one",
        scale=f"an outlier errs by more than nine tenths of the tokens do by {args.methods[0]} at that width",
        **made,
    )


if __name__ == "__main__":
    main()
