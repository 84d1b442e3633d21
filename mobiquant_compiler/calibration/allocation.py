"""Which linears should have more slices at a budget: the losses that their slices take away, allocated globally."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_HALVINGS = 60


@dataclass(frozen=True, slots=True)
class Costs:
    """What the slices of groups of linears cost and are worth.

    Attributes:
        groups: Names of linears that share a decision.
        losses: Growth of the loss with each slice count of a group, float64 [R, E].
        params: Weights of each group, float64 [R].
        bits: Weight bits of each slice count, float64 [E].
    """

    groups: Sequence[Sequence[str]]
    losses: Tensor
    params: Tensor
    bits: Tensor

    @property
    def range(self) -> tuple[float, float]:
        """The least and greatest average bits."""
        return float(self.bits[0]), float(self.bits[-1])

    def gains(self) -> Tensor:
        """Return the share of the base's loss that each further slice removes per bit, falling, float64 [R, E - 1]."""
        return falling_gains(self.losses, self.bits)


def falling_gains(losses: Tensor, bits: Tensor) -> Tensor:
    """Return what each further slice removes of the loss with the base alone, per bit.

    A slice is never worth more than the one before it: counts are chosen slice by slice.

    Shapes: losses [R, E], bits [E]; returns [R, E - 1], positive and falling.
    """
    base = losses[:, :1].clamp_min(torch.finfo(torch.float64).tiny)
    removed = (losses[:, :-1] - losses[:, 1:]) / base / bits.diff()
    return removed.clamp_min(1e-9).cummin(1).values


def allocate(costs: Costs, budget: float, noise: Tensor | float = 0.0) -> Tensor:
    """Return the slice count of each group at which the average bits come closest to `budget`, int64 [R].

    The next slice always goes where it takes away most loss per bit and weight; `noise` is added to the logarithm of
    that worth.
    """
    best, least = torch.ones(len(costs.groups), dtype=torch.int64), float("inf")
    if len(costs.bits) == 1:
        return best
    base = costs.losses[:, :1].clamp_min(torch.finfo(torch.float64).tiny)
    worth = (costs.gains() * base / costs.params.unsqueeze(1)).log() + noise
    low, high = float(worth.min()) - 1, float(worth.max()) + 1
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        counts = 1 + (worth > middle).sum(1)
        average = float((costs.bits[counts - 1] * costs.params).sum() / costs.params.sum())
        if abs(average - budget) < least:
            best, least = counts, abs(average - budget)
        low, high = (middle, high) if average > budget else (low, middle)
    return best
