"""What the project promises about the speed of one linear, held against a result file of bench_linear.py.

python benchmarks/linear_summary.py benchmarks/results/h100/linear.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import result_files

Row = Mapping[str, Any]

ONE_TOKEN = {1: 4.5, 2: 3.2, 3: 2.4, 4: 1.9}  # slices: geometric mean of speed-ups over bf16
EACH_SHAPE, ALL_SHAPES = 1.15, 1.3  # two slices, over the better 4-bit kernel
BANDWIDTH, LARGEST = 0.85, 2  # share of what reading reaches, on so many of the largest shapes
EIGHT_TOKENS = 1.25  # times of eight mixed tokens over one token's
PREFILL = {1024: 0.75, 4096: 0.9}  # tokens: speed over bf16, two slices a token on average
PREPARE_K, PREPARE_US = 4096, 3.5
READ = {"rows": ("n", "k", "tokens", "slices", "time_us", "bandwidth_tb_s"), "prepare": ("time_us",)}  # columns by list
ERRORS = {"a16": 0.0001, "a8": 0.01}  # activation: the largest relative error of float32 outputs


def find(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Return the rows that have all of these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


class Figure:
    """One number per shape, and the shapes that lack it."""

    def __init__(self, rows: Sequence[Row], compute: Callable[[Row], float | None]) -> None:
        values = [(compute(row), f"{row['n']}x{row['k']}, tokens: {row['tokens']}") for row in rows]
        self.values = [(value, where) for value, where in values if value is not None]
        self.complete = bool(values) and len(self.values) == len(values)

    def worst(self, pick: Callable[..., tuple[float, str]] = min) -> tuple[float | None, str]:
        """Return the smallest (or largest) value and where it is."""
        return pick(self.values) if self.complete else (None, "not all measured")

    def mean(self) -> tuple[float | None, str]:
        """Return the geometric mean."""
        if not self.complete:
            return None, "not all measured"
        return statistics.geometric_mean(value for value, _ in self.values), "geometric mean"


def _over(row: Row, *rivals: str, time: str = "time_us") -> float | None:
    """Return how many times faster a row is than the fastest of some rivals; all of them must be there."""
    times = [row.get(f"{rival}_us") for rival in rivals]
    if not row.get(time) or not all(times):
        return None
    return min(t for t in times if t) / row[time]


def _goal(text: str, wanted: str, got: tuple[float | None, str], whole: float | None = None) -> dict[str, Any]:
    sign, limit = wanted.split()
    value, where = got
    met = None if value is None else value >= float(limit) if sign == ">=" else value <= float(limit)
    rounded = [v if v is None else round(v, 3) if abs(v) >= 0.1 else float(f"{v:.3g}") for v in (value, whole)]
    return {"goal": text, "wanted": wanted, "got": rounded[0], "met": met, "where": where, "with_prepare": rounded[1]}


def _one_token(rows: Sequence[Row]) -> Iterable[dict[str, Any]]:
    for slices, wanted in ONE_TOKEN.items():
        chosen = find(rows, tokens=1, slices=slices, counts="uniform")
        speed = Figure(chosen, lambda row: _over(row, "bf16")).mean()
        whole = Figure(chosen, lambda row: _over(row, "bf16", time="total_us")).mean()[0]
        yield _goal(f"one token, {slices} slices: times as fast as bf16", f">= {wanted}", speed, whole)
    chosen = find(rows, tokens=1, slices=2, counts="uniform")
    speed = Figure(chosen, lambda row: _over(row, "tinygemm4", "gemlite4"))
    whole = Figure(chosen, lambda row: _over(row, "tinygemm4", "gemlite4", time="total_us"))
    text = "one token, 2 slices: times as fast as the better of tinygemm and GemLite at 4 bits, "
    yield _goal(text + "each shape", f">= {EACH_SHAPE}", speed.worst(), whole.worst()[0])
    yield _goal(text + "all shapes", f">= {ALL_SHAPES}", speed.mean(), whole.mean()[0])


def _bandwidth(rows: Sequence[Row], read_tb_s: float | None) -> Iterable[dict[str, Any]]:
    shapes = sorted({(row["n"], row["k"]) for row in rows}, key=lambda s: (-s[0] * s[1], -s[0]))[:LARGEST]
    chosen = [row for row in find(rows, tokens=1, counts="uniform") if row["slices"] >= 2]
    chosen = [row for row in chosen if (row["n"], row["k"]) in shapes]
    share = Figure(chosen, lambda row: row["bandwidth_tb_s"] / read_tb_s if row["time_us"] and read_tb_s else None)
    text = "one token, from 2 slices on, two largest shapes: share of the read bandwidth"
    yield _goal(text, f">= {BANDWIDTH}", share.worst())


def _small_batches(rows: Sequence[Row]) -> Iterable[dict[str, Any]]:
    for slices in (2, 4):
        one = {(r["n"], r["k"]): r["time_us"] for r in find(rows, tokens=1, slices=slices, counts="uniform")}
        chosen = find(rows, tokens=8, slices=slices, counts="mixed")

        def times(row: Row, one: Mapping[Any, Any] = one) -> float | None:
            single = one.get((row["n"], row["k"]))
            return row["time_us"] / single if row["time_us"] and single else None

        text = f"8 tokens of 1 to {slices} slices: "
        yield _goal(text + "time over one token's", f"<= {EIGHT_TOKENS}", Figure(chosen, times).worst(max))
        speed = Figure(chosen, lambda row: _over(row, "bf16", "gemlite4"))
        whole = Figure(chosen, lambda row: _over(row, "bf16", "gemlite4", time="total_us"))
        text += "times as fast as the better of bf16 and GemLite at 4 bits, each shape"
        yield _goal(text, ">= 1", speed.worst(), whole.worst()[0])
    chosen = [row for t in (16, 32, 64) for row in find(rows, tokens=t, slices=2, counts="uniform")]
    for rival, name in (("bf16", "bf16"), ("gemlite4", "GemLite at 4 bits")):
        speed = Figure(chosen, lambda row, rival=rival: _over(row, rival))
        whole = Figure(chosen, lambda row, rival=rival: _over(row, rival, time="total_us"))
        text = f"16 to 64 tokens, 2 slices: times as fast as {name}, each shape"
        yield _goal(text, ">= 1", speed.worst(), whole.worst()[0])


def _prefill(rows: Sequence[Row]) -> Iterable[dict[str, Any]]:
    for tokens, wanted in PREFILL.items():
        speed = Figure(find(rows, tokens=tokens, counts="mixed"), lambda row: _over(row, "bf16"))
        text = f"{tokens} tokens, 2 slices on average: speed over bf16, each shape"
        yield _goal(text, f">= {wanted}", speed.worst())


def _prepare(prepare: Sequence[Row]) -> Iterable[dict[str, Any]]:
    found = [row["time_us"] for row in find(prepare, k=PREPARE_K, tokens=1) if row["time_us"]]
    got = (found[0], f"K = {PREPARE_K}") if found else (None, "not measured")
    yield _goal("one token: us to route and quantize", f"<= {PREPARE_US}", got)


def _accuracy(accuracy: Sequence[Row]) -> Iterable[dict[str, Any]]:
    for activation, wanted in ERRORS.items():
        error = Figure(find(accuracy, activation=activation), lambda row: row["relative_error"])
        yield _goal(f"float32 outputs, {activation}: largest relative error", f"<= {wanted}", error.worst(max))


def summarize(
    rows: Sequence[Row], prepare: Sequence[Row], bandwidth: Mapping[str, Any], accuracy: Sequence[Row] = ()
) -> list[dict[str, Any]]:
    """Hold rows against what was promised.

    Returns:
        A row per promise: ``goal``, ``wanted``, ``got``, ``met`` (null where something was not measured), ``where``
        (the worst shape and number of tokens), ``with_prepare`` (``got`` for route, quantize and multiply together).
    """
    ours = find(rows, activation="a16", layout="slice_major")
    return [
        *_one_token(ours),
        *_bandwidth(ours, bandwidth.get("read_tb_s")),
        *_small_batches(ours),
        *_prefill(ours),
        *_prepare(prepare),
        *_accuracy(accuracy),
    ]


def lines(summary: Iterable[Row]) -> list[str]:
    """Return a line per promise, and one over all."""
    words = {True: "pass", False: "MISS", None: "no data"}
    written = []
    for row in summary:
        whole = "" if row["with_prepare"] is None else f", {row['with_prepare']} with route and quantize"
        got = f"{row['got']} ({row['where']}{whole})"
        written.append(f"{words[row['met']]:8}{row['goal']}: {got}; wanted {row['wanted']}")
    met = sum(row["met"] is True for row in summary)
    return [*written, f"{met} of {len(written)} promises kept"]


def main(given: Sequence[str] | None = None) -> int:
    """Print the summary of a result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="FILE", help="what bench_linear.py wrote")
    args = parser.parse_args(given)
    try:
        result = result_files.read(args.results, "benchmarks/bench_linear.py", ["bandwidth"], READ)
    except result_files.BadResult as error:
        print(error, file=sys.stderr)
        return 2
    for line in lines(summarize(result["rows"], result["prepare"], result["bandwidth"], result.get("accuracy", ()))):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
