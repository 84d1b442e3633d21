"""The base grid of a group when its inputs are known: clipping weighed against every slice count at once.

Without calibration nothing is clipped, since what the base cuts off no further slice brings back (`grid`). Error
compensation can bring it back: the columns that follow make up for it. So here a narrower base competes, and the
error that decides is summed over all slice counts, each weight counted by the mean square of its input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mobiquant_compiler.calibration.codes import values_at
from mobiquant_compiler.grid import centred_grid, exact_zero_grids, judged_count
from mobiquant_compiler.slices import SlicedWeight
from mobiquant_compiler.spec import SliceSpec

_STEP = 0.05
_ROWS = 1 << 20  # weights worked on at a time


def stretches(narrowest: float) -> list[float]:
    """Return the ranges tried, as shares of the one that clips nothing: from slightly wider down to `narrowest`."""
    count = round((1.0 - narrowest) / _STEP)
    return [1.1, 1.05, *(1.0 - _STEP * i for i in range(count + 1))]


def weighted_grid(
    weight: Tensor,
    importance: Tensor,
    spec: SliceSpec,
    weights: Sequence[float],
    narrowest: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Choose scale and zero point of every group of a weight.

    Args:
        weight: [N, K] float32.
        importance: Mean square of the inputs, [K].
        spec: Slice widths and group.
        weights: What a squared error counts at each slice count, [E].
        narrowest: Share of a group's range that its base may be narrowed to, in (0, 1].
        dtype: What scale and zero point are stored in; candidates are judged as stored.

    Returns:
        Scale and zero point [N, groups] in `dtype`; both 0 for groups of zeros.
    """
    n, k = weight.shape
    padded = spec.padded(k)
    shape = spec.scale_shape(n, k)
    scale = torch.empty(shape, dtype=dtype, device=weight.device)
    zero = torch.empty_like(scale)
    counted = torch.nn.functional.pad(importance, (0, padded - k)).view(-1, spec.group)
    rows = max(1, _ROWS // padded)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        block = torch.nn.functional.pad(weight[part], (0, padded - k)).view(-1, padded // spec.group, spec.group)
        if k % spec.group:  # padding must not stretch the range: a real column stands in for it, and does not count
            block[:, -1, k % spec.group :] = block[:, -1, :1]
        scale[part], zero[part] = _best(block, counted, spec, weights, stretches(narrowest), dtype)
    return scale, zero


def _best(
    block: Tensor,
    counted: Tensor,
    spec: SliceSpec,
    weights: Sequence[float],
    tried: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point of least weighted error; block [N, groups, G], counted [groups, G]."""
    double = block.double()
    scale, zero = centred_grid(double, spec.widths[0], dtype)
    least = _error(block, counted, scale, zero, spec, weights)
    for other in exact_zero_grids(double, spec, judged_count(spec), dtype, tried):
        error = _error(block, counted, *other, spec, weights)
        better = error < least
        scale, zero = torch.where(better, other[0], scale), torch.where(better, other[1], zero)
        least = torch.where(better, error, least)
    empty = (block == 0).all(-1)
    return scale.masked_fill(empty, 0), zero.masked_fill(empty, 0)


def _error(
    block: Tensor, counted: Tensor, scale: Tensor, zero: Tensor, spec: SliceSpec, weights: Sequence[float]
) -> Tensor:
    scale, zero = scale.float().unsqueeze(-1), zero.float().unsqueeze(-1)
    codes = nearest_codes(block, scale, zero, spec)
    squares = (values_at(codes, scale, zero, spec) - block).square_()
    return sum(w * (s * counted).sum(-1) for w, s in zip(weights, squares, strict=True) if w)  # type: ignore[return-value]


def nearest_codes(weight: Tensor, scale: Tensor, zero: Tensor, spec: SliceSpec) -> Tensor:
    """Return the nearest code of each weight with all slices, whole numbers in the dtype of `weight`."""
    levels = 1 << spec.total_bits
    fine = levels >> spec.widths[0]
    position = torch.where(scale > 0, weight / scale, 0.0)
    return (position * fine + (zero * fine + fine / 2)).floor_().clamp_(0, levels - 1)


def clipped(weight: Tensor, scale: Tensor, zero: Tensor, spec: SliceSpec) -> int:
    """Return how many weights [N, K] lie outside the base cells of their group."""
    k = weight.shape[1]
    wide = (t.float().repeat_interleave(spec.group, 1)[:, :k] for t in (scale, zero))
    step, centre = wide
    position = torch.where(step > 0, weight / step, 0.0) + centre
    return int(((position < -0.5) | (position > (1 << spec.widths[0]) - 0.5)).sum())


def sliced(codes: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, spec: SliceSpec) -> SlicedWeight:
    """Return codes [N, K] as a `SlicedWeight`, padded."""
    padding = spec.padded(codes.shape[1]) - codes.shape[1]
    padded = torch.nn.functional.pad(codes, (0, padding))
    return SlicedWeight(padded, scale, zero, codes.shape[1], clipped(weight, scale, zero, spec))
