"""Asymmetric grids of one scale and one offset a group: a weight is ``scale * code + low``, code in 0..2^bits - 1."""

from __future__ import annotations

import torch
from torch import Tensor

SHRINKS = tuple(1 - 0.025 * i for i in range(29))  # shares of a group's range that are tried, 1 to 0.3
REFITS = 2  # least-squares passes over scale and offset, codes held
_LEAST_SCALE = 1e-8


def rounded(x: Tensor, scale: Tensor, low: Tensor, bits: int) -> Tensor:
    """Return the nearest values on a grid; `scale` and `low` broadcast against `x`."""
    return scale * _codes(x, scale, low, bits) + low


def _codes(x: Tensor, scale: Tensor, low: Tensor, bits: int) -> Tensor:
    return torch.round((x - low) / scale).clamp_(0, 2**bits - 1)


def min_max_grid(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the grid from the least to the greatest value of each group, on which zero is exact.

    Shapes: x [groups, G]; returns scale and low [groups, 1].
    """
    least, greatest = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((greatest - least) / (2**bits - 1)).clamp_min(_LEAST_SCALE)
    return scale, -scale * torch.round(-least / scale)


def least_squares_grid(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the grid of least squared error of each group: ranges shrunk about their centre, then refitted.

    Shapes: x [groups, G]; returns scale and low [groups, 1].
    """
    least, greatest = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    centre, top = (greatest + least) / 2, 2**bits - 1
    scale = ((greatest - least) / top).clamp_min(_LEAST_SCALE)
    best = _Best(x, bits, scale, centre - scale * top / 2)
    for shrink in SHRINKS[1:]:
        narrow = (scale * shrink).clamp_min(_LEAST_SCALE)
        best.offer(narrow, centre - narrow * top / 2)
    for _ in range(REFITS):
        best.offer(*_refit(x, bits, best.scale, best.low))
    return best.scale, best.low


class _Best:
    """The grid of least squared error so far, group by group."""

    def __init__(self, x: Tensor, bits: int, scale: Tensor, low: Tensor) -> None:
        self.x, self.bits, self.scale, self.low = x, bits, scale, low
        self.error = self._error(scale, low)

    def _error(self, scale: Tensor, low: Tensor) -> Tensor:
        return (rounded(self.x, scale, low, self.bits) - self.x).square().sum(-1, keepdim=True)

    def offer(self, scale: Tensor, low: Tensor) -> None:
        """Take a grid where it is better."""
        error = self._error(scale, low)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale, self.low = torch.where(better, scale, self.scale), torch.where(better, low, self.low)


def _refit(x: Tensor, bits: int, scale: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least-squares line of the values over their codes; a group of one code keeps its scale."""
    codes = _codes(x, scale, low, bits)
    code_mean, x_mean = codes.mean(-1, keepdim=True), x.mean(-1, keepdim=True)
    spread = (codes - code_mean).square().mean(-1, keepdim=True)
    slope = ((codes - code_mean) * (x - x_mean)).mean(-1, keepdim=True) / spread.clamp_min(1e-6)
    scale = torch.where(spread > 1e-4, slope, scale).clamp_min(_LEAST_SCALE)
    return scale, x_mean - scale * code_mean


def split_groups(weight: Tensor, group: int) -> Tensor:
    """Return a weight [N, K] as [N * ceil(K / group), group]; a short last group repeats its last column.

    A real value there does not stretch the group's range.
    """
    missing = -weight.shape[1] % group
    if missing:
        weight = torch.cat([weight, weight[:, -1:].expand(-1, missing)], 1)
    return weight.reshape(-1, group)


def join_groups(groups: Tensor, n: int, k: int) -> Tensor:
    """Undo `split_groups`: return [n, k]."""
    return groups.reshape(n, -1)[:, :k]
