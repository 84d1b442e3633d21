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

from mobiquant_compiler.errors import NonFiniteActivations
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
        damping: Added to the diagonal, as a share of its mean.
        where: Name of the linear for messages.

    Raises:
        NonFiniteActivations: the Hessian has values that are not finite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise NonFiniteActivations(where=where, count=int((~torch.isfinite(hessian)).sum()))
    damped = hessian.double()
    diagonal = damped.diagonal()  # a view
    diagonal.masked_fill_(diagonal <= 0, 1.0)  # columns that were always 0 are free: any code will do
    diagonal += damping * diagonal.mean()
    order = diagonal.argsort(descending=True, stable=True)
    lower = torch.linalg.cholesky(damped[order][:, order])
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return Factor(order, upper.float())


def closest_codes(targets: Tensor, scale: Tensor, zero: Tensor, spec: SliceSpec, weights: Sequence[float]) -> Tensor:
    """Return the code per weight whose slice counts together come closest to their targets.

    Minimises ``sum_k weights[k] (t_k - W_k)^2``: all codes of all slices but the last are tried, and the last slice's
    best code follows by rounding.

    Shapes: targets [E, N]; scale, zero [N] float32, positive scale; returns ``Q_E`` [N] as float32 whole numbers.
    """
    count = spec.num_slices
    tried = 1 << spec.bits(count - 1) if count > 1 else 1
    prefix = torch.arange(tried, dtype=torch.float32, device=targets.device)
    cost = torch.zeros(targets.shape[1], tried, device=targets.device)
    for k in range(1, count + 1):
        step, centre = affine_at(scale, zero, spec, k)
        position = (targets[k - 1] / step + centre).unsqueeze(1)
        if k < count:
            code = torch.floor(prefix / (1 << (spec.bits(count - 1) - spec.bits(k))))
        else:
            last = 1 << spec.widths[-1]
            code = torch.minimum(torch.maximum(position.round(), prefix * last), prefix * last + (last - 1))
        share = weights[k - 1] / 4.0 ** residual_bits(spec, k)  # distances are in steps of this count
        cost.addcmul_(position - code, position - code, value=share)
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
    # A group of zeros has scale 0: any step will do where every value is 0.
    scale, zero = scale.float().t().contiguous(), zero.float().t().contiguous()
    safe = torch.where(scale > 0, scale, 1.0)
    group = (factor.order // spec.group).tolist()
    codes = torch.empty(k, n, device=weight.device)
    for start in range(0, k, _COLUMNS):
        stop = min(start + _COLUMNS, k)
        block = targets[:, start:stop].clone()
        errors = torch.empty_like(block)
        upper = factor.upper[start:stop, start:stop]
        for i in range(stop - start):
            step, centre = safe[group[start + i]], zero[group[start + i]]
            code = closest_codes(block[:, i], step, centre, spec, weights)
            codes[start + i] = code
            values = values_at(code, scale[group[start + i]], centre, spec)
            errors[:, i] = (block[:, i] - values) / upper[i, i]
            block[:, i + 1 :] -= upper[i, i + 1 :].view(1, -1, 1) * errors[:, i : i + 1]
        targets[:, stop:] -= factor.upper[start:stop, stop:].t() @ errors
    return codes[factor.order.argsort()].t().contiguous().to(torch.uint8)
