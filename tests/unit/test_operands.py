"""Where operands of the fused kernel come from: every lane and register against the layout of packed words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon")

from mobiquant_compiler.codegen import operands
from mobiquant_compiler.packing import pack, unit_views
from mobiquant_compiler.slices import affine_at
from mobiquant_compiler.spec import SliceSpec

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


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_bytes_become_floats(count: int) -> None:
    """What `prmt` puts together is the offset plus the code, for every code."""
    for byte in range(4):
        found = re.fullmatch(r"prmt\.b32 \$0, \$1, \$2, (\d+);", operands.float_assembly(byte, count))
        assert found is not None
        selectors = [int(found[1]) >> 4 * place & 15 for place in range(4)]
        for code in range(1 << 2 * count):
            exponent = 0x4B if count == 4 else 0x43
            source = [0] * 4 + [exponent, 0, 0, 0]
            source[byte] = code
            source[(byte + 1) % 4] = 0xAB  # a neighbour that must not come along
            bits = sum(source[selector] << 8 * place for place, selector in enumerate(selectors))
            value = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
            assert float(value) == operands.offset_of(count) + code


def weights_at(codes: Tensor, scale: Tensor, zero: Tensor, count: int) -> Tensor:
    """Return what the kernel computes in float32, operation by operation (`weight_of`, `centre_of`)."""
    power = operands.power_of(count)
    wide = operands.is_wide(count)
    centre = zero * power + ((power - 1) / 2 + (0.0 if wide else operands.offset_of(count)))
    value = codes.float() + operands.offset_of(count)
    if wide:
        value = value - operands.offset_of(count)
    return (value - centre) * (scale * (1.0 / power))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_arithmetic_is_that_of_the_reference(count: int) -> None:
    """Bit for bit with float16 zero points of at least 2**-6, whatever their sign; close to it with any others."""
    spec = SliceSpec((2, 2, 2, 2), 128)
    g = torch.Generator().manual_seed(count)
    codes = torch.arange(1 << 2 * count).expand(4096, -1)
    scale = torch.rand(4096, 1, generator=g).half().float() + 2**-14
    sign = torch.randint(0, 2, (4096, 1), generator=g) * 2 - 1
    zero = ((2**-6 + 4 * torch.rand(4096, 1, generator=g)) * sign).half().float()
    step, centre = affine_at(scale, zero, spec, count)
    assert torch.equal(weights_at(codes, scale, zero, count), (codes.float() - centre) * step)
    for small in (zero * 2**-8, torch.rand(4096, 1, generator=g)):
        step, centre = affine_at(scale, small, spec, count)
        error = (weights_at(codes, scale, small, count) - (codes.float() - centre) * step).abs()
        assert bool((error <= step * 2**-16).all())
