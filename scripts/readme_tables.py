"""Draw the tables of the documents from the JSON under benchmarks/results, between markers: no number without its row.

    <!-- table: cpu/quality_datafree.json text=wikitext2 columns=budget,achieved_bits,perplexity -->
    (drawn)
    <!-- end table -->

``list=summary`` draws another list of the file than its rows. ``--check`` writes nothing and exits 1 where a
document differs from its results.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"(<!-- table: (\S+)((?: \S+=\S+)*) -->\n)(.*?)(<!-- end table -->)", re.DOTALL)


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
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    where = f"{result['device']}; {versions}; commit {result['commit'][:10]}, {result['date']}"
    return "\n".join(f"| {line} |" for line in lines) + f"\n\n<sub>{where}</sub>\n"


def redraw(text: str, results: Path = RESULTS) -> str:
    """Return a document with every marked table drawn anew."""

    def replace(found: re.Match[str]) -> str:
        options = dict(item.split("=", 1) for item in found[3].split())
        columns = options.pop("columns").split(",")
        of, order = options.pop("list", "rows"), options.pop("sort", None)
        result = json.loads((results / found[2]).read_text(encoding="utf-8"))
        if order is not None:
            result[of].sort(key=lambda row: row[order])
        return found[1] + draw(result, columns, options, of) + found[5]

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
