"""What the scripts that draw results have in common: their command line, reading, and figures of panels as SVG."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
STYLE = {"svg.hashsalt": "mobiquant", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def run(
    about: str | None,
    paths: tuple[Path, Path],
    measured_by: str,
    draw: Callable[[Mapping[str, Any], Path], None],
    arguments: Sequence[str] | None,
) -> int:
    """Read a result file and have its picture written; returns the exit code.

    Args:
        about: The script's docstring.
        paths: Where the result is and where the picture goes, if the command line names nothing else.
        measured_by: What to run where there is no result yet.
        draw: Writes the picture of a result to a path, whose folder is there.
        arguments: The command line; None is that of the process.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=paths[0])
    parser.add_argument("--out", type=Path, default=paths[1])
    args = parser.parse_args(arguments)
    try:
        result = json.loads(args.results.read_text(encoding="utf-8"))
    except OSError as error:
        print(f"{args.results}: {os.strerror(error.errno or 0)}; measure first: {measured_by}")
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(result, args.out)
    print(f"wrote {args.out}")
    return 0


@contextmanager
def panels(out: Path, shape: tuple[int, int], size: tuple[float, float], style: Mapping[str, Any]) -> Iterator[Any]:
    """Yield a figure and its axes, rows by columns, and write it as SVG; the same drawing gives the same file.

    Args:
        out: Where to.
        shape: Rows and columns of panels.
        size: Width and height in inches.
        style: Settings of matplotlib beside `STYLE`.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({**STYLE, **style}):
        figure = Figure(figsize=size, facecolor="white", layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.subplots(*shape, squeeze=False)
        figure.savefig(out, metadata={"Date": None})
