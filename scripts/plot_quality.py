"""Draw docs/images/quality_h100.svg from a result of benchmarks/bench_quality.py; needs the extra ``plots``.

    python scripts/plot_quality.py [--results FILE] [--out FILE]

A panel a text: perplexity of the one packed model against average weight bits, and methods that make a model a width as
points. The same file gives the same picture.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pictures

PICTURE = pictures.Picture(
    pictures.RESULTS / "h100" / "quality.json",
    pictures.IMAGES / "quality_h100.svg",
    "benchmarks/bench_quality.py --calibrate",
    ("text", "method", "achieved_bits", "perplexity"),
)
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


def draw(result: Mapping[str, Any], out: Path) -> None:
    """Write the picture of a result."""
    texts = list(dict.fromkeys(row["text"] for row in result["rows"]))
    style = {"axes.edgecolor": GRID, "axes.titlelocation": "left"}
    with pictures.panels(out, (1, len(texts)), (3.6 * len(texts), 3.7), style) as (figure, (axes,)):
        for axis, text in zip(axes, texts, strict=True):
            draw_text(axis, result, text)
        axes[0].set_ylabel("perplexity")
        figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the result file and write the picture."""
    return pictures.run(__doc__, PICTURE, draw, arguments)


if __name__ == "__main__":
    sys.exit(main())
