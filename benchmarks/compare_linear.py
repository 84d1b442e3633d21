"""One elastic linear in this tree and in others, side by side on one GPU: what did a change do to its times?

    git worktree add ../before HEAD~1
    python benchmarks/compare_linear.py ../before --shapes 14336x4096 8192x8192 --cases 8:2:mixed 1:2

A case is ``tokens:slices``, or ``tokens:slices:mixed`` for tokens of different slice counts up to that one. Each tree
is measured by processes of its own, by its own benchmark code, in turn and several times, on one machine: times of two
machines, or of two days, differ by more than most changes. Results are checked before they are timed. A round of all
trees at once, whose times are thrown away, comes first: kernels of all are compiled together.
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
    parser.add_argument("others", nargs="+", type=Path, help="roots of other checkouts")
    parser.add_argument("--shapes", nargs="+", type=shape, default=[(4096, 4096), (14336, 4096), (8192, 8192)])
    parser.add_argument(
        "--cases", nargs="+", type=case, default=[(1, 2, "uniform"), (8, 2, "mixed"), (1024, 4, "mixed")]
    )
    parser.add_argument("--rounds", type=int, default=2, help="times that each tree is measured")
    parser.add_argument("--device", default="cuda", help="cpu wants TRITON_INTERPRET=1, and minutes a case")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    if args.rounds < 1:
        parser.error(f"--rounds: got {args.rounds}, wanted at least 1")
    for other in args.others:
        if not (other / "benchmarks" / "linear_ours.py").is_file():
            parser.error(f"{other} is no checkout: it has no benchmarks/linear_ours.py")
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


def measured_by(trees: Sequence[Path], given: Sequence[str]) -> list[list[Row]]:
    """Have trees measure themselves, each in a process of its own, all at the same time.

    Raises:
        TreeFailed: one ended with an error; the message ends with what it said last.
    """
    started: list[tuple[Path, subprocess.Popen[str]]] = []
    try:
        for tree in trees:
            started.append((tree, _measuring(tree, given)))
        ended = [(tree, *process.communicate(), process.returncode) for tree, process in started]
    finally:
        for _, process in started:  # one that was interrupted leaves none on the GPU
            process.kill()
            process.wait()
    for tree, said, complained, code in ended:
        if code:
            raise TreeFailed(f"{tree} could not be measured: {(complained or said).strip()[-500:]}")
    return [json.loads(said.splitlines()[-1]) for _, said, _, _ in ended]


def _measuring(tree: Path, given: Sequence[str]) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, (str(tree.resolve()), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(Path(__file__).resolve()), str(tree), *given, "--measure"]
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def compared(rounds: Sequence[tuple[str, Sequence[Sequence[Row]]]]) -> list[Row]:
    """Return a row a case: the median of each tree's rounds, and how many times as fast as others the last tree is.

    Args:
        rounds: By tree its name and what it measured in each round.

    Returns:
        Facts of the case, ``times_us`` and ``faster`` by tree, and ``spread``: the slowest round over the fastest of
        the tree where they differ most.
    """
    rows = []
    by_case = [zip(*own, strict=True) for _, own in rounds]
    for cells in zip(*by_case, strict=True):
        cell = cells[0][0]
        times = {name: [row["time_us"] for row in own] for (name, _), own in zip(rounds, cells, strict=True)}
        medians = {name: statistics.median(own) for name, own in times.items()}
        last = medians[rounds[-1][0]]
        facts = {name: value for name, value in cell.items() if name != "time_us"}
        facts["times_us"] = {name: round(value, 3) for name, value in medians.items()}
        facts["faster"] = {name: round(value / last, 3) for name, value in medians.items()}
        rows.append(facts | {"spread": round(max(max(own) / min(own) for own in times.values()), 3)})
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return rows as text: microseconds of each tree, and how many times as fast as the first the last is."""
    names = list(rows[0]["times_us"])
    wide = [max(10, len(name)) for name in names]
    heads = " ".join(f"{name:>{size}}" for name, size in zip(names, wide, strict=True))
    lines = [f"{'N x K':>14} {'tokens':>7} {'slices':>7} {'counts':>8} {heads} {'faster':>7} spread"]
    for row in rows:
        size = f"{row['n']} x {row['k']}"
        facts = f"{size:>14} {row['tokens']:>7} {row['slices']:>7} {row['counts']:>8}"
        times = " ".join(f"{us:>{size}.2f}" for us, size in zip(row["times_us"].values(), wide, strict=True))
        lines.append(f"{facts} {times} {row['faster'][names[0]]:>7.3f} {row['spread']:.3f}")
    return "\n".join(lines)


def names_of(trees: Sequence[Path]) -> list[str]:
    """Return the trees' folders, or their whole paths where folders have one name; a tree that comes again is counted.

    A tree beside itself shows what differences mean nothing.
    """
    names = [tree.resolve().name for tree in trees]
    if len(set(names)) < len({tree.resolve() for tree in trees}):
        names = [str(tree.resolve()) for tree in trees]
    seen = [names[:place].count(name) for place, name in enumerate(names)]
    return [name if before == 0 else f"{name} ({before + 1})" for name, before in zip(names, seen, strict=True)]


def _compile_all(trees: Sequence[Path], options: Sequence[str]) -> None:
    print(f"all {len(trees)} trees at once, to compile", file=sys.stderr)
    try:
        measured_by(trees, options)
    except TreeFailed as error:  # perhaps for want of memory: one by one they may have enough
        print(f"{error}\ngoing on with one at a time", file=sys.stderr)


def main(given: Sequence[str] | None = None) -> int:
    """Measure all trees in turn and print what came out."""
    args = arguments(given)
    if args.measure:
        sys.path.insert(0, str(args.others[0].resolve() / "benchmarks"))
        print(json.dumps(measure(args.shapes, args.cases, args.device)))
        return 0
    options = ["--device", args.device, "--shapes", *("x".join(map(str, size)) for size in args.shapes)]
    options += ["--cases", *(":".join(map(str, what)) for what in args.cases)]
    trees = [*args.others, HERE]
    found: list[list[list[Row]]] = [[] for _ in trees]
    try:
        _compile_all(trees, options)
        for number in range(args.rounds):
            for tree, rounds in zip(trees, found, strict=True):
                print(f"round {number + 1} of {args.rounds}: {tree}", file=sys.stderr)
                rounds += measured_by([tree], options)
    except TreeFailed as error:
        print(error, file=sys.stderr)
        return 1
    rows = compared(list(zip(names_of(trees), found, strict=True)))
    print(json.dumps(rows, indent=1) if args.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
