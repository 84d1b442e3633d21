"""Where operands of the fused kernel come from: every lane and register against the layout of packed words."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon")

from mobiquant_compiler.codegen import operands
from mobiquant_compiler.packing import pack, unit_views
from mobiquant_compiler.spec import SliceSpec
from tests import gluon_emulation
from tests.gluon_values import Value, run_ptx
from tests.rounded_weights import weights_of

LANES = range(32)


def places(bases: list[list[int]], number: int) -> tuple[int, int]:
    """Return the coordinates that the bits of `number` stand for."""
    chosen = [base for bit, base in enumerate(bases) if number >> bit & 1]
    return sum(base[0] for base in chosen), sum(base[1] for base in chosen)


def operand_places(lane: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (row, column of 16, half h, place b) of what a lane holds of operand A, m64k16, by the PTX manual."""
    for register in range(4):
        for b in range(2):
            row, h = lane // 4 + 8 * (register % 2), register // 2
            yield row, 2 * (lane % 4) + b + 8 * h, h, b


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jitted functions be called on integers and tensors."""
    for name in ("even_pairs", "odd_pairs", "join_words"):
        monkeypatch.setattr(operands, name, getattr(operands, name).fn)
    monkeypatch.setattr(operands, "chosen", lambda ones, zeros, mask: (ones & mask) | (zeros & ~mask))
    monkeypatch.setattr(operands, "gl", SimpleNamespace(static_assert=lambda *args: None))


def test_columns_are_a_permutation_in_which_words_stay_whole() -> None:
    columns = [operands.column_of(place) for place in range(128)]
    assert sorted(columns) == list(range(128))
    for place, column in enumerate(columns):
        assert column // 16 == 2 * ((place % 8) // 2) + place // 64, "word 2 t + j"


@pytest.mark.parametrize("warps", [4, 8])
def test_a_lane_loads_the_words_whose_columns_it_feeds(warps: int) -> None:
    layout = operands.word_layout(8, warps)
    seen = set()
    for warp in range(warps):
        for lane in LANES:
            for register in range(4):
                parts = [
                    places(layout.reg_bases, register),
                    places(layout.lane_bases, lane),
                    places(layout.warp_bases, warp),
                ]
                row, word = (sum(part[axis] for part in parts) for axis in range(2))
                assert row == 16 * warp + lane // 4 + 8 * (register >> 1)
                assert word == 2 * (lane % 4) + (register & 1)
                seen.add((row, word))
    assert seen == {(row, word) for row in range(16 * warps) for word in range(8)}


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_field_is_the_one_that_packing_put_there(count: int) -> None:
    """A lane's operand at a place is the code of the column that stands at that place among activations."""
    spec = SliceSpec((2, 2, 2, 2), 128)
    codes = torch.randint(0, 256, (16, 256), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    units = unit_views(pack(codes, spec), spec, count)
    wanted = codes >> (8 - 2 * count)
    for step in range(2):
        for half in range(2):
            for t in range(4):
                words = tuple(unit[:, 8 * step + 2 * t + half] for unit in units)
                joined = operands.join_words(words, count)
                for index in range(4):
                    for lane in (lane for lane in LANES if lane % 4 == t):
                        for row, k, h, b in operand_places(lane):
                            code = int(joined[index][row]) >> 8 * (2 * h + b) & 255
                            column = operands.column_of(64 * half + 16 * index + k)
                            assert code == wanted[row, 128 * step + column]


@pytest.mark.parametrize("mask", [0x33333333, 0, 0x7FFF0001])
def test_bits_are_chosen_by_one_instruction(mask: int) -> None:
    ones, zeros = torch.randint(-(2**31), 2**31, (2, 64), generator=torch.Generator().manual_seed(1)).int()
    (found,) = run_ptx(operands.select_assembly(mask), [ones.numpy(), zeros.numpy()], 1)
    assert torch.equal(torch.from_numpy(found.view(np.int32)), (ones & mask) | (zeros & ~mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_constants_of_two_halves(dtype: torch.dtype) -> None:
    kernel = gluon_emulation.helpers()["operands"]
    exact = (-130.0, -34.0) if dtype is torch.bfloat16 else (-1026.0, -258.0, -66.0, -18.125)
    for value in (1.0, 2.0**-6, 0.25, -2.125, -1.984375, *exact):
        both = torch.tensor([kernel.packed_pair(value, dtype)], dtype=torch.int32)
        assert both.view(dtype).tolist() == [value, value]
    with pytest.raises(AssertionError, match="is not a number of the dtype"):
        kernel.packed_pair(1 + 2.0**-11, dtype)


def operand_of(codes: Tensor, scale: Tensor, zero: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return the weights of [rows, 4, 4] codes by the text of the kernel; scale and zero are [rows, 4]."""
    names = gluon_emulation.helpers()
    kernel, given = names["operands"], lambda value: Value(value.contiguous())
    words = codes.to(torch.uint8).view(torch.int32).squeeze(-1)
    if kernel.in_halves(count, dtype):
        fields = (given(words >> 4 & 0x0F0F0F0F), given(words & 0x0F0F0F0F))
    else:
        fields = (given(words),)
    exponent = kernel.exponents_of(0, len(codes), dtype, len(codes) // 16)
    grid = kernel.grid_of(given(scale), given(zero), count, dtype)
    columns = kernel.operand(fields, exponent, grid, None, count, dtype).data  # [rows, (h, t, b)]
    return columns.view(-1, 2, 4, 2).permute(0, 2, 1, 3).reshape(-1, 4, 4).double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_weights_are_codes_less_their_middle_times_the_scale(count: int, dtype: torch.dtype) -> None:
    """Every code, to the last bit; and close to the exact weight, as the roundings allow that there are."""
    g = torch.Generator().manual_seed(count)
    codes = torch.arange(1 << 2 * count).repeat(1024)[:1024].view(64, 4, 4)
    scale = torch.rand(64, 4, generator=g).half() + 2**-10
    zero = (1.5 + 2 * torch.rand(64, 4, generator=g) - 1).half()
    found = operand_of(codes, scale, zero, count, dtype)
    grid = (scale[..., None], zero[..., None])
    assert torch.equal(found, weights_of(codes, *grid, count, dtype))
    power = 4.0 ** (count - 1)
    step, centre = grid[0].double() / power, grid[1].double() * power + (power - 1) / 2
    exact = (codes - centre) * step
    middle = 2 ** (2 * count - 1)
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    terms = (codes - middle).abs() + (middle - centre).abs()
    assert bool(((found - exact).abs() <= 1.02 * unit * (exact.abs() + terms * step) + 2.0**-25).all())
    assert bool((found - exact).norm() <= unit * exact.norm()), "on average no more than one rounding may be off"
