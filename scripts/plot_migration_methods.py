"""Draw docs/images/migration_methods.svg from a result of benchmarks/bench_migration_methods.py; needs ``plots``.

    python scripts/plot_migration_methods.py [--results FILE] [--out FILE]

A column a pair of widths: above, how many tokens become or stop being outliers; below, how much of the worst tenth both
widths have in common. The same file gives the same picture.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pictures

PICTURE = pictures.Picture(
    pictures.RESULTS / "h100" / "outlier_migration_methods.json",
    pictures.IMAGES / "migration_methods.svg",
    "benchmarks/bench_migration_methods.py",
    ("text", "method", "low_bits", "high_bits", "migrated_tokens", "overlap"),
)
METHODS = {
    "rtn": ("round to nearest, a model a width", "#d9c3a0"),
    "gptq": ("GPTQ, a model a width", "#b0413e"),
    "one count a linear": ("one packed model, no routing", "#8a94a0"),
    "routing": ("one packed model, routed", "#2b6cb0"),
}
FACTS = {"migrated_tokens": "share of tokens that migrate", "overlap": "worst tenth in common"}
GRID = "#d8dee4"


def heights(result: Mapping[str, Any], pair: tuple[int, int], method: str, fact: str) -> dict[str, float]:
    """Return a fact of one method at one pair of widths, by text."""
    rows = [row for row in result["rows"] if (row["low_bits"], row["high_bits"], row["method"]) == (*pair, method)]
    return {row["text"]: row[fact] for row in rows}


def draw_panel(axis: Any, result: Mapping[str, Any], pair: tuple[int, int], fact: str) -> None:
    """Draw one panel: a group of bars a text."""
    width = 0.8 / len(METHODS)
    for number, (method, (label, colour)) in enumerate(METHODS.items()):
        found = heights(result, pair, method, fact)
        places = [index + (number - (len(METHODS) - 1) / 2) * width for index in range(len(found))]
        bars = axis.bar(places, list(found.values()), width * 0.92, color=colour, label=label)
        axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
        axis.set_xticks(range(len(found)), list(found))
    axis.set_title(f"{FACTS[fact]}, {pair[0]} and {pair[1]} bits")
    axis.grid(axis="y", color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)


def draw(result: Mapping[str, Any], out: Path) -> None:
    """Write the picture of a result."""
    pairs = sorted({(row["low_bits"], row["high_bits"]) for row in result["rows"]})
    with pictures.panels(out, (len(FACTS), len(pairs)), (5 * len(pairs), 5.6), {}) as (figure, axes):
        for row, fact in zip(axes, FACTS, strict=True):
            for axis, pair in zip(row, pairs, strict=True):
                draw_panel(axis, result, pair, fact)
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the result file and write the picture."""
    return pictures.run(__doc__, PICTURE, draw, arguments)


if __name__ == "__main__":
    sys.exit(main())
