"""CPU path of the ops: vectorised torch that unpacks the weight of a slice count at most once per call.

Codes are combined four at a time inside their words and never brought into column order; the activations
are, which is cheaper by the number of output rows. Nothing is unpacked twice in a call, and nothing is kept for the
next one but the memory it was done in.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from mobiquant_compiler import reference
from mobiquant_compiler.packing import interleave, unit_views, unpack, unpack_interleaved
from mobiquant_compiler.slices import affine_at, reconstruct
from mobiquant_compiler.spec import Activation, Prefill, SliceSpec

_CHUNK = 1 << 20  # weights unpacked at a time: a float32 tile of 4 MB; smaller ones pay more in calls than they save


def _pad(x: Tensor, spec: SliceSpec, dtype: torch.dtype) -> Tensor:
    missing = spec.padded(x.shape[-1]) - x.shape[-1]
    x = x.to(dtype)
    return pad(x, (0, missing)) if missing else x


def _activations(x: Tensor, spec: SliceSpec, dtype: torch.dtype) -> Tensor:
    """Bring activations [T, K] into the column order of `_weight`, [T, K_padded]."""
    x = _pad(x, spec, dtype)
    return interleave(x, spec) if spec.unit else x


class _Workspace(threading.local):
    """Memory that unpacking works in, 6 MB a thread, kept: fresh pages at every call cost as much as the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, numel: int, dtype: torch.dtype) -> Tensor:
        """Return `numel` elements whose contents mean nothing."""
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < numel:
            with torch.inference_mode(False):  # to be written to in any mode
                buffer = self._buffers[name, dtype] = torch.empty(numel, dtype=dtype)
        return buffer[:numel]


_WORKSPACE = _Workspace()


def _weight(views: list[Tensor], scale: Tensor, zero: Tensor, spec: SliceSpec, count: int) -> Tensor:
    """Rebuild ``W_count`` [N, K_padded], in interleaved order, from slices of one width; scale is upcast already.

    The result lies in the workspace: it is good until the next call.
    """
    step, centre = affine_at(scale, zero, spec, count)
    n, places, words = scale.shape[0], 8 // spec.unit, views[0].shape[1]
    quads = n * places * words
    scratch = (_WORKSPACE.take("even", quads, torch.int32), _WORKSPACE.take("odd", quads, torch.int32))
    codes = unpack_interleaved(views, spec.unit, scratch).view(n, places, -1, spec.group // places)
    tiles = _WORKSPACE.take("tile", codes.numel(), scale.dtype).view(codes.shape).copy_(codes)
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


def route(
    x: Tensor,
    router: Sequence[Tensor],
    thresholds: Tensor,
    hist: Tensor,
    mask: Tensor,
    kind: str,
    prefill: Prefill = Prefill.ROUTED,
) -> Tensor:
    """`reference.route`; one token is counted without building index tensors."""
    if x.numel() != x.shape[-1]:
        return reference.route(x, router, thresholds, hist, mask, kind, prefill)
    scores = reference.SCORES[kind](x.view(1, -1), router)
    # Numbers instead of tensors: a dozen calls on three elements would cost as much as the linear itself.
    count = 1
    for score, threshold in zip(scores[0].tolist(), thresholds.tolist(), strict=True):
        if not score >= threshold:
            break
        count += 1
    described, real = mask[:2].tolist()
    if described != 1 or real:
        hist[count - 1].add_(1)
    return torch.full(x.shape[:-1], count, dtype=torch.int32)


def slice_gemm(
    x: Tensor,
    offsets: Tensor,
    slices: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    spec: SliceSpec,
    activation: Activation = Activation.A16,
    prefill: Prefill = Prefill.ROUTED,
) -> Tensor:
    """`reference.slice_gemm` without a second copy of the weight."""
    grouped = _activations(x, spec, reference.accumulate_dtype(x))
    return _finish(_multiply(grouped, offsets.tolist(), slices, scale, zero, spec), bias, x.dtype)


def _multiply(
    grouped: Tensor, limits: Sequence[int], slices: Tensor, scale: Tensor, zero: Tensor, spec: SliceSpec
) -> Tensor:
    """Multiply activations (from `_activations`) whose slice counts change at `limits`, [T, N]."""
    y = grouped.new_empty(grouped.shape[0], scale.shape[0])
    for count in range(1, spec.num_slices + 1):
        start, stop = limits[count - 1], limits[count]
        if start < stop:
            y[start:stop] = _matmul(grouped[start:stop], count, slices, scale, zero, spec)
    return y


def routed_linear(
    x: Tensor,
    counts: Tensor,
    slices: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    spec: SliceSpec,
    activation: Activation = Activation.A16,
    prefill: Prefill = Prefill.ROUTED,
) -> Tensor:
    """`reference.routed_linear`; tokens that all use one count are not reordered."""
    return routed_linears(x, counts, [slices], [scale], [zero], [bias], spec)[0]


def routed_linears(
    x: Tensor,
    counts: Tensor,
    slices: Sequence[Tensor],
    scale: Sequence[Tensor],
    zero: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    spec: SliceSpec,
    activation: Activation = Activation.A16,
    prefill: Prefill = Prefill.ROUTED,
) -> list[Tensor]:
    """`reference.routed_linears`; activations are grouped and brought into the order of the codes once for all."""
    flat = counts.reshape(-1)
    if flat.numel() == 0:
        return [x.new_empty(*counts.shape, weight.shape[0]) for weight in scale]
    weights = list(zip(slices, scale, zero, strict=True))
    low, high = (int(flat), int(flat)) if flat.numel() == 1 else (int(flat.min()), int(flat.max()))
    if low == high:
        tokens = _activations(x.reshape(-1, x.shape[-1]), spec, reference.accumulate_dtype(x))
        products = [_finish(_matmul(tokens, low, *w, spec), b, x.dtype) for w, b in zip(weights, bias, strict=True)]
        return [y.view(*counts.shape, y.shape[-1]) for y in products]
    rows, offsets, grouped = reference.gather(x, counts, spec.num_slices)
    grouped, limits = _activations(grouped, spec, reference.accumulate_dtype(x)), offsets.tolist()
    products = [_finish(_multiply(grouped, limits, *w, spec), b, x.dtype) for w, b in zip(weights, bias, strict=True)]
    return [reference.scatter(y, rows, counts) for y in products]


def _finish(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(dtype)
