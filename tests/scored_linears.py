"""Elastic linears whose routers see scores drawn by hand: texts that are as far off a budget table as a test wants."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mobiquant_compiler.linear import MobiLinear, Router
from mobiquant_compiler.runtime.budget import QUANTILES, BudgetState, CalibratedTable
from mobiquant_compiler.spec import SliceSpec


class ScoredLinears(nn.Module):
    """Elastic linears whose routers see scores drawn by hand instead of activations.

    Log scores of a router are normal, with a mean and spread of its own, and (trained) fall by a random step from
    slice to slice. Another text shifts and stretches them, and moves them a little from window to window.
    """

    def __init__(self, trained: bool = False, limits: tuple[int, int] = (1, 4), linears: int = 8) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.linears = nn.ModuleList(
            MobiLinear.from_weight(torch.randn(8 + 8 * (i % 3), 32, generator=draw), None, SliceSpec((2,) * 4, 32))
            for i in range(linears)
        )
        self.routers: list[Router] = [m.router for m in self.linears]
        self.means, self.spreads = torch.randn(linears, generator=draw), 0.5 + torch.rand(linears, generator=draw)
        self.trained = trained
        for router in self.routers[:2]:
            router.floor, router.ceiling = limits
        shares = torch.linspace(0, 1, QUANTILES)
        sample = [self.scores(i, 20000, draw) for i in range(linears)]
        least = torch.stack([torch.quantile(s.cummin(1).values, shares, dim=0).T for s in sample])  # [R, E - 1, Q]
        gain = self.routers[0].gain[0].log()
        base = torch.stack([torch.quantile(s[:, 0] - gain, shares) for s in sample])
        quantiles = (least if trained else base).unsqueeze(0)
        self.state = BudgetState(self.routers, CalibratedTable(torch.tensor([4.0]).double(), quantiles))

    def scores(self, index: int, count: int, draw: torch.Generator) -> Tensor:
        """Return log scores [count, E - 1] of one router on calibration text."""
        base = self.means[index] + self.spreads[index] * torch.randn(count, 1, generator=draw)
        if not self.trained:
            return base + self.routers[index].gain.log()
        return base - (0.3 + torch.rand(count, 3, generator=draw)).cumsum(1)

    def read(self, draw: torch.Generator, shift: float, noise: float = 0.1, count: int = 2048) -> float:
        """Count a window of another text, as routers do; returns the bits its tokens got."""
        before = [router.hist.clone() for router in self.routers]
        wander = noise * float(torch.randn(1, generator=draw))
        for index, router in enumerate(self.routers):
            used = (self.scores(index, count, draw) + shift + wander).exp() >= router.thresholds
            counts = 1 + used.int().cumprod(1).sum(1)
            router.hist += torch.bincount(counts - 1, minlength=4)
        bits = [
            float(((r.hist - b).double() @ r.bits_by_count()) / (r.hist - b).sum())
            for r, b in zip(self.routers, before, strict=True)
        ]
        params = [r.params for r in self.routers]
        return sum(p * b for p, b in zip(params, bits, strict=True)) / sum(params)
