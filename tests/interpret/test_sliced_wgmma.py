"""sliced_wgmma, run as plain Python on CPU tensors: every tile that a group is cut into, whatever the counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mobiquant_compiler.codegen.configs import Target, wgmma_spec
from mobiquant_compiler.codegen.specialise import specialise
from mobiquant_compiler.kernels import gather_kernel
from mobiquant_compiler.runtime import fused
from mobiquant_compiler.runtime.launch import Weight
from mobiquant_compiler.spec import KernelSpec, SliceSpec
from tests import gluon_emulation
from tests.gluon_values import Pointer, Value, raw
from tests.kernel_cases import Case, random_case
from tests.rounded_weights import unpacked_weights

SPEC = SliceSpec()
H100 = Target.of(90)
FEW, MANY = 1, 1000  # programs that run at a time: never enough for tiles of half the tokens, and always
TILES = ((False, FEW), (True, FEW), (False, MANY), (True, MANY))
SIZES = ((0, 0, 0, 66), (1, 0, 0, 65), (1, 63, 64, 65), (127, 128, 129, 0), (33, 0, 257, 31), (255, 256, 0, 1))


class Emulated:
    """A kernel that is launched as plain Python."""

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec

    def launch(self, grid: tuple[int, ...], **arguments: Any) -> None:
        """Run all programs."""
        gluon_emulation.run(self.spec, grid, arguments)


def run(case: Case, small: bool, at_once: int, split: bool = False, **tile: int) -> Tensor:
    """Multiply the tokens of a case, in tiles of half the tokens where as many programs as run at once are enough."""
    k, weight = case.x.shape[-1], Weight(*case.arguments[2:])
    facts = {"split": split, "row_unit": fused.row_unit(weight.rows), "has_bias": weight.bias is not None}
    kernel = Emulated(replace(wgmma_spec(case.spec, k, H100, small=small, **facts), **tile))
    room = fused._room_of(kernel, weight, len(case.counts), at_once)  # no more than calls give
    tokens = fused.gather(gather_kernel(case.spec, k, H100), case.x, case.counts, room=room, at_once=at_once)
    tokens.partial.fill_(float("nan"))
    y = fused.multiply(kernel, tokens, weight)
    assert not tokens.marks.any(), "marks are as they were before"
    return y


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


@pytest.mark.parametrize(("small", "at_once"), TILES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_number_of_tokens_in_a_group(sizes: tuple[int, ...], small: bool, at_once: int) -> None:
    """Tiles of every width, full and nearly empty; rows and columns that fill no tile and no step."""
    case = with_groups(sizes, 130, 416, dtype=torch.bfloat16)
    check(run(case, small, at_once), case)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("tile", [{}, {"block_w": 1}, {"num_stages": 2}, {"num_stages": 3, "block_w": 2}], ids=str)
def test_columns_and_stages(tile: dict[str, int], small: bool) -> None:
    """Rings of stages that are filled once, in part and many times.

    Six stages, of small tiles, are there for words as well: with fewer the wait for activations holds them back.
    """
    for k in (33, 128, 256, 320, 704, 1024):
        case = with_groups((70, 5, 0, 67), 72, k, spec=SliceSpec(group=32), dtype=torch.bfloat16)
        check(run(case, small, FEW, **tile), case)


@pytest.mark.parametrize("at_once", [17, 18])
def test_as_many_narrow_tiles_as_run_at_a_time(at_once: int) -> None:
    """Nine by two blocks of rows: one more than seventeen."""
    case = with_groups((255, 256, 0, 1), 130, 128, dtype=torch.bfloat16)
    check(run(case, True, at_once), case)


def test_half_precision_without_bias() -> None:
    case = replace(with_groups((40, 161), 64, 256, spec=SliceSpec((2, 2), 64), dtype=torch.float16), bias=None)
    check(run(case, False, FEW), case)


def test_tiles_do_not_change_what_a_token_gets() -> None:
    """One product of columns after the other, in every tile: bits depend on the columns alone."""
    case = with_groups((200, 40, 90, 129), 64, 512, dtype=torch.bfloat16)
    first, *others = (run(case, small, at_once) for small, at_once in TILES)
    assert all(torch.equal(first, other) for other in others)


@cache
def finders_of(groups: int) -> dict[str, Any]:
    """Return the functions by which programs of large tiles find theirs."""
    spec = wgmma_spec(SliceSpec((2,) * groups), 128, H100, small=False)
    return gluon_emulation.functions_of(specialise(spec))


def tiles_of(sizes: Sequence[int], halved: bool) -> list[tuple[int, ...]]:
    """Return the tiles that programs find in groups of these sizes: count, narrow, first token, end of the group."""
    find_tile, offsets = finders_of(len(sizes))["find_tile"], Pointer(torch.tensor([0, *accumulate(sizes)]))
    found: list[tuple[int, ...]] = []
    while not found or found[-1][0]:
        one = find_tile(offsets_ptr=offsets, tile=scalar(len(found)), halved=scalar(halved))
        count, first, end = (int(raw(value)) for value in one)
        found.append((count, int(halved or end - first <= 128), first, end))
    return found[:-1]


def scalar(value: int) -> Value:
    """Return a number as kernels have it."""
    return Value(torch.tensor(value))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 700), min_size=1, max_size=4), st.booleans(), st.integers(0, 20))
def test_groups_are_cut_into_tiles_that_cover_them_once(sizes: list[int], halved: bool, together: int) -> None:
    count_tiles = finders_of(len(sizes))["count_tiles"]
    found, ends = tiles_of(sizes, halved), list(accumulate(sizes))
    covered = [t for _, narrow, first, end in found for t in range(first, min(first + (256 >> narrow), end))]
    assert sorted(covered) == list(range(sum(sizes)))
    assert all(end == ends[count - 1] and first >= end - sizes[count - 1] for count, _, first, end in found)
    assert [narrow for _, narrow, _, _ in found] == sorted(narrow for _, narrow, _, _ in found)
    halves, whole = (int(raw(count_tiles(Pointer(torch.tensor([0, *ends])), size))) for size in (128, 256))
    if halved:
        assert all(narrow for _, narrow, _, _ in found)
        assert len(found) == halves
    if sum(sizes) and halved == (halves <= together):
        assert len(found) <= fused.most_tiles(sum(sizes), len(sizes), 256, together)
    if not halved:
        assert len(found) == whole <= fused.most_programs(sum(sizes), len(sizes), 256, 1, 1, 128)
