"""sliced_wgmma, run as plain Python on CPU tensors: every tile that a group is cut into, whatever the counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mobiquant_compiler.codegen.configs import Target, wgmma_spec
from mobiquant_compiler.kernels import gather_kernel
from mobiquant_compiler.runtime import fused
from mobiquant_compiler.runtime.launch import Weight
from mobiquant_compiler.spec import KernelSpec, SliceSpec
from tests import gluon_emulation
from tests.kernel_cases import Case, random_case
from tests.rounded_weights import unpacked_weights

SPEC = SliceSpec()
H100 = Target.of(90)
SIZES = ((0, 0, 0, 66), (1, 0, 0, 65), (1, 63, 64, 65), (127, 128, 129, 0), (33, 0, 257, 31), (255, 256, 0, 1))


class Emulated:
    """A kernel that is launched as plain Python."""

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec

    def launch(self, grid: tuple[int, ...], **arguments: Any) -> None:
        """Run all programs."""
        gluon_emulation.run(self.spec, grid, arguments)


def run(case: Case, small: bool, **tile: int) -> Tensor:
    """Multiply the tokens of a case."""
    k, weight = case.x.shape[-1], Weight(*case.arguments[2:])
    facts = {"row_unit": fused.row_unit(weight.rows), "has_bias": weight.bias is not None}
    kernel = Emulated(replace(wgmma_spec(case.spec, k, H100, small=small, **facts), **tile))
    return fused.multiply(kernel, fused.gather(gather_kernel(case.spec, k, H100), case.x, case.counts), weight)


def check(y: Tensor, case: Case) -> None:
    """Compare with weights rounded alike: what is left is the order of sums and one rounding of the output."""
    wanted = torch.empty(y.shape, dtype=torch.float64)
    for count in range(1, case.spec.num_slices + 1):
        weight = unpacked_weights(case.slices, case.scale, case.zero, case.spec, count, case.x)
        here = case.counts == count
        wanted[here] = case.x[here].double() @ weight[:, : case.x.shape[1]].t()
    wanted += 0 if case.bias is None else case.bias.double()
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[case.x.dtype]
    torch.testing.assert_close(y.double(), wanted, rtol=1.01 * rounding, atol=2e-4)


def with_groups(sizes: tuple[int, ...], n: int, k: int, **options: Any) -> Case:
    """Return a case with as many tokens of each count, shuffled."""
    counts = torch.repeat_interleave(torch.arange(1, len(sizes) + 1), torch.tensor(sizes)).int()
    case = random_case(options.pop("spec", SPEC), len(counts), n, k, **options)
    case.counts.copy_(counts[torch.randperm(len(counts), generator=torch.Generator().manual_seed(n))])
    return case


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_number_of_tokens_in_a_group(sizes: tuple[int, ...], small: bool) -> None:
    """Tiles of every width, full and nearly empty; rows and columns that fill no tile and no step."""
    case = with_groups(sizes, 130, 416, dtype=torch.bfloat16)
    check(run(case, small), case)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("tile", [{}, {"block_w": 1}, {"num_stages": 2}, {"num_stages": 3, "block_w": 2}], ids=str)
def test_columns_and_stages(tile: dict[str, int], small: bool) -> None:
    """Rings of stages that are filled once, in part and many times.

    Six stages, of small tiles, are there for words as well: with fewer the wait for activations holds them back.
    """
    for k in (33, 128, 256, 320, 704, 1024):
        case = with_groups((70, 5, 0, 67), 72, k, spec=SliceSpec(group=32), dtype=torch.bfloat16)
        check(run(case, small, **tile), case)


def test_half_precision_without_bias() -> None:
    case = replace(with_groups((40, 61), 64, 256, spec=SliceSpec((2, 2), 64), dtype=torch.float16), bias=None)
    check(run(case, False), case)


def test_tiles_do_not_change_what_a_token_gets() -> None:
    """One product of columns after the other, in every tile: bits depend on the columns alone."""
    case = with_groups((200, 40, 90, 129), 64, 512, dtype=torch.bfloat16)
    assert torch.equal(run(case, False), run(case, True))
