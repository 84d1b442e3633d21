"""Hessians of linears' squared output errors: gathered from inputs, damped, inverted.

What GPTQ (arXiv 2210.17323) rests on, for one width (`baselines.gptq`) as for all slice counts (`calibration.codes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mobiquant_compiler.errors import NonFiniteActivations
from mobiquant_compiler.hooks import watched


@contextmanager
def gathered(
    linears: Mapping[str, nn.Module], weights: Mapping[str, Tensor] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Gather the mean of ``x x^T`` over all tokens x that reach each linear within the block.

    Args:
        linears: By name.
        weights: Of each token in the order of their coming, of mean 1, float32 [tokens] by name; all count alike
            without.

    Yields:
        float32 [K, K] by name, empty until the block ends; a linear that does not run has none.
    """
    means: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    seen = dict.fromkeys(linears, 0)

    def see(name: str, x: Tensor) -> None:
        x = x.detach().float()
        start, seen[name] = seen[name], seen[name] + x.shape[0]
        counted = x if weights is None else x * weights[name][start : seen[name]].unsqueeze(1)
        if name not in sums:
            sums[name] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
        sums[name].addmm_(x.t(), counted)

    with watched(linears, see):
        yield means
    means |= {name: total.div_(max(1, seen[name])) for name, total in sums.items()}


def damped(hessian: Tensor, damping: float, where: str) -> Tensor:
    """Return a Hessian that can be inverted, float64 [K, K].

    Args:
        hessian: [K, K], as `gathered`. Columns that were always 0 are free: their diagonal becomes 1.
        damping: Added to the diagonal, as a share of its mean.
        where: Name of the linear for messages.

    Raises:
        NonFiniteActivations: the Hessian has values that are not finite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise NonFiniteActivations(where=where, count=int((~torch.isfinite(hessian)).sum()))
    result = hessian.to(torch.float64, copy=True)
    diagonal = result.diagonal()  # a view
    diagonal.masked_fill_(diagonal <= 0, 1.0)
    diagonal += damping * diagonal.mean()
    return result


def inverse_factor(hessian: Tensor, order: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse, float32 [K, K]: row i says how column i's error moves on.

    Args:
        hessian: As `damped` returns it.
        order: int64 [K], columns in the order in which they are rounded; rows and columns of the result are in it.
    """
    lower = torch.linalg.cholesky(hessian[order][:, order])
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()
