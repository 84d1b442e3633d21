"""sliced_wgmma, run as plain Python: programs of a last wave that are split along the columns, and their shares."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mobiquant_compiler.codegen.configs import wgmma_spec
from mobiquant_compiler.kernels import gather_kernel
from mobiquant_compiler.runtime import fused
from mobiquant_compiler.runtime.launch import Weight
from mobiquant_compiler.spec import SliceSpec, most_parts, split_programs
from tests import gluon_emulation
from tests.gluon_memory import global_memory
from tests.gluon_values import Pointer, Value, raw
from tests.interpret import test_sliced_wgmma
from tests.interpret.test_sliced_wgmma import H100, SPEC, Emulated, check, with_groups
from tests.kernel_cases import Case

TWO = SliceSpec((2, 2), 64)
SPLIT = gluon_emulation.helpers()["split_columns"]


def run(case: Case, small: bool, at_once: int) -> Tensor:
    """Multiply by the kernel that splits."""
    return test_sliced_wgmma.run(case, small, at_once, split=True)


def share_of(program: int, programs: int, at_once: int, steps: int) -> tuple[int, ...]:
    """Return the number of a program's tile, then first step, steps, part, parts and tiles split before."""
    given = (Value(torch.tensor(number)) for number in (program, programs, at_once, steps))
    number, share = SPLIT.share_of(*given, most_parts(128 * steps))
    return tuple(int(raw(value)) for value in (number, *share))


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 90), st.integers(1, 40), st.integers(1, 130))
def test_parts_cover_the_columns_of_every_program_once(programs: int, at_once: int, steps: int) -> None:
    """In a grid as large as the launch says, or larger; numbers behind are of no program."""
    whole, rest, split_into = split_programs(programs, at_once, 128 * steps)
    grid = whole + rest * split_into
    slots, split = fused.most_room(128 * steps, at_once)
    seen: Counter[tuple[int, int]] = Counter()
    left: list[int] = []
    for program in range(grid + 5):
        number, first, count, part, parts, behind = share_of(program, programs, at_once, steps)
        assert (number < programs) == (program < grid)
        if number >= programs:
            continue
        seen.update((number, step) for step in range(first, first + count))
        assert parts == 1 or (count >= 4 and parts <= 8 and behind < split and parts == split_into)
        assert 0 <= part < parts
        left += [behind * (parts - 1) + part] if part + 1 < parts else []
    assert seen == Counter((number, step) for number in range(programs) for step in range(steps))
    assert sorted(left) == list(range(len(left)))
    assert len(left) <= slots


@pytest.mark.parametrize(
    ("programs", "at_once", "steps", "parts"),
    [
        (192, 132, 32, 2),
        (32, 132, 32, 4),
        (132, 132, 32, 1),
        (133, 132, 32, 8),
        (133, 132, 15, 3),
        (220, 132, 32, 3),
        (220, 132, 11, 1),
        (221, 132, 32, 1),
        (3, 10**6, 8, 2),
    ],
)
def test_a_last_wave_is_cut_into_as_many_parts_as_run_at_a_time(
    programs: int, at_once: int, steps: int, parts: int
) -> None:
    last = (programs - 1) // at_once * at_once  # the first program of the last wave
    found = [share_of(last + part, programs, at_once, steps) for part in range(parts)]
    assert [(number, part, of) for number, _, _, part, of, _ in found] == [(last, p, parts) for p in range(parts)]
    assert last == 0 or share_of(last - 1, programs, at_once, steps)[1:5] == (0, steps, 0, 1)
    shares = [count for _, _, count, *_ in found]
    assert sum(shares) == steps
    assert shares == sorted(shares, reverse=True)
    assert shares[0] - shares[-1] <= 1


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(
    ("k", "at_once"), [(1024, 10), (1100, 10), (1536, 16), (1984, 16), (1088, 7), (2112, 3), (1600, 6)]
)
def test_products_of_split_programs(k: int, at_once: int, small: bool) -> None:
    """Wide tiles and narrow ones, of one to three parts; columns and rows that fill no step and no tile."""
    case = with_groups((150, 9), 130, k, spec=TWO, dtype=torch.bfloat16)
    check(run(case, small, at_once), case)


@pytest.mark.parametrize("small", [False, True])
def test_eight_parts(small: bool) -> None:
    """Of four slices and of rows written 16 bytes at a time, without a bias."""
    case = replace(with_groups((0, 0, 3, 66), 64, 4096, dtype=torch.float16), bias=None)
    check(run(case, small, 16), case)
    check(run(case, small, 3), case)


def test_linears_that_share_their_marks() -> None:
    """Parts of each find marks that are zero, however many the linear before had."""
    at_once = 13
    cases = [with_groups((140, 5), n, 1600, spec=TWO, dtype=torch.bfloat16) for n in (130, 40, 260, 130)]
    cases = [replace(case, x=cases[0].x, counts=cases[0].counts) for case in cases]
    gather = gather_kernel(TWO, 1600, H100)
    tokens = fused.gather(gather, cases[0].x, cases[0].counts, at_once=at_once)
    tokens.partial.fill_(float("nan"))
    for case in cases:
        weight = Weight(*case.arguments[2:])
        facts: dict[str, Any] = {"row_unit": fused.row_unit(weight.rows), "has_bias": True}
        kernel = Emulated(wgmma_spec(TWO, 1600, H100, small=False, split=True, **facts))
        check(fused.multiply(kernel, tokens, weight), case)
        assert not tokens.marks.any()


@pytest.mark.parametrize(
    ("there", "instead", "words"),
    [
        ("red.release.gpu.global.add.s32 [$1], 1;", "", "waits for what never comes"),
        ("ld.acquire.gpu.global.s32 $0, [$1]; setp.lt.s32 p, $0, $2; @p bra again;", "mov.b32 $0, 0;", "not close"),
        ("gl.store(marks, others * 0)", "", "marks are as they were"),
        ("share[3] - 1)\n", "share[3])\n", "waits for what never comes"),
    ],
)
def test_a_wait_or_a_mark_that_is_missing_is_noticed(
    there: str, instead: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the stand-in for memory that programs share, though programs run one after the other."""
    executed = gluon_emulation._executed
    monkeypatch.setattr(gluon_emulation, "_executed", lambda text, names: executed(text.replace(there, instead), names))
    case = with_groups((70,), 64, 1024, spec=SliceSpec((2,), 64), dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match=words):
        check(run(case, False, 2), case)


def test_a_thread_asks_until_all_parts_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    acquire, marks, asked = global_memory.acquire, torch.zeros(512, dtype=torch.int32), []

    def acquired(memory: Tensor, at: Tensor) -> np.ndarray:
        asked.append(at.tolist())
        memory[256 : 256 + 64 * len(asked)] = 2  # the last of the threads at the second turn
        return acquire(memory, at)

    monkeypatch.setattr(global_memory, "acquire", acquired)
    share = tuple(Value(torch.tensor(number)) for number in (0, 4, 2, 3, 1))
    SPLIT.await_others((None, Pointer(marks)), share, 0)
    global_memory.end_launch()
    assert asked == [list(range(256, 384))] * 2
    assert not marks.any()


def test_columns_that_are_too_few_have_no_scratch() -> None:
    case = with_groups((70, 3), 64, 896, spec=TWO, dtype=torch.bfloat16)
    tokens = fused.gather(gather_kernel(TWO, 896, H100), case.x, case.counts)
    assert (tokens.partial.numel(), tokens.marks.numel()) == (0, 0)
    assert most_parts(SPEC.padded(897)) == 2
