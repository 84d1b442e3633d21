"""Draw docs/images/outlier_migration.png from a result of benchmarks/bench_migration.py; needs the extra ``plots``.

    python scripts/plot_migration.py [--results FILE] [--out FILE]

The same file gives the same picture.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pictures
import torch

from mobiquant_compiler.analysis.figures import draw_migration
from mobiquant_compiler.analysis.migration import Migration, TokenErrors

PICTURE = pictures.Picture(
    pictures.RESULTS / "cpu" / "outlier_migration_calibrated.json",
    pictures.IMAGES / "outlier_migration.png",
    "benchmarks/bench_migration.py",
    ("model",),
    ("tokens", "versions", "date"),
    kinds=(".png", ".pdf"),
)


def migration(tokens: Mapping[str, Any]) -> Migration:
    """Return the measured errors of a result file's ``tokens``."""
    found = [
        TokenErrors(
            part["budget"],
            part["routed"],
            part["achieved_bits"],
            torch.tensor([float(error) for error in part["errors"].split()], dtype=torch.float64),
            {},
        )
        for part in tokens["settings"]
    ]
    return Migration(tokens["share"], (found[0], found[1]), (found[2], found[3]))


def draw(result: Mapping[str, Any], out: Path) -> None:
    """Write the picture of a result."""
    tokens, versions = result["tokens"], result["versions"]
    title = f"{result['rows'][0]['model']}, {tokens['text']}; torch {versions['torch']}; {result['date']}"
    draw_migration(migration(tokens), out, title)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the result file and write the picture."""
    return pictures.run(__doc__, PICTURE, draw, arguments)


if __name__ == "__main__":
    sys.exit(main())
