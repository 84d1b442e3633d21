"""From how many tokens on a path pays: a table per GPU family, shipped for some, measured by `mobiquant tune`."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path as FilePath
from typing import Any

from mobiquant_compiler.config import RuntimeConfig
from mobiquant_compiler.errors import BadCrossover
from mobiquant_compiler.spec import Path

log = logging.getLogger(__name__)
_SHIPPED = FilePath(__file__).parent / "tables"
_DEFAULT = "h100"
FORMAT = 2


@dataclass(frozen=True, slots=True)
class Row:
    """One measured shape: first numbers of tokens for which one way is faster than another, `NEVER` where it never was.

    Attributes:
        n: Output rows.
        k: Input columns.
        tokens: The workspace is faster than integers.
        fused: Weights made in registers are faster than integers.
        routed: The workspace is faster than weights made in registers, for tokens that differ in their counts.
        full: The same for tokens of one count, which the library multiplies without sorting them.
    """

    n: int
    k: int
    tokens: int
    fused: int = 1 << 30
    routed: int = 1
    full: int = 1


NEVER = 1 << 30
_COLUMNS = tuple(field.name for field in fields(Row))


@dataclass(frozen=True, slots=True)
class Crossover:
    """The table of one GPU family.

    Attributes:
        gpu: Family, as `gpu_family` names it.
        rows: Measured shapes, at least one.
        origin: Where it came from, for reports.
    """

    gpu: str
    rows: tuple[Row, ...]
    origin: str = ""

    def path(
        self, tokens: int, n: int, k: int, *, full: bool = False, fused: bool = False, workspace: bool = True
    ) -> Path:
        """Return the path for `tokens` tokens, as at the measured shape whose size and form are nearest; pure.

        Args:
            tokens: More than `spec.PREFILL_TOKENS`.
            n: Output rows.
            k: Input columns.
            full: All tokens have one count; then integers are no choice.
            fused: Whether weights can be made in registers.
            workspace: Whether there is a workspace.
        """

        def distance(row: Row) -> float:
            return abs(math.log(row.n / n)) + abs(math.log(row.k / k))

        row = min(self.rows, key=distance)
        if fused and (full or tokens >= row.fused):
            return Path.WORKSPACE if workspace and tokens >= (row.full if full else row.routed) else Path.FUSED
        return Path.WORKSPACE if workspace and (full or tokens >= row.tokens) else Path.INTEGER

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {"format": FORMAT, "gpu": self.gpu, "rows": [asdict(row) for row in self.rows]}


def gpu_family(name: str) -> str:
    """Return a short name of a GPU's family, for file names.

    Example:
        >>> gpu_family("NVIDIA H100 80GB HBM3"), gpu_family("NVIDIA GeForce RTX 4090")
        ('h100', 'rtx4090')
    """
    words = [word for word in name.lower().split() if word not in ("nvidia", "geforce", "tesla", "quadro")]
    model = "".join(words[:2]) if words and not re.search(r"\d", words[0]) else "".join(words[:1])
    return re.sub(r"[^a-z0-9]+", "-", model).strip("-") or "unknown"


def tuned_path(gpu: str) -> FilePath:
    """Return where `mobiquant tune` keeps the table of a family."""
    return RuntimeConfig.from_env().cache_dir / f"crossover-{gpu}.json"


def load(name: str) -> Crossover:
    """Return the table of a GPU: the user's own, else the shipped one, else that of the family nearest to it.

    Args:
        name: The device's full name.

    Raises:
        BadCrossover: the user's table cannot be read.
    """
    gpu = gpu_family(name)
    for path in (tuned_path(gpu), _SHIPPED / f"{gpu}.json"):
        if path.is_file():
            return read(path)
    log.info("no crossover table for %s; using that of %s. `mobiquant tune` measures one.", gpu, _DEFAULT)
    return read(_SHIPPED / f"{_DEFAULT}.json")


def read(path: FilePath) -> Crossover:
    """Read a table.

    Raises:
        BadCrossover: it is not one; the message names the file and what is wrong.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadCrossover(path=path, reason=error) from error
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise BadCrossover(path=path, reason=f"wanted a table of format {FORMAT}")
    return Crossover(str(content.get("gpu")), _rows(content.get("rows"), path), str(path))


def _rows(values: object, path: FilePath) -> tuple[Row, ...]:
    if not isinstance(values, Sequence) or not values:
        raise BadCrossover(path=path, reason="wanted at least one row")
    rows = []
    for number, value in enumerate(values):
        if not isinstance(value, Mapping) or not all(_is_count(value.get(name)) for name in _COLUMNS):
            reason = f"row {number} is {value!r}; wanted {', '.join(_COLUMNS)}, whole numbers above 0"
            raise BadCrossover(path=path, reason=reason)
        rows.append(Row(**{name: value[name] for name in _COLUMNS}))
    return tuple(rows)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def write(table: Crossover, path: FilePath) -> None:
    """Write a table where `load` finds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table.to_dict(), indent=1) + "\n", encoding="utf-8")
