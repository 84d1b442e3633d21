"""Results as pictures, one function each; the only place that needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mobiquant_compiler.analysis.migration import Migration, TokenErrors, worst
from mobiquant_compiler.analysis.precision import LinearBits, by_layer
from mobiquant_compiler.analysis.quality import ELASTIC, UNQUANTIZED, QualityRow
from mobiquant_compiler.analysis.token_bits import TokenBits
from mobiquant_compiler.errors import PackageMissing

_INK, _MUTED, _GRID = "#1f2328", "#59636e", "#d8dee4"
_WORST_LOW, _WORST_HIGH, _BOTH, _REST = "#d9822b", "#2b6cb0", "#7b2d8b", "#c3ccd5"
_METHODS = {"rtn": ("s", "#8c6d46"), "hqq": ("^", "#d08c2f"), "gptq": ("D", "#b0413e")}
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
}
_FLOOR = 1e-9  # errors below it (a token that nothing moved) are drawn there: the axes are logarithmic


def need_matplotlib() -> None:
    """Refuse to draw where matplotlib is not installed.

    Raises:
        PackageMissing: says how to install it.
    """
    if find_spec("matplotlib") is None:
        what = "a figure (CSV, JSON and HTML do without: --no-png)"
        raise PackageMissing(what=what, package="matplotlib", command="pip install 'mobiquant-compiler[plots]'")


def _canvas(columns: int, width: float, height: float) -> tuple[Any, Any]:
    """Return a figure without a window system, and its axes."""
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=140, metadata={"Software": None})
    return path


def _styled() -> Any:
    need_matplotlib()
    import matplotlib as mpl

    return mpl.rc_context(_STYLE)


def _logarithmic(axis: Any, steps: Sequence[float] = (1, 3)) -> None:
    """Label a logarithmic axis in plain numbers, also where it spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def draw_migration(found: Migration, path: Path, title: str = "") -> Path:
    """Draw every token's error at one budget against that at the other, without routing and with it."""
    with _styled():
        figure, axes = _canvas(2, 10.5, 5.2)
        for panel, low, high, row in zip(axes, found.low, found.high, found.summary(), strict=True):
            _draw_errors(panel, low, high, found.share, row)
        axes[0].legend(loc="upper left", frameon=False, fontsize=8.5)
        limits = [panel.axis() for panel in axes]
        for panel in axes:
            panel.set_xlim(min(box[0] for box in limits), max(box[1] for box in limits))
            panel.set_ylim(min(box[2] for box in limits), max(box[3] for box in limits))
        figure.suptitle(title, fontsize=10, color=_MUTED)
        return _save(figure, path)


def _draw_errors(axes: Any, low: TokenErrors, high: TokenErrors, share: float, row: Mapping[str, Any]) -> None:
    x, y = low.tokens.clamp_min(_FLOOR), high.tokens.clamp_min(_FLOOR)
    at_low, at_high = worst(low.tokens, share), worst(high.tokens, share)
    groups = (
        (~at_low & ~at_high, _REST, "other tokens"),
        (at_low & ~at_high, _WORST_LOW, f"among the worst {share:.0%} at {low.budget:g} bits only"),
        (at_high & ~at_low, _WORST_HIGH, f"at {high.budget:g} bits only"),
        (at_low & at_high, _BOTH, "at both"),
    )
    for chosen, color, label in groups:
        axes.scatter(x[chosen], y[chosen], s=9, color=color, label=label, linewidths=0, alpha=0.75)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        _logarithmic(axis)
    axes.set_xlabel(f"error at {low.budget:g} bits (achieved {low.achieved_bits:.2f}), nats")
    axes.set_ylabel(f"error at {high.budget:g} bits (achieved {high.achieved_bits:.2f}), nats")
    name = "with routing" if low.routed else "without routing"
    axes.set_title(
        f"{name}: {row['overlap']:.0%} of the worst tokens stay\nrank correlation {row['rank_correlation']:.2f}"
    )
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def draw_precision(rows: Sequence[LinearBits], path: Path, title: str = "") -> Path:
    """Draw the average bits of each layer, a line a budget, and of each kind of linear."""
    with _styled():
        from matplotlib import colormaps
        from matplotlib.ticker import MaxNLocator

        figure, (left, right) = _canvas(2, 11.5, 4.6)
        budgets = sorted({row.budget for row in rows}, reverse=True)
        colors = colormaps["viridis"]
        kinds = list(dict.fromkeys(row.kind for row in rows))
        layers = by_layer(rows)
        for number, budget in enumerate(budgets):
            color = colors(0.1 + 0.75 * number / max(1, len(budgets) - 1))
            points = [
                (row["layer"], row["bits"]) for row in layers if row["budget"] == budget and row["layer"] is not None
            ]
            left.plot(*zip(*points, strict=True), "o-", markersize=3.5, color=color, label=f"budget {budget:g}")
            left.axhline(budget, color=color, linewidth=0.7, linestyle=":")
            width = 0.8 / len(budgets)
            places = [i + (number - (len(budgets) - 1) / 2) * width for i in range(len(kinds))]
            right.bar(places, [_mean_bits(rows, budget, kind) for kind in kinds], 0.9 * width, color=color)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.set_xlabel("layer")
        left.set_ylabel("average weight bits of its tokens")
        left.set_title("by layer (dotted: the budget)")
        left.legend(frameon=False, fontsize=8.5, ncols=2)
        right.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
        right.set_title("by kind of linear")
        for axes in (left, right):
            axes.set_ylim(0, None)
            axes.grid(axis="y", color=_GRID, linewidth=0.6, zorder=0)
            axes.set_axisbelow(True)
        figure.suptitle(title, fontsize=10, color=_MUTED)
        return _save(figure, path)


def _mean_bits(rows: Sequence[LinearBits], budget: float, kind: str) -> float:
    chosen = [r for r in rows if r.budget == budget and r.kind == kind and r.bits == r.bits]
    weight = sum(r.parameters for r in chosen)
    return sum(r.bits * r.parameters for r in chosen) / weight if weight else 0.0


def draw_curve(rows: Sequence[QualityRow], path: Path, title: str = "") -> Path:
    """Draw perplexity against achieved bits: the elastic model as a line, static methods as points."""
    with _styled():
        figure, axes = _canvas(1, 7.6, 5.0)
        ours = sorted((r.achieved_bits, r.perplexity) for r in rows if r.method == ELASTIC and r.achieved_bits)
        if ours:
            axes.plot(*zip(*ours, strict=True), "o-", color=_WORST_HIGH, label="one elastic model", zorder=3)
        for method in dict.fromkeys(r.method for r in rows if r.method not in (ELASTIC, UNQUANTIZED)):
            chosen = [r for r in rows if r.method == method]
            marker, color = _METHODS.get(method, ("x", _MUTED))
            values = [r.budget for r in chosen], [r.perplexity for r in chosen]
            label = f"{method}, one model a width ({chosen[0].implementation})"
            axes.scatter(*values, marker=marker, s=46, color=color, label=label, zorder=4)
        for row in rows:
            if row.method == UNQUANTIZED:
                axes.axhline(
                    row.perplexity, color=_INK, linewidth=1, linestyle="--", label=f"unquantized {row.perplexity:.2f}"
                )
        axes.set_yscale("log")
        _logarithmic(axes.yaxis, (1, 1.5, 2, 3, 5, 7))
        axes.set_xlabel("average weight bits per token, achieved")
        axes.set_ylabel("perplexity")
        axes.set_title(title)
        axes.grid(color=_GRID, linewidth=0.6, which="both", zorder=0)
        axes.legend(frameon=False, fontsize=8.5)
        return _save(figure, path)


def draw_tokens(found: TokenBits, path: Path, title: str = "") -> Path:
    """Draw the slice counts of every token (across) in every layer (down)."""
    with _styled():
        figure, axes = _canvas(1, 11.0, 4.6)
        picture = axes.imshow(
            found.counts.t().numpy(),
            aspect="auto",
            interpolation="nearest",
            cmap="viridis",
            vmin=1,
            vmax=found.num_slices,
        )
        figure.colorbar(picture, label="mean slice count")
        axes.set_xlabel("token")
        axes.set_ylabel("layer")
        step = max(1, len(found.layers) // 12)
        axes.set_yticks(range(0, len(found.layers), step), found.layers[::step])
        axes.set_title(title)
        return _save(figure, path)
