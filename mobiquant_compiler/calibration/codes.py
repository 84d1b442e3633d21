"""Codes chosen so that every prefix of slices is good: error compensation over all slice counts at once.

GPTQ (arXiv 2210.17323) walks through the columns of a weight and moves the error of each rounded column onto the
columns that follow. Here one code per weight stands for E weights, ``W_1`` to ``W_E``. So each slice count keeps its
own compensated target, all with the same Hessian, and the code of a column is the one with the least weighted sum of
squared distances to its E targets. In closed form, as MatGPTQ (arXiv 2602.03537) does for a few whole widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mobiquant_compiler.hessians import damped, inverse_factor
from mobiquant_compiler.slices import affine_at, residual_bits
from mobiquant_compiler.spec import SliceSpec

_COLUMNS = 64  # columns between two updates of the rest of a weight


@dataclass(frozen=True, slots=True)
class Factor:
    """The order in which the columns of a weight are coded, and how an error moves on.

    Attributes:
        order: int64 [K], columns by falling mean square of their activations.
        upper: float32 [K, K], upper Cholesky factor of the inverse Hessian in that order.
    """

    order: Tensor
    upper: Tensor


def factorize(hessian: Tensor, damping: float, where: str) -> Factor:
    """Invert a damped Hessian for `compensated_codes`.

    Args:
        hessian: [K, K], the weighted mean of ``x x^T``.
        damping: As of `hessians.damped`.
        where: Name of the linear for messages.

    Raises:
        NonFiniteActivations: the Hessian has values that are not finite.
    """
    whole = damped(hessian, damping, where)
    order = whole.diagonal().argsort(descending=True, stable=True)
    return Factor(order, inverse_factor(whole, order))


@dataclass(frozen=True, slots=True)
class Prefixes:
    """All codes of all slices but the last, which `closest_codes` tries.

    Attributes:
        codes: ``Q_k`` of each slice count but the last, float32 whole numbers [E - 1, P].
        first: Least ``Q_E`` of each prefix, [P].
        last: Greatest one, [P].
        shares: What a squared distance in steps of a count is worth, float32 [E - 1, 1, 1].
        last_share: The same with all slices.
    """

    codes: Tensor
    first: Tensor
    last: Tensor
    shares: Tensor
    last_share: float

    @classmethod
    def of(cls, spec: SliceSpec, weights: Sequence[float], device: torch.device) -> Prefixes:
        """Return the prefixes of a spec; `weights` [E] is what a squared error counts at each slice count."""
        count = spec.num_slices
        bits = [spec.bits(k) for k in range(1, count)]
        every = torch.arange(1 << bits[-1] if bits else 1, dtype=torch.float32, device=device)
        codes = [torch.floor(every / (1 << (bits[-1] - b))) for b in bits]
        shares = [w / 4.0 ** residual_bits(spec, k) for k, w in enumerate(weights, 1)]
        finest = 1 << spec.widths[-1]
        return cls(
            torch.stack(codes) if codes else every.new_empty(0, 1),
            every * finest,
            every * finest + (finest - 1),
            torch.tensor(shares[:-1], device=device).view(-1, 1, 1),
            shares[-1],
        )


def closest_codes(positions: Tensor, prefixes: Prefixes) -> Tensor:
    """Return the code per weight whose slice counts together come closest to their targets.

    Minimises ``sum_k weights[k] (t_k - W_k)^2``: all codes of all slices but the last are tried, and the last slice's
    best code follows by rounding.

    Args:
        positions: Targets in steps of their slice count, ``t_k / s_k + Z_k``, float32 [E, N].
        prefixes: What is tried.

    Returns:
        ``Q_E`` [N], float32 whole numbers.
    """
    away = positions[:-1].unsqueeze(-1) - prefixes.codes.unsqueeze(1)
    cost = away.square_().mul_(prefixes.shares).sum(0)
    finest = positions[-1].unsqueeze(1)
    code = finest.round().clamp(prefixes.first, prefixes.last)
    rest = finest - code
    cost = torch.addcmul(cost, rest, rest, value=prefixes.last_share)
    return code.gather(1, cost.argmin(1, keepdim=True)).squeeze(1)


def values_at(codes: Tensor, scale: Tensor, zero: Tensor, spec: SliceSpec) -> Tensor:
    """Return what whole-number codes stand for with each slice count, [E, *codes.shape]."""
    values = []
    for k in range(1, spec.num_slices + 1):
        step, centre = affine_at(scale, zero, spec, k)
        values.append((torch.floor(codes / (1 << (spec.total_bits - spec.bits(k)))) - centre) * step)
    return torch.stack(values)


def compensated_codes(
    weight: Tensor, factor: Factor, scale: Tensor, zero: Tensor, spec: SliceSpec, weights: Sequence[float]
) -> Tensor:
    """Choose the codes of a weight, column by column, with the error of each column moved onto those that follow.

    Args:
        weight: [N, K] float32.
        factor: Of the Hessian of its inputs.
        scale: [N, groups] as stored.
        zero: Same shape.
        spec: Slice widths and group.
        weights: What a squared error counts at each slice count, [E].

    Returns:
        ``Q_E`` uint8 [N, K].

    Source: GPTQ section 3, with a target per slice count.
    """
    n, k = weight.shape
    targets = weight.t()[factor.order].contiguous().expand(spec.num_slices, k, n).contiguous()
    scale, zero = scale.float().t().contiguous(), zero.float().t().contiguous()
    counts = range(1, spec.num_slices + 1)
    affine = [affine_at(scale, zero, spec, count) for count in counts]
    steps, centres = (torch.stack(list(parts)) for parts in zip(*affine, strict=True))  # [E, groups, N]
    # A group of zeros has scale 0: any step will do where every value is 0.
    divisors = torch.where(steps > 0, steps, 1.0)
    left = torch.tensor([[2.0 ** (spec.total_bits - spec.bits(count))] for count in counts], device=weight.device)
    prefixes = Prefixes.of(spec, weights, weight.device)
    group = (factor.order // spec.group).tolist()
    codes = torch.empty(k, n, device=weight.device)
    # Few, large operations a column: on a GPU their number is what this costs.
    for start in range(0, k, _COLUMNS):
        stop = min(start + _COLUMNS, k)
        block = targets[:, start:stop].clone()
        errors = torch.empty_like(block)
        upper = factor.upper[start:stop, start:stop]
        for i in range(stop - start):
            at = group[start + i]
            target, centre = block[:, i], centres[:, at]
            code = closest_codes(torch.addcdiv(centre, target, divisors[:, at]), prefixes)
            codes[start + i] = code
            values = (code / left).floor_().sub_(centre).mul_(steps[:, at])
            torch.div(target - values, upper[i, i], out=errors[:, i])
            block[:, i + 1 :].addcmul_(upper[i, i + 1 :].view(1, -1, 1), errors[:, i : i + 1], value=-1)
        targets[:, stop:] -= factor.upper[start:stop, stop:].t() @ errors
    return codes[factor.order.argsort()].t().contiguous().to(torch.uint8)
