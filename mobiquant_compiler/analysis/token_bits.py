"""Which tokens get more bits: the slice counts of every token of one text, over all layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mobiquant_compiler.analysis.precision import layer_of
from mobiquant_compiler.analysis.watch import Call, watch_linears
from mobiquant_compiler.budgets import budget, linears_of
from mobiquant_compiler.errors import EmptyBatch
from mobiquant_compiler.evaluation import logits_of


@dataclass(frozen=True)
class TokenBits:
    """What each token of a text used.

    Attributes:
        budget: Wanted average weight bits.
        ids: Token ids [T].
        bits: Average weight bits of each token over all linears, each weighted by its parameters; float64 [T].
        layers: Numbers of the layers as text, "-" for linears outside of any.
        counts: Mean slice count of each token over the linears of each layer, float64 [T, layers].
        num_slices: The greatest slice count.
        left_out: Linears that did not see each token exactly once.
    """

    budget: float
    ids: Tensor
    bits: Tensor
    layers: tuple[str, ...]
    counts: Tensor
    num_slices: int
    left_out: tuple[str, ...] = ()

    def rows(self, texts: list[str]) -> list[dict[str, Any]]:
        """Return a row a token for CSV; `texts` are the tokens as text [T]."""
        return [
            {
                "token": i,
                "id": int(self.ids[i]),
                "text": text,
                "bits": float(self.bits[i]),
                **{f"layer_{name}": float(n) for name, n in zip(self.layers, self.counts[i], strict=True)},
            }
            for i, text in enumerate(texts)
        ]

    def summary(self) -> dict[str, Any]:
        """Return what JSON tells beside the rows."""
        return {
            "budget": self.budget,
            "tokens": len(self.ids),
            "achieved_bits": float(self.bits.mean()),
            "least_bits": float(self.bits.min()),
            "greatest_bits": float(self.bits.max()),
            "left_out": list(self.left_out),
        }


def token_bits(
    model: nn.Module, ids: Tensor, bits: float, progress: Callable[[str, int, int], None] | None = None
) -> TokenBits:
    """Run one text at a budget and return the slice counts that each of its tokens used.

    Args:
        model: Elastic model; what of it is compiled runs eagerly.
        ids: Token ids [T].
        bits: Budget.
        progress: Called with stage, done, total.

    Raises:
        NotElastic: the model has no elastic linear.
        BudgetOutOfRange: a budget that the model cannot give.
        EmptyBatch: no tokens.

    Source: MoBiQuant, arXiv 2602.20191 (token-aware routing).
    """
    if ids.dim() != 1 or ids.numel() == 0:
        raise EmptyBatch(where="token bits", got=tuple(ids.shape))
    linears = linears_of(model, "token bits")
    found: dict[str, list[Tensor]] = {name: [] for name in linears}

    def observe(call: Call) -> None:
        found[call.name].append(call.counts.flatten().cpu().long())

    device = next(model.parameters()).device
    with budget(model, bits), torch.no_grad(), watch_linears(model, observe):
        logits_of(model, ids.unsqueeze(0).to(device))
    if progress:
        progress(f"bits of tokens at {bits:g} bits", 1, 1)
    # A linear that ran twice, or on other tokens than these (a head of the last one), says nothing about each of them.
    whole = {name: calls[0] for name, calls in found.items() if len(calls) == 1 and len(calls[0]) == len(ids)}
    left_out = tuple(name for name in linears if name not in whole)
    total, weight = torch.zeros(len(ids), dtype=torch.float64), 0
    layers: dict[str, list[Tensor]] = {}
    for name, counts in whole.items():
        linear = linears[name]
        parameters = linear.in_features * linear.out_features
        total += parameters * linear.router.bits_by_count()[counts - 1]
        weight += parameters
        layer = layer_of(name)
        layers.setdefault("-" if layer is None else str(layer), []).append(counts.double())
    if not whole:
        raise EmptyBatch(where="token bits (no linear sees each token once)", got=tuple(ids.shape))
    means = torch.stack([torch.stack(parts).mean(0) for parts in layers.values()], 1)
    most = max(linear.spec.num_slices for linear in linears.values())
    return TokenBits(bits, ids.cpu(), total / weight, tuple(layers), means, most, left_out)
