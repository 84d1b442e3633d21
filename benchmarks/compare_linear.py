"""One elastic linear in this tree and in another one, side by side on one GPU: what did a change do to its times?

    git worktree add ../before HEAD~1
    python benchmarks/compare_linear.py ../before --shapes 14336x4096 8192x8192 --cases 8:2:mixed 1:2

A case is ``tokens:slices``, or ``tokens:slices:mixed`` for tokens of different slice counts up to that one. Each tree
is measured by processes of its own, by its own benchmark code, in turn and several times, on one machine: times of two
machines, or of two days, differ by more than most changes. Results are checked before they are timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linear_cases import case, shape

HERE = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


class TreeFailed(Exception):
    """A tree could not be measured."""


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="root of another checkout")
    parser.add_argument("--shapes", nargs="+", type=shape, default=[(4096, 4096), (14336, 4096), (8192, 8192)])
    parser.add_argument(
        "--cases", nargs="+", type=case, default=[(1, 2, "uniform"), (8, 2, "mixed"), (1024, 4, "mixed")]
    )
    parser.add_argument("--rounds", type=int, default=2, help="times that each tree is measured")
    parser.add_argument("--device", default="cuda", help="cpu only tries the script out")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    if args.rounds < 1:
        parser.error(f"--rounds: got {args.rounds}, wanted at least 1")
    if not (args.other / "benchmarks" / "linear_ours.py").is_file():
        parser.error(f"{args.other} is no checkout: it has no benchmarks/linear_ours.py")
    return args


def measure(shapes: Sequence[tuple[int, int]], cases: Sequence[tuple[int, int, str]], device: str) -> list[Row]:
    """Check and time cases by the benchmark code that is imported here; microseconds of the multiplication alone."""
    import torch
    from linear_ours import Case, Weights, measure_case

    rows, where = [], torch.device(device)
    for n, k in shapes:
        weights = Weights(n, k, "slice_major", where)
        for tokens, slices, counts in cases:
            x = torch.randn(tokens, k, device=where, dtype=torch.bfloat16)
            done = measure_case(weights, Case(slices, counts), x)
            facts = {"n": n, "k": k, "tokens": tokens, "slices": slices, "counts": counts}
            rows.append(facts | {"time_us": done.alone.median_us})
        del weights
    return rows


def measured_by(tree: Path, given: Sequence[str]) -> list[Row]:
    """Have a tree measure itself, in a process of its own.

    Raises:
        TreeFailed: it ended with an error; the message ends with what it said last.
    """
    path = os.pathsep.join(filter(None, (str(tree.resolve()), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(Path(__file__).resolve()), str(tree), *given, "--measure"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TreeFailed(f"{tree} could not be measured: {(done.stderr or done.stdout).strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compared(other: Sequence[Sequence[Row]], this: Sequence[Sequence[Row]]) -> list[Row]:
    """Return a row a case: the median of each tree's rounds, and how many times as fast this tree is."""
    rows = []
    for cells in zip(*other, *this, strict=True):
        times = [cell["time_us"] for cell in cells]
        before, after = statistics.median(times[: len(other)]), statistics.median(times[len(other) :])
        facts = {name: value for name, value in cells[0].items() if name != "time_us"}
        spread = max(max(part) / min(part) for part in (times[: len(other)], times[len(other) :]))
        figures = {"other_us": before, "this_us": after, "faster": before / after, "spread": spread}
        rows.append(facts | {name: round(value, 3) for name, value in figures.items()})
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return rows as text."""
    lines = [
        f"{'N x K':>14} {'tokens':>7} {'slices':>7} {'counts':>8} {'other us':>10} {'this us':>10} {'faster':>7} spread"
    ]
    for row in rows:
        size = f"{row['n']} x {row['k']}"
        facts = f"{size:>14} {row['tokens']:>7} {row['slices']:>7} {row['counts']:>8}"
        lines.append(
            f"{facts} {row['other_us']:>10.2f} {row['this_us']:>10.2f} {row['faster']:>7.3f} {row['spread']:.3f}"
        )
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> int:
    """Measure both trees in turn and print what came out."""
    args = arguments(given)
    if args.measure:
        sys.path.insert(0, str(args.other.resolve() / "benchmarks"))
        print(json.dumps(measure(args.shapes, args.cases, args.device)))
        return 0
    options = ["--device", args.device, "--shapes", *("x".join(map(str, size)) for size in args.shapes)]
    options += ["--cases", *(":".join(map(str, what)) for what in args.cases)]
    found: list[tuple[Path, list[list[Row]]]] = [(args.other, []), (HERE, [])]
    try:
        for number in range(args.rounds):
            for tree, rounds in found:
                print(f"round {number + 1} of {args.rounds}: {tree}", file=sys.stderr)
                rounds.append(measured_by(tree, options))
    except TreeFailed as error:
        print(error, file=sys.stderr)
        return 1
    rows = compared(found[0][1], found[1][1])
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
