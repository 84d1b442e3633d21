"""Draw docs/images/linear_h100.svg from a result file of benchmarks/bench_linear.py; needs the extra ``plots``.

    python scripts/plot_linear.py [--results benchmarks/results/h100/linear.json] [--out docs/images/linear_h100.svg]

Above, speed-ups over bf16 on one token; below, time against tokens for one shape. The same file gives the same picture.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pictures

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

PICTURE = pictures.Picture(
    pictures.RESULTS / "h100" / "linear.json",
    pictures.IMAGES / "linear_h100.svg",
    "benchmarks/bench_linear.py",
    ("n", "k", "tokens", "slices", "counts", "activation", "layout", "time_us", "total_us", "bf16_us"),
    ("device", "versions", "date"),
)
INK, MUTED, GRID = "#1f2328", "#59636e", "#d8dee4"
OURS = ("#08519c", "#3182bd", "#6baed6", "#a6cee8")  # 1, 2, 3 and 4 slices
RIVALS = {
    "tinygemm4": ("tinygemm, 4 bits", "#8c6d46"),
    "gemlite4": ("GemLite, 4 bits", "#d08c2f"),
    "gemlite2": ("GemLite, 2 bits", "#f1c27d"),
}
STYLE = {
    "svg.hashsalt": "mobiquant",  # identifiers in the file are otherwise random
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

Row = Mapping[str, Any]


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Return the rows of the default activation and layout that have these values and a time."""
    wanted = {"activation": "a16", "layout": "slice_major", **wanted}
    return [r for r in rows if r.get("time_us") and all(r.get(key) == value for key, value in wanted.items())]


def shapes_of(rows: Iterable[Row]) -> list[tuple[int, int]]:
    """Return the shapes, the smallest first."""
    return sorted({(r["n"], r["k"]) for r in rows}, key=lambda s: (s[0] * s[1], s[0]))


def value(rows: Sequence[Row], compute: Callable[[Row], float | None], **wanted: Any) -> float | None:
    """Return what the first matching row gives, None without one."""
    found = select(rows, **wanted)
    return compute(found[0]) if found else None


def over_bf16(row: Row, key: str) -> float | None:
    """Return how many times as fast as bf16 a time of a row is."""
    return row["bf16_us"] / row[key] if row.get("bf16_us") and row.get(key) else None


def draw_bars(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw groups of bars: speed-up over bf16 on one token, for each shape."""
    shapes = shapes_of(rows)
    series = [(label, color, 2, f"{name}_us") for name, (label, color) in RIVALS.items()]
    series += [(f"ours, {s} slice{'s' * (s > 1)} ({2 * s} bits)", OURS[s - 1], s, "time_us") for s in (1, 2, 3, 4)]
    width = 0.82 / len(series)
    highest = 1.0
    for number, (label, color, slices, key) in enumerate(series):
        wanted = {"tokens": 1, "slices": slices, "counts": "uniform"}
        heights = [value(rows, lambda r, key=key: over_bf16(r, key), n=n, k=k, **wanted) for n, k in shapes]
        places = [i + (number - (len(series) - 1) / 2) * width for i in range(len(shapes))]
        axes.bar(places, [h or 0.0 for h in heights], 0.92 * width, label=label, color=color, zorder=2)
        for place, height in zip(places, heights, strict=True):
            if height is not None:
                axes.text(place, height + 0.05, f"{height:.1f}", ha="center", va="bottom", fontsize=6.5, color=MUTED)
                highest = max(highest, height)
    axes.axhline(1, color=INK, linewidth=0.9, zorder=3, label="cuBLAS bf16")
    axes.set_xticks(range(len(shapes)), [f"{n} x {k}" for n, k in shapes])
    axes.set_xlim(-0.52, len(shapes) - 0.48)
    axes.set_ylim(0, 1.28 * highest)
    axes.set_ylabel("times as fast as bf16")
    axes.set_title("One token: speed of the multiplication, output rows x input columns", loc="left", fontsize=11)
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    names = ["cuBLAS bf16", *(label for label, *_ in series)]  # filled column by column: ours under the others
    order = [name for pair in zip(names[:4], names[4:], strict=True) for name in pair]
    style = {"ncols": 4, "frameon": False, "fontsize": 8.5, "columnspacing": 1.8, "handlelength": 1.2}
    axes.legend([entries[name] for name in order], order, loc="upper left", **style)
    axes.grid(axis="y", color=GRID, linewidth=0.7, zorder=0)
    axes.tick_params(length=0)


def _line(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    points = sorted({r["tokens"]: r[key] for r in rows if r.get(key)}.items())
    return [t for t, _ in points], [us for _, us in points]


def draw_lines(axes: Axes, rows: Sequence[Row], shape: tuple[int, int]) -> None:
    """Draw the time of the whole linear against the number of tokens, both logarithmic."""
    here = select(rows, n=shape[0], k=shape[1])
    uniform = [r for r in here if r["slices"] == 2 and r["counts"] == "uniform"]
    mixed = [r for r in here if r["slices"] == 4 and r["counts"] == "mixed"]
    styles = [("cuBLAS bf16", uniform, "bf16_us", INK, "-", "o")]
    styles += [(label, uniform, f"{name}_us", color, "-", "o") for name, (label, color) in RIVALS.items()]
    styles += [("ours, 2 slices", uniform, "total_us", OURS[0], "-", "o")]
    styles += [("ours, 1 to 4 slices mixed", mixed, "total_us", OURS[1], "--", "s")]
    ticks: set[int] = set()
    for label, chosen, key, color, line, marker in styles:
        tokens, times = _line(chosen, key)
        ticks |= set(tokens)
        width = 2.0 if key == "total_us" else 1.4
        axes.plot(tokens, times, line, marker=marker, markersize=3.8, color=color, linewidth=width, label=label)
    if not ticks:
        wanted = "activation a16, layout slice_major, counts uniform with 2 slices or mixed with 4"
        raise pictures.BadResult(f"no row of {shape[0]} x {shape[1]} has a time; wanted some of {wanted}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted(ticks), [str(t) for t in sorted(ticks)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda us, _: f"{us:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens")
    axes.set_ylabel("µs")
    title = f"{shape[0]} x {shape[1]}: time of the linear, ours with its quantizing and, up to 64 tokens, routing"
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(loc="upper left", frameon=False, fontsize=8.5)
    axes.grid(color=GRID, linewidth=0.7, zorder=0)
    axes.tick_params(length=0, which="both")


def draw(result: Mapping[str, Any], out: Path, shape: tuple[int, int] | None = None) -> None:
    """Write the picture of a result; the kind of file follows from the suffix.

    Args:
        result: What bench_linear.py wrote.
        out: Where to.
        shape: Of the lower part; None takes the largest.

    Raises:
        BadResult: no time of that shape is there to draw.
    """
    rows = result["rows"]
    with mpl.rc_context(STYLE):
        figure, (above, below) = plt.subplots(2, 1, figsize=(9.6, 8.4), height_ratios=(1, 1.05))
        draw_bars(above, rows)
        draw_lines(below, rows, shape or shapes_of(rows)[-1])
        versions = result["versions"]
        where = f"{result['device']}; torch {versions['torch']}, triton {versions['triton']}; {result['date']}"
        figure.text(0.995, 0.006, where, ha="right", va="bottom", fontsize=7, color=MUTED)
        figure.tight_layout(rect=(0, 0.018, 1, 1), h_pad=2.2)
        out.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None, "Creator": None} if out.suffix == ".svg" else None
        figure.savefig(out, dpi=140, metadata=metadata, facecolor="white")
        plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the result file and write the picture."""
    return pictures.run(__doc__, PICTURE, draw, arguments)


if __name__ == "__main__":
    sys.exit(main())
