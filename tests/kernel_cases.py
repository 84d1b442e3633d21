"""Inputs for kernel tests, the same for the interpreter and the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mobiquant_compiler import reference
from mobiquant_compiler.packing import pack
from mobiquant_compiler.spec import Layout, SliceSpec

SLICE, BIT = Layout.SLICE_MAJOR, Layout.BIT_MAJOR
SPECS = (
    SliceSpec((2, 2, 2, 2), 128, SLICE),
    SliceSpec((2, 2, 2, 2), 64, BIT),
    SliceSpec((2, 2, 2, 2), 32, SLICE),
    SliceSpec((4, 2, 2), 64, SLICE),
    SliceSpec((4, 2, 2), 128, BIT),
    SliceSpec((3, 3, 2), 32, BIT),
    SliceSpec((1,) * 8, 128, BIT),
    SliceSpec((1,) * 8, 64, SLICE),
    SliceSpec((4, 4), 32, SLICE),
    SliceSpec((2,), 64, SLICE),
    SliceSpec((4, 4), 128, SLICE),
    SliceSpec((1, 1, 2, 4), 32, SLICE),
)

# Columns for tests on a device, where every number of them is another kernel to compile: chains of groups come out even
# in any group size, or some are a step longer and the last group is cut off. Sums of `integer_case` are still exact.
EVEN_K, UNEVEN_K = 2048, 2200


@dataclass(frozen=True)
class Case:
    """Arguments of one routed linear."""

    spec: SliceSpec
    x: Tensor
    counts: Tensor
    slices: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """The tensors in the order of the op."""
        return (self.x, self.counts, self.slices, self.scale, self.zero, self.bias)

    def expected(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the reference's result with sums in `dtype`, before rounding to the dtype of x."""
        bias = None if self.bias is None else self.bias.to(dtype)
        weight = (self.slices, self.scale, self.zero)
        return reference.routed_linear(self.x.to(dtype), self.counts, *weight, bias, self.spec)


def spec_id(spec: SliceSpec) -> str:
    """Name a spec in test ids."""
    return f"{''.join(map(str, spec.widths))}-g{spec.group}-{spec.layout}"


def shares_runs(spec: SliceSpec) -> bool:
    """Say whether a lane's words of a pair of groups are one or two words of each group, in every unit."""
    units = {1} if spec.layout is Layout.BIT_MAJOR else set(spec.widths)
    return all(spec.group * unit in (128, 256) for unit in units)


def integer_case(
    spec: SliceSpec,
    tokens: int,
    n: int,
    k: int,
    *,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    largest: int = 4,
) -> Case:
    """Return small integers and power-of-two scales, for which every sum is exact in float32 (k up to 2200).

    A weight is a multiple of 2**-9 below 16 (fewer bits below the point where there are more above it), and an
    activation an integer up to `largest`: sums of 2200 products have at most 24 bits.
    """
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << spec.total_bits, (n, spec.padded(k)), generator=g, dtype=torch.uint8)
    codes[:, k:] = 0
    shape = spec.scale_shape(n, k)
    scale = 2.0 ** torch.randint(-1, 1, shape, generator=g)
    zero = torch.randint(0, 7, shape, generator=g) / 2
    x = torch.randint(-largest, largest + 1, (tokens, k), generator=g)
    offset = torch.randint(-8, 9, (n,), generator=g).to(dtype) if bias else None
    counts = torch.randint(1, spec.num_slices + 1, (tokens,), generator=g, dtype=torch.int32)
    tensors = (x.to(dtype), counts, pack(codes, spec), scale.half(), zero.half(), offset)
    return Case(spec, *(t if t is None else t.to(device) for t in tensors))


def random_case(
    spec: SliceSpec,
    tokens: int,
    n: int,
    k: int,
    *,
    dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype = torch.float16,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """Return normal activations and a weight whose outputs have variance about one."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << spec.total_bits, (n, spec.padded(k)), generator=g, dtype=torch.uint8)
    codes[:, k:] = 0
    shape = spec.scale_shape(n, k)
    cells = 1 << spec.widths[0]
    scale = (0.5 + torch.rand(shape, generator=g)) * 12**0.5 / cells / k**0.5
    zero = (cells - 1) / 2 + torch.rand(shape, generator=g) - 0.5
    x = torch.randn(tokens, k, generator=g)
    bias = torch.randn(n, generator=g).to(dtype)
    counts = torch.randint(1, spec.num_slices + 1, (tokens,), generator=g, dtype=torch.int32)
    tensors = (x.to(dtype), counts, pack(codes, spec), scale.to(scale_dtype), zero.to(scale_dtype), bias)
    return Case(spec, *(t.to(device) for t in tensors))
