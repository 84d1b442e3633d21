"""MoBiSlice: the arithmetic of residual slices (MoBiQuant, arXiv 2602.20191, section 3; docs/architecture.md).

A weight becomes one unsigned integer per element, ``Q_E``, whose leading bits are the base slice and whose
further bits are the residual slices. With ``m_k = b_2 + ... + b_k`` the first k slices give

    Q_k = Q_E >> (bits after slice k),   s_k = s / 2**m_k,   Z_k = z * 2**m_k + (2**m_k - 1) / 2,
    W_k = s_k * (Q_k - Z_k)

so that one scale and one zero point serve every precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mobiquant_compiler.errors import BadWeightShape, GroupTooLarge, NonFiniteWeight, UnsupportedDtype
from mobiquant_compiler.grid import choose_grid
from mobiquant_compiler.spec import SliceSpec

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CHUNK = 1 << 17  # weights worked on at a time: the float64 working set stays in the cache and below ten MB


@dataclass(frozen=True, slots=True)
class SlicedWeight:
    """A weight as combined codes.

    Attributes:
        codes: ``Q_E`` uint8 [N, K_padded]; padding columns hold 0.
        scale: Base step s, [N, K_padded / group], stored dtype.
        zero: Base zero point z (a float), same shape and dtype.
        k: Input columns before padding.
        clipped: Weights that lie outside the base cells, for which `slice_bound` says nothing.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    k: int
    clipped: int


def residual_bits(spec: SliceSpec, count: int) -> int:
    """Return ``m_k``: how many bits the slices after the base add when ``count`` slices are used."""
    return spec.bits(count) - spec.widths[0]


def affine_at(scale: Tensor, zero: Tensor, spec: SliceSpec, count: int) -> tuple[Tensor, Tensor]:
    """Return ``(s_k, Z_k)`` for ``count`` slices, in the dtype of `scale` and `zero` as given (upcast first)."""
    power = 1 << residual_bits(spec, count)
    return scale / power, zero * power + (power - 1) / 2


def check_weight(weight: Tensor, spec: SliceSpec, where: str) -> None:
    """Raise the error that says why `weight` cannot become slices, if it cannot."""
    if weight.dtype not in WEIGHT_DTYPES:
        raise UnsupportedDtype(where=where, got=weight.dtype, wanted=[str(d) for d in WEIGHT_DTYPES])
    if weight.dim() != 2 or 0 in weight.shape:
        raise BadWeightShape(where=where, got=tuple(weight.shape), wanted="[out_features, in_features], both above 0")
    if weight.shape[1] < min(spec.group, 32):
        raise GroupTooLarge(where=where, k=weight.shape[1], group=spec.group)
    weight = weight.detach()
    # What float32 cannot hold cannot be computed with either.
    finite = torch.isfinite(weight.float() if weight.dtype is torch.float64 else weight)
    if not bool(finite.all()):
        row, column = (~finite).nonzero()[0].tolist()
        raise NonFiniteWeight(where=where, count=int((~finite).sum()), row=row, column=column)


def _encode(weight: Tensor, scale: Tensor, zero: Tensor, spec: SliceSpec) -> tuple[Tensor, Tensor]:
    """Return ``Q_E`` uint8 and which weights were clipped, for float64 weight [N, groups, G]."""
    rest = 1 << residual_bits(spec, spec.num_slices)
    cells = 1 << spec.widths[0]
    step = scale.double().unsqueeze(-1)
    position = torch.where(step > 0, weight / step, 0.0) + zero.double().unsqueeze(-1)  # in cells, centres at integers
    base = position.round().clamp_(0, cells - 1)
    # Nested floors of the residual slices are one floor: each slice halves the interval b_e times.
    residual = torch.floor((position - base + 0.5) * rest).clamp_(0, rest - 1)
    outside = (position < -0.5) | (position > cells - 0.5)
    return (base * rest + residual).to(torch.uint8), outside


def storage_dtype(weight: Tensor, wanted: torch.dtype) -> torch.dtype:
    """Return the dtype of scale and zero point: as wanted, or float32 where a group's step is out of its range."""
    limit = torch.finfo(wanted)
    largest = float(weight.abs().amax())
    return torch.float32 if largest > limit.max / 4 or 0 < largest < limit.tiny * 1024 else wanted


def slice_weight(
    weight: Tensor, spec: SliceSpec, *, scale_dtype: torch.dtype = torch.float16, where: str = "weight"
) -> SlicedWeight:
    """Turn a weight into residual slices, data-free.

    Args:
        weight: [N, K] float32, bfloat16, float16 or float64, finite.
        spec: Slice widths, group and layout (the layout does not matter here).
        scale_dtype: Dtype that scale and zero point are stored in; falls to float32 where a group's step
            is out of its range.
        where: Name of the weight for messages.

    Returns:
        Combined codes with scale and zero point of each group.

    Raises:
        WeightError: unsupported dtype or shape, or a value that is not finite.

    Source: MoBiQuant section 3.1 (recursive residual quantization), cells as docs/architecture.md has them ("Slices").
    """
    check_weight(weight, spec, where)
    n, k = weight.shape
    padded = spec.padded(k)
    scale_dtype = storage_dtype(weight, scale_dtype)
    codes = torch.zeros(n, padded, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(spec.scale_shape(n, k), dtype=scale_dtype, device=weight.device)
    zero = torch.empty_like(scale)
    clipped = 0
    rows = max(1, _CHUNK // padded)
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        block = torch.nn.functional.pad(weight[part].double(), (0, padded - k))
        grouped = block.view(block.shape[0], -1, spec.group)
        # The grid of a padded group is that of its real columns: padding must not stretch the range.
        scale[part], zero[part] = _grid(grouped, k, spec, scale_dtype)
        encoded, outside = _encode(grouped, scale[part], zero[part], spec)
        codes[part, :k] = encoded.view(-1, padded)[:, :k]
        clipped += int(outside.view(-1, padded)[:, :k].sum())
    return SlicedWeight(codes, scale, zero, k, clipped)


def _grid(grouped: Tensor, k: int, spec: SliceSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    tail = k % spec.group
    if not tail:
        return choose_grid(grouped, spec, dtype)
    grouped = grouped.clone()
    grouped[:, -1, tail:] = grouped[:, -1, :1]  # repeat a real column where padding would be
    return choose_grid(grouped, spec, dtype)


def reconstruct(
    codes: Tensor, scale: Tensor, zero: Tensor, spec: SliceSpec, count: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rebuild the weight from the first `count` slices.

    Args:
        codes: ``Q_count`` uint8 [N, K_padded], the codes of the first `count` slices combined
            (``Q_E >> bits after them``, or what `packing.unpack` returns).
        scale: [N, K_padded / group].
        zero: Same shape.
        spec: Widths and group.
        count: Slices used, 1..E.
        dtype: Dtype of the arithmetic and of the result.

    Returns:
        ``W_count`` [N, K_padded].
    """
    step, centre = affine_at(scale.to(dtype), zero.to(dtype), spec, count)
    grouped = codes.view(codes.shape[0], -1, spec.group).to(dtype)
    grouped = (grouped - centre.unsqueeze(-1)) * step.unsqueeze(-1)
    return grouped.view(codes.shape)


def slice_bound(scale: Tensor, spec: SliceSpec, count: int) -> Tensor:
    """Return the largest error of any unclipped weight with `count` slices, ``s_count / 2`` per group.

    Shapes: scale [N, groups]; returns [N, groups] float64, in units of the weight.
    """
    return scale.double() / (1 << residual_bits(spec, count)) / 2


def output_bound(x: Tensor, scale: Tensor, spec: SliceSpec, count: int) -> Tensor:
    """Return a certain bound on ``|y - y_count|`` per token and output row.

    ``sum_g s_{count,g} / 2 * ||x_g||_1`` for unclipped weights.

    Shapes: x [T, K]; scale [N, groups]; returns [T, N] float64.
    """
    padded = torch.nn.functional.pad(x.double(), (0, spec.padded(x.shape[-1]) - x.shape[-1]))
    norms = padded.view(x.shape[0], -1, spec.group).abs().sum(-1)
    return norms @ slice_bound(scale, spec, count).t()
