"""Achieved bits: what the routers really chose, padding left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mobiquant_compiler.errors import MaskTooLong
from mobiquant_compiler.linear import MASK_CAPACITY, MobiLinear, Router, TokenMask


@dataclass(frozen=True, slots=True)
class AchievedBits:
    """Average weight bits per token as they really were.

    Attributes:
        total: Over all elastic linears, each weighted by its number of parameters; NaN before the first token.
        layers: The same per linear.
        tokens: Tokens counted (of the linear that saw most; a decision that several linears share is counted once
            a linear in eager mode, and is only looked at where there is no other).
    """

    total: float
    layers: Mapping[str, float]
    tokens: int

    def __float__(self) -> float:
        return self.total

    def __format__(self, spec: str) -> str:
        return format(self.total, spec)


def achieved(linears: Mapping[str, MobiLinear]) -> AchievedBits:
    """Average the slice counts that the routers of `linears` recorded since the last `reset`."""
    return average(linears, read(routers_of(linears)))


def read(routers: Sequence[Router]) -> dict[Router, Tensor]:
    """Return the slice counts that routers recorded, float64 [E] each, by one read of the device."""
    if not routers:
        return {}
    device = routers[0].hist.device
    together = torch.cat([router.hist.to(device) for router in routers]).cpu().double()
    return dict(zip(routers, together.split([len(router.widths) for router in routers]), strict=True))


def average(linears: Mapping[str, MobiLinear], counts: Mapping[Router, Tensor]) -> AchievedBits:
    """Average slice counts, float64 [E] a router, over linears."""
    layers: dict[str, float] = {}
    bits = params = 0.0
    seen_by: dict[bool, int] = {True: 0, False: 0}
    shared = Counter(id(linear.router) for linear in linears.values())
    for name, linear in linears.items():
        hist = counts[linear.router]
        seen = float(hist.sum())
        if not seen:
            layers[name] = float("nan")
            continue
        layers[name] = float(hist @ linear.router.bits_by_count()) / seen
        weight = linear.in_features * linear.out_features
        bits, params = bits + layers[name] * weight, params + weight
        alone = shared[id(linear.router)] == 1
        seen_by[alone] = max(seen_by[alone], int(seen))
    return AchievedBits(bits / params if params else float("nan"), layers, seen_by[True] or seen_by[False])


def routers_of(linears: Mapping[str, MobiLinear]) -> list[Router]:
    """Return the distinct routers in the order of their first linear."""
    return list({id(linear.router): linear.router for linear in linears.values()}.values())


def reset(linears: Mapping[str, MobiLinear]) -> None:
    """Forget what was recorded."""
    for router in routers_of(linears):
        router.reset()


@contextmanager
def masked(linears: Mapping[str, MobiLinear], mask: Tensor) -> Iterator[None]:
    """Leave padding out of telemetry: calls of exactly ``mask.numel()`` tokens count only where `mask` is nonzero.

    Raises:
        MaskTooLong: more tokens than the mask buffer holds.
    """
    flat = mask.reshape(-1)
    if flat.numel() > MASK_CAPACITY:
        raise MaskTooLong(got=flat.numel(), wanted=MASK_CAPACITY)
    holders = _token_masks(linears)
    before = [holder.tokens.clone() for holder in holders]
    for holder in holders:
        holder.tokens[1 : flat.numel() + 1] = (flat != 0).to(holder.tokens)
        holder.tokens[0] = flat.numel()
    try:
        yield
    finally:
        for holder, tokens in zip(holders, before, strict=True):
            holder.tokens.copy_(tokens)


def _token_masks(linears: Mapping[str, MobiLinear]) -> list[TokenMask]:
    masks = {id(r.token_mask): r.token_mask for r in routers_of(linears)}
    return list(masks.values())
