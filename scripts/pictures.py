"""What the scripts that draw results have in common: their command line, reading, and figures of panels as SVG."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import result_files
from result_files import BadResult

ROOT = Path(__file__).resolve().parent.parent
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
STYLE = {"svg.hashsalt": "mobiquant", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of the documents, and what it is drawn from.

    Attributes:
        results: The result file, if the command line names no other.
        out: Where the picture goes, if the command line names no other place.
        measured_by: What writes such result files.
        columns: Those that each row must have.
        facts: What else the file must have.
        kinds: Suffixes of files that can be drawn.
    """

    results: Path
    out: Path
    measured_by: str
    columns: tuple[str, ...]
    facts: tuple[str, ...] = ()
    kinds: tuple[str, ...] = (".svg", ".png", ".pdf")

    def file(self, text: str) -> Path:
        """Return where a command line wants the picture.

        Raises:
            ArgumentTypeError: nothing can be written there, or its suffix is none of `kinds`.
        """
        path = result_files.output(text, self.out.name)
        if path.suffix not in self.kinds:
            ends = " or ".join(self.kinds)
            raise argparse.ArgumentTypeError(f"{text} names no kind of picture; wanted {ends} at its end")
        return path


def run(
    about: str | None,
    picture: Picture,
    draw: Callable[[Mapping[str, Any], Path], None],
    arguments: Sequence[str] | None,
) -> int:
    """Read a result file and have its picture written; returns the exit code.

    Args:
        about: The script's docstring.
        picture: What is drawn, of what.
        draw: Writes the picture of a result to a path, whose folder is there; may raise `BadResult`.
        arguments: The command line; None is that of the process.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=picture.results, metavar="FILE")
    parser.add_argument("--out", type=picture.file, default=picture.out, metavar="FILE")
    args = parser.parse_args(arguments)
    try:
        result = result_files.read(args.results, picture.measured_by, picture.facts, {"rows": picture.columns})
        _draw(result, args.results, args.out, draw)
    except BadResult as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {args.out}")
    return 0


def _draw(result: Mapping[str, Any], source: Path, out: Path, draw: Callable[[Mapping[str, Any], Path], None]) -> None:
    if not result["rows"]:
        raise BadResult(f"{source}: it has no rows, so there is nothing to draw; measure again")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        draw(result, out)
    except BadResult as error:
        raise BadResult(f"{source}: {error}") from error


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
