"""Coverage: what was made elastic, what was not, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class SkipReason(StrEnum):
    """Why a layer keeps its own weights; the value is what users read."""

    EXCLUDED = "excluded by name"
    NOT_INCLUDED = "not included by name"
    TIED = "tied to another parameter"
    RANKED = "ranks experts: rounded scores may choose others"
    EXPERTS = "3-D expert parameters are not linears"
    UNKNOWN_TYPE = "a subclass of nn.Linear with its own use of the weight"
    TOO_NARROW = "fewer input columns than a group"
    DTYPE = "weight dtype is not float64, float32, bfloat16 or float16"
    NOT_A_WEIGHT = "weight is computed in the graph, not a parameter"


@dataclass(frozen=True, slots=True)
class Skip:
    """One layer that was left alone.

    Attributes:
        name: Layer or node.
        reason: Why.
        detail: What of this layer made it so (shape, dtype, partner).
    """

    name: str
    reason: SkipReason
    detail: str = ""

    def __str__(self) -> str:
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.name} ({self.reason}{detail})"


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which linears of a model or graph are elastic.

    Attributes:
        rewritten: Names of elastic linears.
        skipped: The others, each with its reason.
        bytes_before: Bytes of the rewritten weights as they were.
        bytes_after: Bytes of their slices, scales and zero points.
        notes: Anything else a user should know.
    """

    rewritten: Sequence[str] = ()
    skipped: Sequence[Skip] = ()
    bytes_before: int = 0
    bytes_after: int = 0
    notes: Sequence[str] = field(default_factory=tuple)

    def __str__(self) -> str:
        total = len(self.rewritten) + len(self.skipped)
        text = f"{len(self.rewritten)} of {total} linears elastic"
        if self.skipped:
            shown = "; ".join(str(s) for s in list(self.skipped)[:5])
            more = len(self.skipped) - 5
            text += f"; skipped: {shown}" + (f"; and {more} more" if more > 0 else "")
        if self.bytes_before:
            text += f"; {self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "rewritten": list(self.rewritten),
            "skipped": [{"name": s.name, "reason": str(s.reason), "detail": s.detail} for s in self.skipped],
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "notes": list(self.notes),
        }
