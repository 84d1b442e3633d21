"""gather_tokens: a stable sort by slice count, padded and in the order of operands, in one launch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mobiquant_compiler.codegen import cache, operands
from mobiquant_compiler.codegen.cache import Kernel
from mobiquant_compiler.codegen.configs import Target, TokenClass, kernel_spec
from mobiquant_compiler.runtime import fused
from mobiquant_compiler.spec import Family, SliceSpec


def kernel_of(slices: int, k: int) -> Kernel:
    """Return the kernel for a number of slices and columns."""
    spec = SliceSpec((2,) * slices, 32)
    return cache.load(kernel_spec(Family.GATHER_TOKENS, spec, k, TokenClass.MANY, Target.of(80)))


@pytest.mark.parametrize("k", [64, 200, 1100])
@settings(max_examples=6)
@given(data=st.data())
def test_tokens_are_sorted_and_their_columns_in_order(k: int, data: st.DataObject) -> None:
    tokens, slices = data.draw(st.sampled_from([1, 2, 65, 130])), data.draw(st.integers(1, 4))
    counts = data.draw(st.lists(st.integers(0, slices + 1), min_size=tokens, max_size=tokens))
    given_counts = torch.tensor(counts, dtype=torch.int32)  # values outside count as the nearest
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens)).half()
    found = fused.gather(kernel_of(slices, k), x, given_counts)
    ordered, rows = torch.sort(given_counts.clamp(1, slices), stable=True)
    assert torch.equal(found.rows, rows.int())
    assert found.offsets.tolist() == [int((ordered <= count).sum()) for count in range(slices + 1)]
    width = -(-k // 128) * 128
    padded = torch.nn.functional.pad(x, (0, width - k))[rows].view(tokens, -1, 128)
    columns = torch.tensor([operands.column_of(place) for place in range(128)])
    assert torch.equal(found.x, padded[:, :, columns].view(tokens, width))


def test_more_tokens_than_are_looked_at_at_a_time() -> None:
    counts = torch.randint(1, 5, (2100,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    found = fused.gather(kernel_of(4, 32), torch.zeros(2100, 32, dtype=torch.float16), counts)
    assert torch.equal(found.rows, torch.sort(counts, stable=True)[1].int())


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_marks_are_zero_however_few_tokens_there_are(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **facts: empty(*size, **facts).fill_(-1))
    x, counts = torch.zeros(tokens, 1024, dtype=torch.float16), torch.ones(tokens, dtype=torch.int32)
    marks = fused.gather(kernel_of(2, 1024), x, counts, at_once=101).marks
    assert marks.tolist() == [0] * (50 * 256)


def test_activations_that_are_not_contiguous() -> None:
    wide = torch.randn(66, 80, generator=torch.Generator().manual_seed(0)).half()
    counts = torch.ones(66, dtype=torch.int32)
    kernel = kernel_of(2, 64)
    assert torch.equal(
        fused.gather(kernel, wide[:, 3:67], counts).x, fused.gather(kernel, wide[:, 3:67].contiguous(), counts).x
    )
