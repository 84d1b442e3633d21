"""Packed layouts: combined codes to and from int32 words.

Both layouts store slice e apart from slice e + 1 in one tensor ``[total_bits, N, K / 32]`` int32: slice e is the
contiguous run of ``b_e`` leading rows after those of the slices before it, so a prefix of the tensor is a prefix
of the slices.

- ``slice_major``: the run of slice e, seen as ``[N, K * b / 32]``: the code of ``k = (32/b) w + 4 i + j`` (j in
  0..3) sits at bits ``8 j + b i`` of word w, so ``(word >> b i) & mask`` is four codes, one per byte.
- ``bit_major``: the run is ``b_e`` planes ``[N, K / 32]``, most significant bit first; the bit of
  ``k = 32 w + 4 i + j`` sits at bit ``8 j + i``. A plane is a one-bit slice of the other layout.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mobiquant_compiler.spec import WORD_CODES, Layout, SliceSpec


def units(spec: SliceSpec, count: int) -> list[int]:
    """Return the widths of the packed units that hold the first `count` slices (planes in bit_major)."""
    return [1] * spec.bits(count) if spec.layout is Layout.BIT_MAJOR else list(spec.widths[:count])


def unit_views(slices: Tensor, spec: SliceSpec, count: int) -> list[Tensor]:
    """Return the packed units of the first `count` slices as views ``[N, K * width / 32]``.

    The only place in Python that knows where a slice lies in the packed tensor.
    """
    n = slices.shape[1]
    if spec.unit:  # units of one width: one view cut into pieces
        return list(slices[: spec.bits(count)].view(-1, n, slices.shape[2] * spec.unit).unbind(0))
    views, start = [], 0
    for width in units(spec, count):
        views.append(slices[start : start + width].reshape(n, -1))
        start += width
    return views


def byte_mask(width: int) -> int:
    """Return the word that keeps one `width`-bit code in each of four bytes."""
    return ((1 << width) - 1) * 0x01010101


def pack(codes: Tensor, spec: SliceSpec) -> Tensor:
    """Pack combined codes.

    Shapes: codes ``Q_E`` uint8 [N, K_padded]; returns int32 [total_bits, N, K_padded / 32].
    """
    n, k = codes.shape
    packed = torch.empty(spec.packed_shape(n, k), dtype=torch.int32, device=codes.device)
    left = spec.total_bits
    for view, width in zip(unit_views(packed, spec, spec.num_slices), units(spec, spec.num_slices), strict=True):
        left -= width
        unit = (codes >> left) & ((1 << width) - 1)
        fields = unit.view(n, -1, 8 // width, 4)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device).view(-1, 1)
        # sum keeps uint8: the fields of a byte do not overlap
        view.copy_((fields << shifts).sum(2, dtype=torch.uint8).view(torch.int32).view(n, -1))
    return packed


def unpack(slices: Tensor, spec: SliceSpec, count: int) -> Tensor:
    """Unpack the first `count` slices into combined codes in column order.

    Shapes: slices int32 [at least bits(count), N, K_padded / 32]; returns ``Q_count`` uint8 [N, K_padded].
    """
    n = slices.shape[1]
    combined: Tensor | None = None
    for view, width in zip(unit_views(slices, spec, count), units(spec, count), strict=True):
        codes = torch.stack([(view >> shift) & byte_mask(width) for shift in range(0, 8, width)], -1)
        unit = codes.view(torch.uint8).view(n, -1)
        combined = unit if combined is None else (combined << width) | unit
    assert combined is not None, "count is at least 1"
    return combined


@lru_cache(maxsize=16)
def _fields(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the shifts [1, 8 / width, 1] and the mask that take the codes out of a word, int32.

    Tensors, not numbers: torch wraps and casts a Python number at every call, which costs more than the shift.
    """
    with torch.inference_mode(False):
        shifts = torch.arange(0, 8, width, dtype=torch.int32, device=device).view(1, -1, 1)
        return shifts, torch.tensor(byte_mask(width), dtype=torch.int32, device=device)


def unpack_interleaved(views: list[Tensor], width: int, scratch: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Unpack slices of one width in the order that costs least, four codes at a time.

    Column ``k = per_word * w + 4 i + j`` lands at ``[n, i, 4 w + j]``; `interleave` brings activations into the
    same order.

    Args:
        views: Packed units of the slices used (`unit_views`, or some rows of each), int32 [N, words].
        width: Bits of each unit (`SliceSpec.unit`).
        scratch: Two int32 tensors of at least ``N * words * 8 / width`` elements to work in, the result included.

    Returns:
        Combined codes uint8 [N, 8 / width, 4 * words].
    """
    n, words = views[0].shape
    shifts, mask = _fields(width, views[0].device)
    shape = (n, 8 // width, words)  # also the order of memory: what comes out of broadcasting would be another
    if scratch is None:
        scratch = (mask.new_empty(shape), mask.new_empty(shape))
    places = [buffer.view(-1)[: n * words * 8 // width].view(shape) for buffer in scratch]
    combined: Tensor | None = None
    for number, view in enumerate(views):
        unit = places[number % 2]
        torch.bitwise_right_shift(view.unsqueeze(1), shifts, out=unit).bitwise_and_(mask)
        combined = unit if combined is None else torch.add(unit, combined, alpha=1 << width, out=unit)
    assert combined is not None, "at least one slice is used"
    return combined.view(torch.uint8)


def interleave(x: Tensor, spec: SliceSpec) -> Tensor:
    """Bring activations [T, K_padded] into the column order of `unpack_interleaved`, still [T, K_padded]."""
    tokens, k = x.shape
    places = 8 // spec.unit
    return x.view(tokens, k // (4 * places), places, 4).transpose(1, 2).reshape(tokens, k)


def pack_reference(codes: Tensor, spec: SliceSpec) -> Tensor:
    """Pack combined codes one bit field at a time: the slow definition that `pack` must equal."""
    n, k = codes.shape
    words = torch.zeros(spec.packed_shape(n, k), dtype=torch.int64)
    before = 0
    for width in units(spec, spec.num_slices):
        per_word = WORD_CODES // width
        flat = words[before : before + width].view(n, -1)
        unit = (codes.long() >> (spec.total_bits - before - width)) & ((1 << width) - 1)
        for column in range(k):
            word, place = divmod(column, per_word)
            flat[:, word] |= unit[:, column] << (8 * (place % 4) + width * (place // 4))
        before += width
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
