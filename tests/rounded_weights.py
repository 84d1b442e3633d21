"""The weights that `sliced_wgmma` multiplies by, rounded as its operands are, operation by operation."""

from __future__ import annotations

import torch
from torch import Tensor

from mobiquant_compiler.packing import unpack
from mobiquant_compiler.spec import SliceSpec
from tests.gluon_values import rounded

LIMITS = {torch.bfloat16: (8, -133), torch.float16: (11, -24)}


def to_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 once, to the nearest number of a dtype, and return it as float64."""
    return torch.from_numpy(rounded(value.numpy(), *LIMITS[dtype]))


def weights_of(codes: Tensor, scale: Tensor, zero: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return the weights of codes, float64.

    Shapes: codes of `count` slices, any; scale and zero, of the base slice, broadcast to them.
    """
    power, middle = 4.0 ** (count - 1), 2 ** (2 * count - 1)
    size = to_dtype(scale.double(), dtype)
    centre = (zero.double() * power + (power - 1) / 2).float()
    shift = to_dtype(((middle - centre) * (scale.float() / power)).double(), dtype)
    return to_dtype((codes.double() - middle) / power * size + shift, dtype)


def unpacked_weights(slices: Tensor, scale: Tensor, zero: Tensor, spec: SliceSpec, count: int, x: Tensor) -> Tensor:
    """Return a packed weight, [N, K_padded] float64, as it is multiplied by activations of the dtype of `x`."""
    codes = unpack(slices, spec, count).int()
    scale, zero = (value.repeat_interleave(spec.group, -1) for value in (scale, zero))
    return weights_of(codes, scale, zero, count, x.dtype)
