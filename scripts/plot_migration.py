"""Draw docs/images/outlier_migration.png from a result of benchmarks/bench_migration.py; needs the extra ``plots``.

    python scripts/plot_migration.py [--results FILE] [--out FILE]

The same file gives the same picture.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mobiquant_compiler.analysis.figures import draw_migration
from mobiquant_compiler.analysis.migration import Migration, TokenErrors

ROOT = Path(__file__).resolve().parent.parent


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the result file and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "benchmarks" / "results" / "cpu" / "outlier_migration_calibrated.json"
    parser.add_argument("--results", type=Path, default=default)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "outlier_migration.png")
    args = parser.parse_args(arguments)
    try:
        result = json.loads(args.results.read_text(encoding="utf-8"))
    except OSError as error:
        print(f"{args.results}: {os.strerror(error.errno or 0)}; measure first: benchmarks/bench_migration.py")
        return 2
    tokens = result["tokens"]
    versions = result["versions"]
    title = f"{result['rows'][0]['model']}, {tokens['text']}; torch {versions['torch']}; {result['date']}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw_migration(migration(tokens), args.out, title)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
