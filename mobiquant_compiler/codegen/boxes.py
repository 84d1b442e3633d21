"""Tensor descriptors: how kernels that copy boxes of tensors to shared memory see them (Gluon)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from mobiquant_compiler.spec import Activation, Family, KernelSpec

# Parts of BLOCK_M that tiles of sliced_wgmma have; a box is as many tokens by 64 columns, 128 bytes.
_HALVINGS = {"x_desc": 0, "x_half_desc": 1}
_X_COLUMNS = 64
_STEP_COLUMNS = 128  # of words that sliced_wgmma copies at a time


@dataclass(frozen=True, slots=True)
class Box:
    """What a kernel reads by a descriptor.

    Attributes:
        shape: Of a box.
        dtype: Triton's name of its elements, "" for those of the activations.
        bits: Of an element.
        swizzle: Bytes over which a row is permuted in shared memory, 0 for none.
    """

    shape: tuple[int, ...]
    dtype: str
    bits: int
    swizzle: int


def is_described(parameter: str) -> bool:
    """Say whether a kernel parameter takes a descriptor in place of a tensor."""
    return parameter.endswith("_desc")


def source_of(parameter: str) -> str:
    """Return the argument of a launch that a descriptor parameter describes."""
    return "x_ptr" if parameter in _HALVINGS else parameter.replace("_desc", "_ptr")


def box_of(parameter: str, spec: KernelSpec) -> Box:
    """Return the boxes that a kernel reads by a descriptor.

    Raises:
        KeyError: no template has such a parameter.
    """
    if parameter in _HALVINGS:
        return Box((spec.block_m >> _HALVINGS[parameter], _X_COLUMNS), "", 16, 128)
    halves = 2 if spec.activation is Activation.A16 else 1
    columns = _STEP_COLUMNS if spec.family is Family.SLICED_WGMMA else 2 * spec.group
    return {
        "acts_desc": Box((halves * spec.group // 64, spec.block_m, 128), "i8", 8, 128),
        "facts_desc": Box((2, 2 * spec.block_m), "fp32", 32, 0),
        "sums_desc": Box((2, spec.block_m), "i32", 32, 0),
        "slices_desc": Box((spec.block_n, columns // 16), "i32", 32, columns // 4),
    }[re.sub(r"\d", "", parameter)]


@dataclass(frozen=True, slots=True)
class Description:
    """How a parameter's descriptors are made; each launch makes some, so what they share is looked up once.

    Attributes:
        source: The argument of a launch that is described.
        shape: Of a box.
        layout: Of a box in shared memory.
        make: Returns a descriptor of a tensor, given these.
    """

    source: str
    shape: list[int]
    layout: Any
    make: Callable[[Tensor, list[int], Any], Any]

    def of(self, tensor: Tensor) -> Any:
        """Return the descriptor of a contiguous tensor of a box's dimensions; past its end boxes hold zeros."""
        return self.make(tensor, self.shape, self.layout)


def description(parameter: str, spec: KernelSpec) -> Description:
    """Return how descriptors of a parameter are made."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    box = box_of(parameter, spec)
    return Description(source_of(parameter), list(box.shape), _layout(box), TensorDescriptor.from_tensor)


def descriptor_type(parameter: str, spec: KernelSpec, dtype: str) -> str:
    """Return the Triton type of a descriptor parameter; `dtype` is that of activations, as "bf16"."""
    box = box_of(parameter, spec)
    return f"tensordesc<{box.dtype or dtype}{list(box.shape)},{_layout(box)!r}>"


@lru_cache(maxsize=32)
def _layout(box: Box) -> Any:
    """Return how a box lies in shared memory, as products of warpgroups, or lanes, read it."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(box.swizzle, box.bits, len(box.shape))
