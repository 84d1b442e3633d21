"""Tensor descriptors: how kernels that copy boxes of activations to shared memory see them (Gluon)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor

from mobiquant_compiler.spec import KernelSpec

# Parts of BLOCK_M that tiles of sliced_wgmma have; a box is as many tokens by 64 columns, 128 bytes.
_HALVINGS = {"x_desc": 0, "x_half_desc": 1, "x_quarter_desc": 2}
COLUMNS = 64


def is_described(parameter: str) -> bool:
    """Say whether a kernel parameter takes a descriptor in place of a tensor."""
    return parameter.endswith("_desc")


def box_of(parameter: str, spec: KernelSpec) -> list[int]:
    """Return the shape of the boxes that a kernel reads by a descriptor.

    Raises:
        KeyError: no template has such a parameter.
    """
    return [spec.block_m >> _HALVINGS[parameter], COLUMNS]


def describe(tensor: Tensor, parameter: str, spec: KernelSpec) -> Any:
    """Return the descriptor of a tensor [rows, columns] of 16-bit values, contiguous; past its end boxes hold zeros."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor.from_tensor(tensor, box_of(parameter, spec), _layout(spec.block_m >> _HALVINGS[parameter]))


def descriptor_type(parameter: str, spec: KernelSpec, dtype: str) -> str:
    """Return the Triton type of a descriptor parameter for values of `dtype`, as "bf16"."""
    rows, columns = box_of(parameter, spec)
    return f"tensordesc<{dtype}[{rows}, {columns}],{_layout(rows)!r}>"


@lru_cache(maxsize=8)
def _layout(rows: int) -> Any:
    """Return how a box lies in shared memory, as products of warpgroups read it."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for([rows, COLUMNS], gl.bfloat16)
