"""HQQ (half-quadratic quantization): the zero point of each group refined for a robust norm, from the weights alone."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from mobiquant_compiler.baselines.grids import join_groups, split_groups

NORM, BETA, KAPPA, STEPS = 0.7, 10.0, 1.01, 20  # the method's own defaults
INSTALL = "pip install --no-deps hqq termcolor"


def library_version() -> str | None:
    """Return the version of the package hqq, None where it or what it imports is not installed."""
    try:
        import_module("hqq.core.quantize")  # which imports termcolor, left out by --no-deps
        return version("hqq")
    except (ImportError, PackageNotFoundError):
        return None


def hqq_library(weight: Tensor, bits: int, group: int) -> Tensor:
    """Return what the package hqq gives a weight [N, K], float32: groups along rows (axis 1), its default solver."""
    quantizer = import_module("hqq.core.quantize").Quantizer

    x = split_groups(weight.float(), group)
    where = {"device": str(weight.device), "compute_dtype": torch.float32}
    codes, meta = quantizer.quantize(
        x, nbits=bits, group_size=group, axis=1, optimize=True, bitpack=False, view_as_float=False, **where
    )
    return join_groups(quantizer.dequantize(codes, {**meta, "compute_dtype": torch.float32}), *weight.shape)


def hqq_own(weight: Tensor, bits: int, group: int) -> Tensor:
    """Return what HQQ gives a weight [N, K], by our own implementation; float32.

    Alternates between the sparse part of the error (a shrinking step of the l_p norm, p = `NORM`) and the zero point
    that fits the rest best, until the mean absolute error over the whole weight stops falling.

    Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023.
    """
    x = split_groups(weight.float(), group)
    top = 2**bits - 1
    least, greatest = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    span = greatest - least
    steps = torch.where(span > 1e-4, top / span.clamp_min(1e-12), 1.0).clamp(max=2e4)  # codes per unit of weight
    zero = -least * steps
    best, beta, last = zero, BETA, float("inf")
    for _ in range(STEPS):
        codes = (x * steps + zero).round().clamp(0, top)
        values = (codes - zero) / steps
        error = float((x - values).abs().mean())
        if error >= last:
            break
        last, best = error, zero
        rest = x - values
        size = rest.abs()
        outliers = rest.sign() * (size - size.pow(NORM - 1) / beta).clamp_min(0)
        zero = (codes - (x - outliers) * steps).mean(-1, keepdim=True)
        beta *= KAPPA
    codes = (x * steps + best).round().clamp(0, top)
    return join_groups((codes - best) / steps, *weight.shape)
