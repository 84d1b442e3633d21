"""Routers that know what the chosen slices are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mobiquant_compiler.calibration.allocation import Costs
from mobiquant_compiler.linear import Router, TokenMask
from mobiquant_compiler.quantize import MakeRouter


def sum_of(expected: Mapping[str, Tensor], group: Sequence[str], key: str) -> Tensor:
    """Return the sum over a group of linears of one thing that is expected of each."""
    return torch.stack([expected[f"{name}.{key}"].double().cpu() for name in group]).sum(0)


def measured_routers(
    costs: Costs, expected: Mapping[str, Tensor], networks: Mapping[str, Sequence[Tensor]]
) -> MakeRouter:
    """Return a maker of routers that know what each slice really takes away, trained where a network is given.

    The energies of columns are those of the chosen codes, and the gain of a slice is its measured share, where a
    data-free router must take uniform errors that fall 4-fold per bit for granted.
    """
    gains = costs.gains()

    def make(group: Sequence[str], widths: tuple[int, ...], mask: TokenMask) -> Router:
        row = list(costs.groups).index(group)
        energy = sum_of(expected, group, "energy") / costs.params[row]
        device = mask.tokens.device
        router = Router(energy.float().to(device), widths, mask, gains[row].float())
        if group[0] in networks:
            router.learn(networks[group[0]])
        return router

    return make
