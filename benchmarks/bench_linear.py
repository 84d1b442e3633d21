"""One elastic linear against cuBLAS bf16, tinygemm int4 and GemLite (4 and 2 bits), on one GPU in one run.

    python benchmarks/bench_linear.py                 # benchmarks/results/<gpu>/linear.json, under eight minutes
    python benchmarks/bench_linear.py --quick         # two shapes, four numbers of tokens

Weights and activations are random. Every result is checked against float64 before it is timed, in memory that was
filled with NaN; a wrong one is a row with ``error`` and no time. Times are medians over replays of a CUDA graph of many
launches whose weights rotate past the L2 cache. GemLite is the extra ``rivals``; without it its figures are null.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import linear_summary
import record
import result_files
import torch
from linear_accuracy import accuracies
from linear_bandwidth import bandwidths
from linear_cases import shape, token_count
from linear_ours import (
    SMALL_BATCH,
    TRAINED_WIDTH,
    Case,
    Measured,
    Weights,
    cases,
    measure_case,
    measure_prepare,
    traffic,
)
from linear_rivals import BUILDERS, Rival, measure_rival, tune_gemlite
from linear_warm import jobs, warm_all

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (8192, 28672))
WAVES = ((1, 8), (16, 32, 64), (1024, 4096), (2, 4, 256))  # the most important numbers of tokens first
PREPARE_TOKENS = (1, 8, 64)
METHODS = (*BUILDERS, "ours")
QUICK = {"shapes": [(4096, 4096), (28672, 8192)], "tokens": [1, 8, 32, 1024]}
WRITE_S = 20
Group = tuple[int, int, int]  # N, K, tokens
PROTOCOL = (
    "us of one call: median over replays of a CUDA graph of many launches whose weights rotate through more than four "
    "times the L2 cache; spread: slowest minus fastest replay. time_us: the multiplication on prepared activations or, "
    f"beyond {SMALL_BATCH} tokens, the whole linear from given counts; total_us: route, quantize and multiply."
)

started = time.monotonic()


class DeviceLost(Exception):
    """After this error nothing runs on the device any more."""


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=shape, help="output rows x input columns")
    parser.add_argument("--tokens", nargs="+", type=token_count)
    parser.add_argument("--slices", nargs="+", type=int, default=[1, 2, 3, 4], choices=(1, 2, 3, 4))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and numbers of tokens")
    parser.add_argument("--budget-s", type=float, default=460.0, help="leave out what would end later than this")
    parser.add_argument("--workers", type=int, default=15, help="processes that compile beforehand; 0: none")
    parser.add_argument("--seed", type=int, help="repeat a run's random data; default: new data")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu only tries the benchmark out")
    parser.add_argument("--out", type=result_files.output, metavar="FILE")
    args = parser.parse_args(given)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu tries the benchmark out, without figures that mean anything")
    args.shapes = args.shapes or (QUICK["shapes"] if args.quick else SHAPES)
    args.tokens = args.tokens or (QUICK["tokens"] if args.quick else [t for wave in WAVES for t in wave])
    args.seed = torch.seed() % (1 << 31) if args.seed is None else args.seed
    return args


def plan(shapes: Sequence[tuple[int, int]], tokens: Sequence[int]) -> list[Group]:
    """Return all shapes and numbers of tokens, by importance; numbers in no wave come last."""
    known = {t for wave in WAVES for t in wave}
    waves = [*WAVES, tuple(t for t in tokens if t not in known)]
    return [(n, k, t) for wave in waves for n, k in shapes for t in wave if t in tokens]


def run_within(groups: Sequence[Group], act: Callable[[Group], None], left: Callable[[], float]) -> list[Group]:
    """Do groups in order while there is time for one as long as the longest of the last few; return the rest."""
    recent: deque[float] = deque(maxlen=6)
    for number, group in enumerate(groups):
        before = left()
        if before <= max(recent, default=0.0):
            return list(groups[number:])
        act(group)
        recent.append(before - left())
    return []


def attempt(where: object, function: Callable[..., Any], *args: Any) -> tuple[Any, str | None]:
    """Return a result, or what went wrong as text.

    Raises:
        DeviceLost: the device does not recover from it; the message starts with `where`.
    """
    try:
        return function(*args), None
    except Exception as error:  # noqa: BLE001  one wrong cell must not cost the others
        text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception as lost:
        raise DeviceLost(f"{where}: {text}") from lost
    return None, text


def row_of(group: Group, case: Case, rivals: dict[str, dict[str, Any]], done: Measured | None) -> dict[str, Any]:
    """Assemble the row of one case; without a measurement its times are null."""
    n, k, tokens = group
    row: dict[str, Any] = {"n": n, "k": k, "tokens": tokens, "slices": case.slices, "counts": case.counts}
    row |= {"mean_slices": done and round(done.mean_slices, 3), "activation": case.activation, "layout": case.layout}
    row |= {"time_us": done and round(done.alone.median_us, 3), "total_us": done and round(done.whole.median_us, 3)}
    row["spread_us"] = done and round(done.alone.spread_us, 3)
    row |= {f"{name}_us": rivals.get(name, {}).get("time_us") for name in BUILDERS}
    bf16_us = row["bf16_us"]
    row["over_bf16"] = round(bf16_us / done.alone.median_us, 3) if done and bf16_us else None
    row["bytes"] = traffic(case, n, k, tokens)
    row["bandwidth_tb_s"] = done and round(row["bytes"] / done.alone.median_us / 1e6, 3)
    return row | {"path": done and done.path, "relative_error": done and float(f"{done.relative_error:.3g}")}


class Benchmark:
    """Weights that were built, and what was measured so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.rows: list[dict[str, Any]] = []
        self.rivals: list[dict[str, Any]] = []
        self.prepare: list[dict[str, Any]] = []
        self.accuracy: list[dict[str, Any]] = []
        self.notes: dict[str, Any] = {"protocol": PROTOCOL, "seed": args.seed, "bandwidth": {}}
        self._built: dict[tuple[str, int, int], tuple[Any, str | None]] = {}
        self.measured: set[Group] = set()
        self._written = time.monotonic()

    def left(self) -> float:
        """Return the seconds left of the budget."""
        return self.args.budget_s - (time.monotonic() - started)

    def say(self, text: str) -> None:
        """Report progress."""
        print(f"[{time.monotonic() - started:6.1f} s] {text}", file=sys.stderr, flush=True)

    def measure(self, group: Group) -> None:
        """Measure everything at one shape and number of tokens."""
        n, k, tokens = group
        x = torch.randn(tokens, k, device=self.device, dtype=torch.bfloat16)
        rivals = {name: self._rival(name, group, x) for name in self.args.methods if name in BUILDERS}
        first = len(self.rows)
        if "ours" in self.args.methods:
            for case in cases(n, k, tokens, self.args.slices):
                self.rows.append(self._case(group, case, rivals, x))
            self._prepare(group, x)
        self.measured.add(group)
        times = [f"{name} {entry['time_us'] or '-'}" for name, entry in rivals.items()]
        ours = [f"{r['counts'][0]}{r['slices']}{r['activation']} {r['time_us'] or '-'}" for r in self.rows[first:]]
        self.say(f"{n}x{k}, {tokens} tokens, us: {', '.join(times)} | ours {', '.join(ours)}")
        if time.monotonic() - self._written > WRITE_S:  # something is left if the process is killed
            self.write()

    def _build(self, name: str, n: int, k: int) -> tuple[Any, str | None]:
        key = (name, n, k)
        if key not in self._built:
            build = BUILDERS.get(name) or (lambda n, k, device: Weights(n, k, name, device))
            self._built[key] = built = attempt(key, build, n, k, self.device)
            if built[1]:
                self.say(f"{key}: {built[1]}")
        return self._built[key]

    def _rival(self, name: str, group: Group, x: torch.Tensor) -> dict[str, Any]:
        n, k, tokens = group
        entry: dict[str, Any] = {"method": name, "n": n, "k": k, "tokens": tokens, "time_us": None}
        rival, error = self._build(name, n, k)
        if isinstance(rival, Rival):
            found, error = attempt((name, group), measure_rival, name, rival, x)
            entry |= found or {}
            if error:
                self.say(f"{group}, {name}: {error}")
        if error:
            entry["error"] = error
        self.rivals.append(entry)
        return entry

    def _case(self, group: Group, case: Case, rivals: dict[str, dict[str, Any]], x: torch.Tensor) -> dict[str, Any]:
        weights, error = self._build(case.layout, *group[:2])
        done = None
        if weights is not None:
            done, error = attempt((group, case), measure_case, weights, case, x)
            if error:
                self.say(f"{group}, {case}: {error}")
        row = row_of(group, case, rivals, done)
        if error:
            row["error"] = error
        return row

    def _prepare(self, group: Group, x: torch.Tensor) -> None:
        """Measure route and quantize alone, once for each number of columns and order, and how much a chain hides.

        ``trained_us`` is the same with a trained router of `TRAINED_WIDTH` hidden units.
        """
        n, k, tokens = group
        if tokens not in PREPARE_TOKENS:
            return
        weights, error = self._build("slice_major", n, k)
        order = None if weights is None else weights.order_of(x)
        if any((e["k"], e["tokens"], e["order"]) == (k, tokens, order) for e in self.prepare):
            return
        timing = trained = None
        if weights is not None:
            found, error = attempt(("prepare", group), measure_prepare, weights, x)
            timing, trained = found or (None, None)
        entry = {"k": k, "tokens": tokens, "order": order, "time_us": timing and round(timing.median_us, 3), "n": n}
        entry |= {"trained_us": trained and round(trained.median_us, 3), "trained_width": TRAINED_WIDTH}
        same = linear_summary.find(self.rows, n=n, k=k, tokens=tokens, slices=2, counts="uniform", activation="a16")
        times = [(r["total_us"], r["time_us"]) for r in same if r["layout"] == "slice_major" and r["time_us"]]
        entry["added_us"] = round(times[0][0] - times[0][1], 3) if times else None
        hidden = timing is not None and entry["added_us"] is not None
        entry["hidden_us"] = round(timing.median_us - entry["added_us"], 3) if hidden else None
        self.prepare.append(entry | ({"error": error} if error else {}))

    def check_accuracy(self) -> None:
        """Hold results of float32 activations against the reference."""
        found, error = attempt("accuracy", accuracies, self.device)
        self.accuracy = found or []
        self.say(f"accuracy: {error or f'{len(self.accuracy)} results'}")
        if error:
            self.notes["accuracy_error"] = error

    def write(self) -> list[dict[str, Any]]:
        """Write what there is, with what it means, and return the summary."""
        summary = linear_summary.summarize(self.rows, self.prepare, self.notes["bandwidth"], self.accuracy)
        notes = {**self.notes, "summary": summary, "prepare": self.prepare, "rivals": self.rivals}
        notes["accuracy"] = self.accuracy
        notes["seconds"] = round(time.monotonic() - started, 1)
        out = self.args.out or record.folder(self.args.device) / "linear.json"
        record.write(out, self.rows, self.args.device, **notes)
        self._written = time.monotonic()
        return summary


def warm_up(bench: Benchmark) -> None:
    """Compile kernels beforehand and set GemLite's tuner up."""
    args = bench.args
    methods = [m for m in args.methods if not m.startswith("gemlite") or record.version_of("gemlite")]
    todo = jobs(args.shapes, args.tokens, methods)
    failed = warm_all(todo, args.slices, args.workers, min(150.0, args.budget_s / 3))
    bench.say(f"compiled {len(todo) - len(failed)} of {len(todo)} sets of kernels beforehand")
    _, error = attempt("GemLite", tune_gemlite)
    if error:
        bench.say(f"GemLite: {error}")


def main() -> None:
    """Measure and write."""
    args = arguments()
    torch.manual_seed(args.seed)
    bench = Benchmark(args)
    bench.say(f"{record.device_name(args.device)}, seed {args.seed}")
    if args.device == "cuda":
        warm_up(bench)
    groups = plan(args.shapes, args.tokens)
    with torch.no_grad():
        try:
            found, error = attempt("bandwidth", bandwidths, bench.device)
            bench.notes["bandwidth"] = found or {"error": error}
            bench.say(f"bandwidth {bench.notes['bandwidth']}")
            if "ours" in args.methods and args.device == "cuda":
                bench.check_accuracy()  # before the rest, which ends when the budget does
            run_within(groups, bench.measure, bench.left)
        except (DeviceLost, KeyboardInterrupt) as error:
            bench.notes["stopped"] = f"{type(error).__name__}: {error}"
            bench.say(bench.notes["stopped"])
    reason = bench.notes.get("stopped", "time budget")
    skipped = [group for group in groups if group not in bench.measured]
    bench.notes["skipped"] = [{"n": n, "k": k, "tokens": t, "reason": reason} for n, k, t in skipped]
    bench.say(f"skipped: {skipped or 'nothing'}")
    for line in linear_summary.lines(bench.write()):
        print(line)


if __name__ == "__main__":
    main()
