"""The base grid of a group: which scale and zero point the slices start from, chosen from the weights alone.

Two kinds of grid compete in every group, and the one with the least squared error at the precision that matters
most (the first slice count with at least four bits) wins:

- *centred*: the base cells tile the group's range exactly;
- *exact zero*: the zero point lies on the grid of that precision, so that a weight of 0 stays 0 there, with a few
  scales from the smallest that covers the range upward.

No candidate clips: the base scale decides every precision, and what it cuts off no further slice can bring back.
The choice matters at four bits; at six and eight the kinds of grid are as good as one another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mobiquant_compiler.spec import SliceSpec

STRETCHES = (1.0, 1.025, 1.05, 1.075, 1.1, 1.125, 1.15)  # scales tried, over the smallest that covers the range
OFFSETS = (0, -1, 1)  # zero points tried, around the one that needs the smallest scale
_JUDGED_BITS = 4


def judged_count(spec: SliceSpec) -> int:
    """Return the slice count at which grids are compared: the first with at least four bits, else all slices."""
    counts = range(1, spec.num_slices + 1)
    return next((count for count in counts if spec.bits(count) >= _JUDGED_BITS), spec.num_slices)


def choose_grid(weight: Tensor, spec: SliceSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Choose the base scale and zero point of every group.

    Args:
        weight: [N, groups, G] float64.
        spec: Slice widths.
        dtype: What scale and zero point are stored in; candidates are judged as stored.

    Returns:
        Scale and zero point [N, groups] in `dtype`; both 0 for groups of zeros.
    """
    single = weight.float()
    count = judged_count(spec)
    scale, zero = centred_grid(weight, spec.widths[0], dtype)
    least = _error(single, scale, zero, spec, count)
    for other_scale, other_zero in exact_zero_grids(weight, spec, count, dtype):
        error = _error(single, other_scale, other_zero, spec, count)
        better = error < least
        scale, zero = torch.where(better, other_scale, scale), torch.where(better, other_zero, zero)
        least = torch.where(better, error, least)
    empty = (weight == 0).all(-1)
    return scale.masked_fill(empty, 0), zero.masked_fill(empty, 0)


def centred_grid(weight: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the grid whose ``2**bits`` cells are centred on the group's range.

    Both numbers are rounded to the dtype they are stored in, and the scale is widened by what that rounding can cost.

    Shapes: weight [N, groups, G] float64; returns scale and zero [N, groups].
    """
    low, high = weight.amin(-1), weight.amax(-1)
    cells = 1 << bits
    middle = (low + high) / 2
    # A group of equal values has no range: give it a step that still resolves the value itself.
    span = torch.maximum(high - low, middle.abs() / 1024)
    ulp = torch.finfo(dtype).eps
    widened = (span + 2 * ulp * middle.abs() + span * cells * ulp) / cells
    scale = round_up(widened.clamp_min(torch.finfo(dtype).tiny), dtype)
    return scale, ((cells - 1) / 2 - middle / scale.double()).to(dtype)


def exact_zero_grids(
    weight: Tensor, spec: SliceSpec, count: int, dtype: torch.dtype, stretches: Sequence[float] = STRETCHES
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield grids on which 0 is a value of `count` slices: ``Z_count = z 2^m + (2^m - 1) / 2`` is an integer n.

    With ``z = (n - (2^m - 1) / 2) / 2^m`` the range is covered iff ``s >= -low / (z + 1/2)`` and
    ``s >= high / (2^b - 1/2 - z)``. These z are short binary fractions, so storing them costs nothing. A stretch
    below 1 clips.

    Shapes: weight [N, groups, G] float64; yields scale and zero [N, groups].
    """
    levels = 1 << spec.bits(count)
    fine = levels >> spec.widths[0]  # cells of `count` slices in one base cell, 2^m
    low, high = weight.amin(-1).clamp_max(0), weight.amax(-1).clamp_min(0)
    zeros = (torch.arange(levels, dtype=torch.float64, device=weight.device) - (fine - 1) / 2) / fine
    needed = torch.maximum(-low.unsqueeze(-1) / (zeros + 0.5), high.unsqueeze(-1) / (levels / fine - 0.5 - zeros))
    best = needed.argmin(-1, keepdim=True)
    tiny = torch.finfo(dtype).tiny
    for offset in OFFSETS:
        index = (best + offset).clamp(0, levels - 1)
        smallest = needed.gather(-1, index).squeeze(-1)
        zero = zeros[index.squeeze(-1)].to(dtype)
        for stretch in stretches:
            yield round_up((smallest * stretch).clamp_min(tiny), dtype), zero


def _error(weight: Tensor, scale: Tensor, zero: Tensor, spec: SliceSpec, count: int) -> Tensor:
    """Return the squared error of each group with `count` slices, [N, groups] float32; nothing is clipped."""
    levels = 1 << spec.bits(count)
    fine = levels >> spec.widths[0]
    step = (scale.float() / fine).unsqueeze(-1)
    centre = (zero.float() * fine + (fine - 1) / 2).unsqueeze(-1)
    codes = (weight / step).add_(centre + 0.5).floor_().clamp_(0, levels - 1)
    return codes.sub_(centre).mul_(step).sub_(weight).square_().sum(-1)


def round_up(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 `value` >= 0 up to the next number that `dtype` holds."""
    stored = value.to(dtype)
    low = stored.double() < value
    return torch.where(low, torch.nextafter(stored, torch.full_like(stored, torch.inf)), stored)
