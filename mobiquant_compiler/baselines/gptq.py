"""GPTQ (arXiv 2210.17323): columns are rounded one after the other, and later ones make up for the error of each."""

from __future__ import annotations

import torch
from torch import Tensor

from mobiquant_compiler.baselines.grids import least_squares_grid, rounded
from mobiquant_compiler.hessians import damped, inverse_factor

DAMPING = 0.01  # share of the mean Hessian diagonal that is added to it


def gptq(
    weight: Tensor, hessian: Tensor, bits: int, group: int, damping: float = DAMPING, where: str = "gptq"
) -> Tensor:
    """Return the values that GPTQ gives a weight at one width.

    The grid of a group (least squared error, real zero point) is chosen when the group is reached, from the weights as
    they were compensated until then. Groups are taken by their mean Hessian diagonal, the greatest first, and so are
    the columns inside a group: the activation order that leaves groups contiguous in memory.

    Args:
        weight: [N, K].
        hessian: ``X^T X`` of the layer's inputs, up to a factor, float32 [K, K]; inverted in float64.
        bits: Width.
        group: Columns that share scale and zero point; the last group may be short.
        damping: See `DAMPING`.
        where: Name of the linear for messages.

    Returns:
        float32 [N, K].

    Raises:
        NonFiniteActivations: the Hessian has values that are not finite.

    Source: GPTQ, arXiv 2210.17323, algorithm 1.
    """
    unused = hessian.diagonal() == 0  # columns that no calibration token ever moved: their weight does not matter
    hessian = damped(hessian, damping, where)
    parts = column_order(hessian.diagonal(), group)
    order = torch.cat(parts)
    rows = weight.float().t()[order].contiguous()  # columns of the weight as rows: each step takes one
    rows[unused[order]] = 0
    factor = inverse_factor(hessian, order)
    result = torch.empty_like(rows)
    start = 0
    for part in parts:
        stop = start + len(part)
        block, errors = rows[start:stop].clone(), torch.empty_like(rows[start:stop])
        scale, low = (t.squeeze(-1) for t in least_squares_grid(block.t(), bits))
        for i in range(stop - start):
            at = start + i
            result[at] = rounded(block[i], scale, low, bits)
            errors[i] = (block[i] - result[at]) / factor[at, at]
            block[i + 1 :] -= factor[at, at + 1 : stop, None] * errors[i]
        rows[stop:] -= factor[start:stop, stop:].t() @ errors
        start = stop
    return result[order.argsort()].t().contiguous()


def column_order(diagonal: Tensor, group: int) -> list[Tensor]:
    """Return the columns of each group in the order they are rounded in, int64, groups in their order too."""
    parts = [columns[diagonal[columns].argsort(descending=True)] for columns in _columns(diagonal, group)]
    means = torch.stack([diagonal[part].mean() for part in parts])
    return [parts[i] for i in means.argsort(descending=True).tolist()]


def _columns(diagonal: Tensor, group: int) -> tuple[Tensor, ...]:
    return torch.arange(len(diagonal), device=diagonal.device).split(group)
