"""Draw docs/images/quality_h100.svg from a result of benchmarks/bench_quality.py; needs the extra ``plots``.

    python scripts/plot_quality.py [--results FILE] [--out FILE]

A panel a text: perplexity of the one packed model against average weight bits, and methods that make a model a width as
points. The same file gives the same picture.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKED = "calibrated slices, trained router per input"
LINES = {
    PACKED: ("one packed model, routed", "#2b6cb0", "-"),
    "calibrated slices, best static count per linear": ("same slices, best static count per linear", "#8a94a0", "--"),
}
POINTS = {"GPTQ": ("D", "#b0413e"), "HQQ": ("^", "#d08c2f"), "round to nearest": ("s", "#8c6d46")}
MOST = 12.0  # times the unquantized perplexity: what is above is broken, and not drawn
MUTED, GRID = "#59636e", "#d8dee4"


def series(result: Mapping[str, Any], text: str, method: str) -> list[tuple[float, float]]:
    """Return (bits, perplexity) of one method on one text, by rising bits."""
    rows = [row for row in result["rows"] if row["text"] == text and row["method"] == method]
    return sorted((row["achieved_bits"], row["perplexity"]) for row in rows)


def draw_text(axis: Any, result: Mapping[str, Any], text: str) -> None:
    """Draw one panel."""
    reference = next(r["perplexity"] for r in result["rows"] if r["text"] == text and r["method"] == "unquantized")
    axis.axhline(reference, color=MUTED, linewidth=0.8, linestyle=":", label="unquantized")
    for method, (label, colour, style) in LINES.items():
        found = series(result, text, method)
        if found:
            axis.plot(*zip(*found, strict=True), style, color=colour, linewidth=1.8, label=label)
    for method, (marker, colour) in POINTS.items():
        found = [(bits, value) for bits, value in series(result, text, method) if value < MOST * reference]
        if found:
            axis.plot(*zip(*found, strict=True), marker, color=colour, markersize=6, label=f"{method}, a model a width")
    axis.set_yscale("log")
    axis.set_title(text)
    axis.set_xlabel("average weight bits")
    ticks = [reference * factor for factor in (1, 1.5, 2, 3, 5, 10)]
    axis.set_yticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the result file and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "h100" / "quality.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "quality_h100.svg")
    args = parser.parse_args(arguments)
    try:
        result = json.loads(args.results.read_text(encoding="utf-8"))
    except OSError as error:
        print(
            f"{args.results}: {os.strerror(error.errno or 0)}; measure first: benchmarks/bench_quality.py --calibrate"
        )
        return 2
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    texts = list(dict.fromkeys(row["text"] for row in result["rows"]))
    styled = {"svg.hashsalt": "mobiquant", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with mpl.rc_context({**styled, "axes.edgecolor": GRID, "axes.titlelocation": "left"}):
        figure = Figure(figsize=(3.6 * len(texts), 3.7), facecolor="white", layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(1, len(texts), squeeze=False)[0]
        for axis, text in zip(axes, texts, strict=True):
            draw_text(axis, result, text)
        axes[0].set_ylabel("perplexity")
        figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.out, metadata={"Date": None})
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
