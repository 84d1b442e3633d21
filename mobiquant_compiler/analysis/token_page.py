"""A text coloured by the bits of its tokens, as one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import torch

from mobiquant_compiler.analysis.token_bits import TokenBits

SHADES = 8
TAIL = 0.02  # share of tokens at either end that do not stretch the scale: the first of a text is often far off
_LIGHT = ("#f4f8fb", "#e0ecf5", "#cbdff0", "#b1d0e8", "#93bfe0", "#74add6", "#559acb", "#3c88bf")
_DARK = ("#1b232b", "#1c2a37", "#1d3345", "#1f3d56", "#214768", "#23527a", "#255d8c", "#27689e")
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.9 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #14181c; background: #ffffff; }
h1 { font-size: 1.25rem; margin-bottom: .25rem; }
p, table { line-height: 1.5; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; border-top: 1px solid #8885; border-bottom: 1px solid #8885;
  padding: 1rem 0; }
.text span { border-radius: 3px; padding: .1em 0; }
.text span:hover { outline: 2px solid currentColor; }
.key { display: inline-block; padding: 0 .6em; margin-right: 2px; border-radius: 3px; font-size: .85rem; }
table { border-collapse: collapse; font-size: .85rem; }
td, th { text-align: right; padding: .1rem .8rem; border-bottom: 1px solid #8885; font-variant-numeric: tabular-nums; }
.note { font-size: .85rem; opacity: .8; }
"""


def _shades() -> str:
    light = "\n".join(f".s{i} {{ background: {color}; }}" for i, color in enumerate(_LIGHT))
    dark = "\n".join(f"  .s{i} {{ background: {color}; }}" for i, color in enumerate(_DARK))
    body = "  body { color: #e8ecf0; background: #12161a; }"
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{body}\n{dark}\n}}"


def shade(bits: float, low: float, high: float) -> int:
    """Return which of the shades stands for `bits`; the first is for `low` and less, the last for `high` and more."""
    if high <= low:
        return 0
    return max(0, min(SHADES - 1, int((bits - low) / (high - low) * SHADES)))


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return each token as text; bytes of a character that spans tokens show as a replacement character."""
    return [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in ids]


def token_page(found: TokenBits, texts: Sequence[str], title: str) -> str:
    """Return the page.

    Args:
        found: Slice counts by token and layer.
        texts: The tokens as text [T]; escaped here.
        title: What model and text these are; escaped here.
    """
    bits = found.bits.tolist()
    low, high = torch.quantile(found.bits.double(), torch.tensor([TAIL, 1 - TAIL], dtype=torch.float64)).tolist()
    spans = [
        _token(text, value, counts, found.layers, shade(value, low, high))
        for text, value, counts in zip(texts, bits, found.counts.tolist(), strict=True)
    ]
    mean = sum(bits) / len(bits)
    head = (
        f"<p>Budget {found.budget:g} bits; achieved {mean:.2f} on these {len(bits)} tokens, {min(bits):.2f} "
        f"to {max(bits):.2f} each. The darker the blue (in dark mode: the brighter), the more bits a token used, "
        "averaged over all linears weighted by their parameters.</p>"
    )
    note = "Hover over a token for its mean slice count in each layer."
    if found.left_out:
        note += f" Left out: {', '.join(found.left_out)}."
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}{_shades()}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{head}\n"
        f'<p>{_legend(low, high)}</p>\n<div class="text">{"".join(spans)}</div>\n'
        f'<p class="note">{escape(note)}</p>\n{_layers(found)}\n</body>\n</html>\n'
    )


def _token(text: str, bits: float, counts: Sequence[float], layers: Sequence[str], number: int) -> str:
    lines = [f"{bits:.2f} bits", *(f"layer {name}: {count:.2f}" for name, count in zip(layers, counts, strict=True))]
    tip = escape("\n".join(lines)).replace("\n", "&#10;")
    return f'<span class="s{number}" title="{tip}">{escape(text)}</span>'


def _legend(low: float, high: float) -> str:
    if high <= low:
        return f'<span class="key s0">{low:.2f} bits</span>'
    step = (high - low) / SHADES
    keys = [f"{low + i * step:.2f} - {low + (i + 1) * step:.2f}" for i in range(1, SHADES - 1)]
    keys = [f"up to {low + step:.2f}", *keys, f"from {high - step:.2f}"]
    return "".join(f'<span class="key s{i}">{text}</span>' for i, text in enumerate(keys)) + " bits"


def _layers(found: TokenBits) -> str:
    means = found.counts.mean(0).tolist()
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{mean:.2f}</td></tr>" for name, mean in zip(found.layers, means, strict=True)
    )
    return f"<table><tr><th>layer</th><th>mean slice count of {found.num_slices}</th></tr>{rows}</table>"
