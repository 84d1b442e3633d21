"""How far results may be from what they should be: kernels by output dtype (variance one), the rest relative."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """Absolute and relative difference allowed, and why."""

    atol: float
    rtol: float
    reason: str


# Fixed point of 16 bits per group has a step of at most 2**-14 of the group's largest value, about 3 for normal data:
# an rms error of 3e-5 to 5e-5 of the output, five times that at the worst of 1e5 outputs.
TOLERANCES = {
    torch.float32: Tolerance(3e-4, 1e-5, "16-bit fixed point"),
    torch.float16: Tolerance(3e-4, 1e-3, "16-bit fixed point, one rounding to 11 bits"),
    torch.bfloat16: Tolerance(3e-4, 8e-3, "16-bit fixed point, one rounding to 8 bits"),
}
# A step of largest / 127: an rms error of 7e-3, five times that at the worst output.
A8_TOLERANCE = Tolerance(4e-2, 8e-3, "8-bit fixed point")
# Weights rounded to the dtype of activations: an rms error of 1.7e-3 (bfloat16) or 2.1e-4 (float16) of the output, five
# times that at the worst of 1e6 outputs. Before a bias is added the product is rounded as well: by up to half a unit of
# its own size, which the sum need not have.
WORKSPACE_TOLERANCES = {
    torch.float32: Tolerance(3e-5, 1e-5, "float32 sums in another order"),
    torch.float16: Tolerance(4e-3, 1e-3, "weights, and outputs before the bias, rounded to 11 bits"),
    torch.bfloat16: Tolerance(2e-2, 8e-3, "weights, and outputs before the bias, rounded to 8 bits"),
}
WORKSPACE_RMS = 3e-3  # of all outputs in bfloat16: weights and two roundings of the output 1.7e-3 each, uncorrelated
# Scale, offset and weight rounded: 2.5e-3 of the output in bfloat16, an eighth in float16; one rounding of the output.
FUSED_RMS = {torch.bfloat16: 4e-3, torch.float16: 6e-4}


class Relative(NamedTuple):
    """Largest error allowed over the largest wanted magnitude, and why."""

    error: float
    reason: str


COMPILED = Relative(1e-5, "float32 sums in another order: Inductor fuses what eager runs op by op")
NETWORK_SCORES = Relative(5e-5, "float32 sums of the first layer, whose error the second carries into an exponential")
EXACT_MATH = Relative(1e-5, "float32 products and sums against float64")
SEVERAL_LAYERS = Relative(1e-4, "float32 sums in another order, through the softmaxes and norms of a model")
RESULTS = {
    torch.float64: Relative(1e-12, "float64 sums in another order"),
    torch.float32: Relative(1e-5, "float32 sums in another order"),
    torch.bfloat16: Relative(2**-7, "one rounding to 8 bits of mantissa at the end"),
    torch.float16: Relative(2**-10, "one rounding to 11 bits of mantissa at the end"),
}


# The integer path with float32 outputs, by the bits of its activations, in norm: the rms errors above are 4e-5 and
# 7e-3 of the output for every width, group and layout.
INTEGER_NORM = {"a16": Relative(1e-4, "16-bit fixed point"), "a8": Relative(1e-2, "8-bit fixed point")}


def relative_norm(actual: Tensor, wanted: Tensor) -> float:
    """Return the norm of the error over the norm of what was wanted."""
    assert actual.shape == wanted.shape, f"{tuple(actual.shape)} is not {tuple(wanted.shape)}"
    return float((actual.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-300))


def relative_error(actual: Tensor, wanted: Tensor) -> float:
    """Return the largest error over the largest wanted magnitude (0 for empty tensors)."""
    assert actual.shape == wanted.shape, f"{tuple(actual.shape)} is not {tuple(wanted.shape)}"
    if not wanted.numel():
        return 0.0
    scale = wanted.detach().double().abs().max().clamp_min(1e-300)
    return float((actual.detach().double() - wanted.detach().double()).abs().max() / scale)


def assert_near(actual: Tensor, wanted: Tensor, tolerance: Relative) -> None:
    """Fail, with the reason of the tolerance, where `actual` is too far from `wanted`."""
    error = relative_error(actual, wanted)
    assert error <= tolerance.error, f"relative error {error:.2e} > {tolerance.error:.0e} ({tolerance.reason})"
