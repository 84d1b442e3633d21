"""Draw the tables of the documents from the JSON under benchmarks/results, between markers: no number without its row.

    <!-- table: cpu/quality_datafree.json text=wikitext2 columns=budget,achieved_bits,perplexity -->
    (drawn)
    <!-- end table -->

``list=summary`` draws another list of the file than its rows. ``<!-- ablation: h100/quality.json -->`` draws one row a
text and budget, a column a way to route (`ABLATION`) that the file has rows of; ``<!-- rivals: ... -->`` does so with
the packed model beside methods that make a model a width (`RIVALS`), at whole and half bits. ``--check`` writes nothing
and exits 1 where a document differs from its results. A table that cannot be drawn exits 2, and nothing is written.

    python scripts/readme_tables.py [--check]
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import result_files
from result_files import BadResult

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

ORIGIN = ("device", "versions", "commit", "date")  # what is said below every table
CELL = ("text", "method", "budget", "perplexity")  # columns of what `ABLATION` and `RIVALS` choose from
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
        BadResult: there is no such list, no row matches, or a column is in none of them.
    """
    every = result_files.entries(result, of)
    rows = [r for r in every if all(str(r.get(key)) == value for key, value in wanted.items())]
    there = ", ".join(result_files.columns_of(rows or every)) or "none"
    if not rows:
        raise BadResult(f"none of {len(every)} {of} is one where {dict(wanted)}; columns there are {there}")
    missing = [c for c in columns if not any(c in row for row in rows)]
    if missing:
        raise BadResult(f"no row has {', '.join(missing)} where {dict(wanted)}; columns there are {there}")
    lines = [" | ".join(c.replace("_", " ") for c in columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(cell(row.get(c)) for c in columns) for row in rows]
    return _with_origin(lines, result)


def draw_ablation(result: Mapping[str, Any], wanted: Mapping[str, str]) -> str:
    """Return perplexities by text, budget and way to route, with the bits that they took.

    Budgets of fewer than two ways compare nothing and are left out, as are ways without rows.

    Raises:
        BadResult: nothing is left, two rows are of one cell, or the rows are of another benchmark.
    """
    cells = {key: found for key, found in _cells(result, wanted, ABLATION).items() if len(found) > 1}
    if not cells:
        raise BadResult(f"no two ways to route are at one budget where {dict(wanted)}")
    return _with_origin(_pivot(cells, ABLATION), result)


def draw_rivals(result: Mapping[str, Any], wanted: Mapping[str, str]) -> str:
    """Return perplexities of the packed model and of methods that make a model a width, by text and budget.

    Raises:
        BadResult: nothing matches, two rows are of one cell, or the rows are of another benchmark.
    """
    cells = _cells(result, wanted, RIVALS)
    whole = {(text, bits): found for (text, bits), found in cells.items() if bits is None or bits * 2 % 1 == 0}
    if not whole:
        raise BadResult(f"no row of {', '.join(RIVALS)} where {dict(wanted)}")
    return _with_origin(_pivot(whole, RIVALS), result)


def _cells(
    result: Mapping[str, Any], wanted: Mapping[str, str], methods: Mapping[str, str]
) -> dict[tuple[str, float | None], dict[str, str]]:
    """Return what stands in each cell, by text and budget, then by method."""
    cells: dict[tuple[str, float | None], dict[str, str]] = {}
    for row in result_files.entries(result, "rows", CELL):
        if row["method"] not in methods or any(str(row.get(key)) != value for key, value in wanted.items()):
            continue
        found = cells.setdefault((row["text"], row["budget"]), {})
        if row["method"] in found:
            raise BadResult(f"two rows of {row['method']} at {row['budget']} on {row['text']}; say which, by key=value")
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
    """Return a document with every marked table drawn anew.

    Raises:
        BadResult: one cannot be drawn; the message starts with its marker.
    """

    def replace(found: re.Match[str]) -> str:
        try:
            return found[1] + _drawn(found, results) + found[6]
        except BadResult as error:
            raise BadResult(f"{found[1].strip()}: {error}") from error

    return MARKED.sub(replace, text)


def _drawn(found: re.Match[str], results: Path) -> str:
    options = dict(item.split("=", 1) for item in shlex.split(found[4]))
    result = result_files.read(results / found[3], "benchmarks/bench_*.py", ORIGIN)
    if found[2] != "table":
        pivot = draw_ablation if found[2] == "ablation" else draw_rivals
        return pivot(result, options)
    if "columns" not in options:
        raise BadResult("the marker names no columns; wanted columns=a,b of a list's rows")
    columns = options.pop("columns").split(",")
    of, order = options.pop("list", "rows"), options.pop("sort", None)
    if order is not None:
        rows = result_files.entries(result, of, [order])
        result[of] = sorted(rows, key=lambda row: (row[order] is None, row[order]))
    return draw(result, columns, options, of)


def main(given: Sequence[str] | None = None) -> int:
    """Redraw every document, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a document would change")
    check, stale = parser.parse_args(given).check, {}
    for path in documents():
        text = path.read_text(encoding="utf-8")
        try:
            drawn = redraw(text, RESULTS)
        except BadResult as error:
            print(f"{path.relative_to(ROOT)}: {error}", file=sys.stderr)
            return 2
        if drawn != text:
            stale[path] = drawn
    for path, drawn in stale.items():
        if check:
            print(f"{path.relative_to(ROOT)}: its tables differ from benchmarks/results; run `make readme`")
        else:
            path.write_text(drawn, encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
