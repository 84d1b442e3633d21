"""CPU path of the ops: vectorised torch that unpacks the weight of a slice count at most once per call.

Codes are combined four at a time inside their words and never brought into column order; the activations
are, which is cheaper by the number of output rows. No unpacked weight outlives the call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from mobiquant_compiler import reference
from mobiquant_compiler.packing import interleave, unit_views, unpack, unpack_interleaved
from mobiquant_compiler.slices import affine_at, reconstruct
from mobiquant_compiler.spec import SliceSpec

_CHUNK = 1 << 18  # weights unpacked at a time: the float32 tile (1 MB) stays in the L2 cache


def _pad(x: Tensor, spec: SliceSpec, dtype: torch.dtype) -> Tensor:
    missing = spec.padded(x.shape[-1]) - x.shape[-1]
    x = x.to(dtype)
    return pad(x, (0, missing)) if missing else x


def _activations(x: Tensor, spec: SliceSpec, dtype: torch.dtype) -> Tensor:
    """Bring activations [T, K] into the column order of `_weight`, [T, K_padded]."""
    x = _pad(x, spec, dtype)
    return interleave(x, spec) if spec.unit else x


def _weight(views: list[Tensor], scale: Tensor, zero: Tensor, spec: SliceSpec, count: int) -> Tensor:
    """Rebuild ``W_count`` [N, K_padded], in interleaved order, from slices of one width; scale is upcast already."""
    step, centre = affine_at(scale, zero, spec, count)
    codes = unpack_interleaved(views, spec.unit)
    n, places, _ = codes.shape
    tiles = codes.view(n, places, -1, spec.group // places).to(scale.dtype)
    tiles.sub_(centre.view(n, 1, -1, 1)).mul_(step.view(n, 1, -1, 1))
    return tiles.view(n, -1)


def _matmul(x: Tensor, count: int, slices: Tensor, scale: Tensor, zero: Tensor, spec: SliceSpec) -> Tensor:
    """Multiply activations [T, K_padded] (from `_activations`) by the weight of `count` slices, [T, N]."""
    n, k = scale.shape[0], x.shape[1]
    scale, zero = scale.to(x.dtype), zero.to(x.dtype)
    if not spec.unit:
        return linear(x, reconstruct(unpack(slices, spec, count), scale, zero, spec, count, x.dtype))
    views = unit_views(slices, spec, count)
    rows = max(16, _CHUNK // k)
    if n <= rows:
        return linear(x, _weight(views, scale, zero, spec, count))
    y = x.new_empty(x.shape[0], n)
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        weight = _weight([view[part] for view in views], scale[part], zero[part], spec, count)
        y[:, part] = linear(x, weight)
    return y


def route(x: Tensor, router: Sequence[Tensor], thresholds: Tensor, hist: Tensor, mask: Tensor, kind: str) -> Tensor:
    """`reference.route`; one token is counted without building index tensors."""
    if x.numel() != x.shape[-1]:
        return reference.route(x, router, thresholds, hist, mask, kind)
    scores = reference.SCORES[kind](x.view(1, -1), router)
    counts = 1 + (scores >= thresholds).to(torch.int32).cumprod(-1).sum(-1, dtype=torch.int32)
    if mask[0] == 1:
        reference.record(counts, hist, mask)
    else:
        hist[int(counts) - 1] += 1
    return counts.view(x.shape[:-1])


def slice_gemm(
    x: Tensor, offsets: Tensor, slices: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, spec: SliceSpec
) -> Tensor:
    """`reference.slice_gemm` without a second copy of the weight."""
    dtype = reference.accumulate_dtype(x)
    grouped = _activations(x, spec, dtype)
    y = torch.empty(x.shape[0], scale.shape[0], dtype=dtype)
    limits = offsets.tolist()
    for count in range(1, spec.num_slices + 1):
        start, stop = limits[count - 1], limits[count]
        if start < stop:
            y[start:stop] = _matmul(grouped[start:stop], count, slices, scale, zero, spec)
    return _finish(y, bias, x.dtype)


def routed_linear(
    x: Tensor, counts: Tensor, slices: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, spec: SliceSpec
) -> Tensor:
    """`reference.routed_linear`; tokens that all use one count are not reordered."""
    flat = counts.reshape(-1)
    if flat.numel() == 0:
        return x.new_empty(*counts.shape, scale.shape[0])
    low, high = (int(flat), int(flat)) if flat.numel() == 1 else (int(flat.min()), int(flat.max()))
    if low != high:
        rows, offsets, grouped = reference.gather(x, counts, spec.num_slices)
        return reference.scatter(slice_gemm(grouped, offsets, slices, scale, zero, bias, spec), rows, counts)
    tokens = _activations(x.reshape(-1, x.shape[-1]), spec, reference.accumulate_dtype(x))
    y = _matmul(tokens, low, slices, scale, zero, spec)
    return _finish(y, bias, x.dtype).view(*counts.shape, -1)


def _finish(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(dtype)
