"""Average precision: the bits that tokens really used in each linear, at each budget."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mobiquant_compiler.analysis.watch import Call, watch_linears
from mobiquant_compiler.budgets import budget, linears_of
from mobiquant_compiler.errors import EmptyBatch
from mobiquant_compiler.evaluation import logits_of

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class LinearBits:
    """What one linear used at one budget.

    Attributes:
        budget: Wanted average weight bits over the model.
        linear: Name.
        layer: Number of the layer it is in, from its name; None for a linear outside of any.
        kind: Last part of its name.
        parameters: Its weights, what its bits count for in the model's average.
        bits: Average weight bits of its tokens; NaN for a linear that saw none.
        shares: Share of tokens with 1, 2, ... slices.
    """

    budget: float
    linear: str
    layer: int | None
    kind: str
    parameters: int
    bits: float
    shares: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, a column a slice count."""
        plain = {name: getattr(self, name) for name in self.__slots__ if name != "shares"}
        return plain | {f"share_of_{count}": share for count, share in enumerate(self.shares, 1)}


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a linear is in: the first number among the parts of its name."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else None


def average_precision(
    model: nn.Module, windows: Tensor, budgets: Sequence[float], progress: Progress | None = None
) -> list[LinearBits]:
    """Run the model at each budget and return the bits that each linear's tokens used.

    Args:
        model: Elastic model; what of it is compiled runs eagerly.
        windows: Ids [count, length].
        budgets: Average weight bits.
        progress: Called with stage, done, total.

    Returns:
        A row a budget and linear, in the order of the model.

    Raises:
        NotElastic: the model has no elastic linear.
        BudgetOutOfRange: a budget that the model cannot give.
        EmptyBatch: no tokens.

    Source: MoBiQuant, arXiv 2602.20191 (the precision of each layer differs from the target: achieved bits).
    """
    if windows.dim() != 2 or windows.numel() == 0:
        raise EmptyBatch(where="average precision", got=tuple(windows.shape))
    report = progress or (lambda stage, done, total: None)
    rows: list[LinearBits] = []
    for bits in budgets:
        stage = f"average precision at {bits:g} bits"
        with budget(model, bits), torch.no_grad():
            rows += _at(model, windows, bits, lambda done, s=stage: report(s, done, len(windows)))
    return rows


def _at(model: nn.Module, windows: Tensor, bits: float, report: Callable[[int], None]) -> list[LinearBits]:
    linears = linears_of(model, "average precision")
    device = next(model.parameters()).device
    seen = {name: torch.zeros(linear.spec.num_slices, dtype=torch.int64) for name, linear in linears.items()}

    def observe(call: Call) -> None:
        seen[call.name] += torch.bincount(call.counts.flatten().cpu().long() - 1, minlength=len(seen[call.name]))

    with watch_linears(model, observe):
        for done, window in enumerate(windows, 1):
            logits_of(model, window.unsqueeze(0).to(device))
            report(done)
    rows = []
    for name, linear in linears.items():
        shares = seen[name].double() / seen[name].sum()
        average = float(shares @ linear.router.bits_by_count())
        place = (layer_of(name), name.rpartition(".")[2], linear.in_features * linear.out_features)
        rows.append(LinearBits(bits, name, *place, average, tuple(shares.tolist())))
    return rows


def by_layer(rows: Iterable[LinearBits]) -> list[dict[str, Any]]:
    """Return the average of each budget and layer, its linears weighted by their parameters."""
    sums: dict[tuple[float, int | None], list[float]] = {}
    for row in rows:
        if row.bits == row.bits:  # a linear that saw no token has no say
            pair = sums.setdefault((row.budget, row.layer), [0.0, 0.0])
            pair[0] += row.bits * row.parameters
            pair[1] += row.parameters
    return [
        {"budget": bits, "layer": layer, "bits": total / weight, "parameters": int(weight)}
        for (bits, layer), (total, weight) in sums.items()
    ]
