"""Draw the tables of the documents from the JSON under benchmarks/results, between markers: no number without its row.

    <!-- table: cpu/quality_datafree.json text=wikitext2 columns=budget,achieved_bits,perplexity -->
    (drawn)
    <!-- end table -->

``list=summary`` draws another list of the file than its rows. ``<!-- ablation: h100/quality.json -->`` draws one row a
text and budget, a column a way to route (`ABLATION`) that the file has rows of; ``<!-- rivals: ... -->`` does so with
the packed model beside methods that make a model a width (`RIVALS`), at whole and half bits. ``--check`` writes nothing
and exits 1 where a document differs from its results.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(
    r"""(<!-- (table|ablation|rivals): (\S+)((?: \w+=(?:"[^"]*"|\S+))*) -->\n)(.*?)(<!-- end table -->)""", re.DOTALL
)
ABLATION = {  # method in the rows of bench_quality.py -> heading
    "calibrated slices, one count for all": "no routing: one count for all",
    "calibrated slices, best static count per linear": "best static count per linear",
    "calibrated slices, energy router per linear": "data-free router, per linear",
    "calibrated slices, energy router per input": "data-free router, per input",
    "calibrated slices, trained router per linear": "trained router, per linear",
    "calibrated slices, trained router per input": "trained router, per input",
}

RIVALS = {
    "unquantized": "unquantized",
    "calibrated slices, trained router per input": "one packed model",
    "GPTQ": "GPTQ",
    "HQQ": "HQQ",
    "round to nearest": "round to nearest",
}


def documents() -> list[Path]:
    """Return the files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def cell(value: Any) -> str:
    """Write a value: four digits of a number, yes or no, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return str(value)


def draw(result: Mapping[str, Any], columns: Sequence[str], wanted: Mapping[str, str], of: str = "rows") -> str:
    """Return the rows that match, of one list, as a Markdown table, with where they were measured.

    Raises:
        ValueError: no row matches, or a column is in none of them.
    """
    rows = [r for r in result[of] if all(str(r.get(key)) == value for key, value in wanted.items())]
    missing = [c for c in columns if not any(c in row for row in rows)]
    if missing:
        raise ValueError(f"no row has {', '.join(missing)} where {dict(wanted)}")
    lines = [" | ".join(c.replace("_", " ") for c in columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(cell(row.get(c)) for c in columns) for row in rows]
    return _with_origin(lines, result)


def draw_ablation(result: Mapping[str, Any], wanted: Mapping[str, str]) -> str:
    """Return perplexities by text, budget and way to route, with the bits that they took.

    Budgets of fewer than two ways compare nothing and are left out, as are ways without rows.

    Raises:
        ValueError: nothing is left, or two rows are of one cell.
    """
    cells = {key: found for key, found in _cells(result, wanted, ABLATION).items() if len(found) > 1}
    if not cells:
        raise ValueError(f"no two ways to route are at one budget where {dict(wanted)}")
    return _with_origin(_pivot(cells, ABLATION), result)


def draw_rivals(result: Mapping[str, Any], wanted: Mapping[str, str]) -> str:
    """Return perplexities of the packed model and of methods that make a model a width, by text and budget.

    Raises:
        ValueError: nothing matches, or two rows are of one cell.
    """
    cells = _cells(result, wanted, RIVALS)
    whole = {(text, bits): found for (text, bits), found in cells.items() if bits is None or bits * 2 % 1 == 0}
    if not whole:
        raise ValueError(f"no row of {', '.join(RIVALS)} where {dict(wanted)}")
    return _with_origin(_pivot(whole, RIVALS), result)


def _cells(
    result: Mapping[str, Any], wanted: Mapping[str, str], methods: Mapping[str, str]
) -> dict[tuple[str, float | None], dict[str, str]]:
    """Return what stands in each cell, by text and budget, then by method."""
    cells: dict[tuple[str, float | None], dict[str, str]] = {}
    for row in result["rows"]:
        if row["method"] not in methods or any(str(row.get(key)) != value for key, value in wanted.items()):
            continue
        found = cells.setdefault((row["text"], row["budget"]), {})
        if row["method"] in found:
            raise ValueError(
                f"two rows of {row['method']} at {row['budget']} on {row['text']}; say which, by key=value"
            )
        bits = row.get("achieved_bits")
        off = "" if bits is None or isinstance(bits, int) else f" ({bits:.2f})"
        found[row["method"]] = cell(row["perplexity"]) + off
    return cells


def _pivot(cells: Mapping[tuple[str, float | None], Mapping[str, str]], methods: Mapping[str, str]) -> list[str]:
    """Return the lines of a table: a row a text and budget, no budget and the most bits first; a column a method."""
    shown = [method for method in methods if any(method in found for found in cells.values())]
    texts = list(dict.fromkeys(text for text, _ in cells))
    lines = [
        " | ".join(("text", "budget", *(methods[m] for m in shown))),
        " | ".join("---" for _ in (0, 0, *shown)),
    ]
    for text, budget in sorted(cells, key=lambda key: (texts.index(key[0]), -(key[1] or float("inf")))):
        found = cells[text, budget]
        lines.append(" | ".join((text, cell(budget), *(found.get(m, "-") for m in shown))))
    return lines


def _with_origin(lines: Sequence[str], result: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    head, plus, changes = result["commit"].partition("+")
    where = f"{result['device']}; {versions}; commit {head[:10]}{plus}{changes}, {result['date']}"
    return "\n".join(f"| {line} |" for line in lines) + f"\n\n<sub>{where}</sub>\n"


def redraw(text: str, results: Path = RESULTS) -> str:
    """Return a document with every marked table drawn anew."""

    def replace(found: re.Match[str]) -> str:
        options = dict(item.split("=", 1) for item in shlex.split(found[4]))
        result = json.loads((results / found[3]).read_text(encoding="utf-8"))
        if found[2] != "table":
            pivot = draw_ablation if found[2] == "ablation" else draw_rivals
            return found[1] + pivot(result, options) + found[6]
        columns = options.pop("columns").split(",")
        of, order = options.pop("list", "rows"), options.pop("sort", None)
        if order is not None:
            result[of].sort(key=lambda row: row[order])
        return found[1] + draw(result, columns, options, of) + found[6]

    return MARKED.sub(replace, text)


def main(arguments: Sequence[str]) -> int:
    """Redraw every document, or check it."""
    stale = 0
    for path in documents():
        text = path.read_text(encoding="utf-8")
        drawn = redraw(text)
        if "--check" not in arguments:
            path.write_text(drawn, encoding="utf-8")
        elif drawn != text:
            print(f"{path.relative_to(ROOT)}: its tables differ from benchmarks/results; run `make readme`")
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
