"""The quantizing half of route_quantize: what its integers are, and where they lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mobiquant_compiler import wiring
from mobiquant_compiler.codegen.configs import Target
from mobiquant_compiler.kernels import prepare_kernel
from mobiquant_compiler.runtime import launch
from mobiquant_compiler.runtime.launch import Prepared
from mobiquant_compiler.spec import GROUPS, Activation, SliceSpec

A16, A8 = Activation.A16, Activation.A8
LARGEST = 32637  # of a16: its high half rounds to a signed byte, with the low one signed as well
QUARTERS = [0, 2, 1, 3]  # which quarter of a group the four lanes of a quad hold


def prepare(
    x: Tensor, group: int, activation: Activation = A16, *, token_rows: bool = False, counts: Tensor | None = None
) -> Prepared:
    """Quantize tokens, by default of one slice each."""
    counts = torch.ones(x.shape[:-1], dtype=torch.int32) if counts is None else counts
    facts = {"route": False, "quantize": True, "token_rows": token_rows}
    kernel = prepare_kernel(SliceSpec((2, 2), group), x.shape[-1], Target.of(80), activation, **facts)
    return launch.prepare(kernel, x, counts=counts)


def in_order(halves: Tensor, tokens: int) -> Tensor:
    """Return quantized bytes [groups, blocks, 32, group / 4] by token, group and column, int32."""
    groups, blocks, _, quarter = halves.shape
    step = min(16, quarter)
    parts = halves.reshape(groups, blocks, quarter // step, 8, 4, step)[:, :, :, :, QUARTERS]
    return parts.permute(1, 3, 0, 4, 2, 5).reshape(blocks * 8, groups, 4 * quarter)[:tokens].int()


def integers(prepared: Prepared) -> Tensor:
    """Return the fixed-point activations int32 [T, groups, group]."""
    high = in_order(prepared.high, prepared.tokens)
    return 256 * high + in_order(prepared.low, prepared.tokens) if prepared.low.numel() else high


def integers_of_rows(prepared: Prepared, group: int) -> Tensor:
    """Return the fixed-point activations int32 [T, groups, group] of tokens that are rows of 128 columns."""
    spans, halves, rows, _ = prepared.high.shape
    by_half = prepared.high.int().unbind(1)
    xi = 256 * by_half[0] + by_half[1] if halves == 2 else by_half[0]
    # Words of four columns are ordered by place in a quarter of the group, then by quarter.
    words = xi.view(spans, rows, 128 // group, group // 16, 4, 4).transpose(3, 4)
    groups = prepared.affine.shape[0]
    return words.permute(1, 0, 2, 3, 4, 5).reshape(rows, -1, group)[: prepared.tokens, :groups]


def facts(prepared: Prepared) -> tuple[Tensor, Tensor]:
    """Return step and shift, each [T, groups]."""
    step, shift = prepared.affine[:, : prepared.tokens].unbind(-1)
    return step.t(), shift.t()


def grouped(x: Tensor, group: int) -> Tensor:
    """Return tokens by groups of columns, padded by zeros, float64."""
    flat = x.reshape(-1, x.shape[-1]).double()
    return torch.nn.functional.pad(flat, (0, -flat.shape[-1] % group)).view(len(flat), -1, group)


def check(x: Tensor, group: int, activation: Activation) -> None:
    """Check all that holds of finite activations."""
    prepared, wanted = prepare(x, group, activation), grouped(x, group)
    xi, (step, shift) = integers(prepared), facts(prepared)
    largest = wanted.abs().amax(-1)
    assert torch.equal(shift, -(xi.sum(-1).float() * step)), "the sum is that of the integers, not of the activations"
    if activation is A16:
        assert torch.equal(torch.exp2(step.log2().round()), step), "a power of two"
        assert xi.abs().max() <= LARGEST
        assert (step.double() * 2**14 <= (2.02 * largest).clamp_min(2.0**-112)).all(), "at most a bit is lost"
    else:
        assert torch.equal(step, torch.where(largest > 0, largest.float() / 127, torch.ones(())))
        assert xi.abs().max() <= 127
    error = (wanted - xi.double() * step.double()[..., None]).abs()
    assert (error <= 0.5000001 * step.double()[..., None]).all(), "rounded to nearest"


@pytest.mark.parametrize("activation", list(Activation))
@given(
    group=st.sampled_from(GROUPS),
    tokens=st.sampled_from((1, 2, 7, 8, 9, 17)),
    k=st.integers(1, 400),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    seed=st.integers(0, 99),
)
@settings(max_examples=20)
def test_activations_are_rounded_to_multiples_of_their_groups_step(
    activation: Activation, group: int, tokens: int, k: int, dtype: torch.dtype, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=g) * torch.exp2(torch.randint(-12, 12, (tokens, k), generator=g).float())
    check(x.to(dtype), group, activation)


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("group", [64, 128])
def test_tokens_as_rows_are_the_same_integers(group: int, activation: Activation) -> None:
    for tokens, k in ((1, 128), (9, 192), (17, 400)):
        x = torch.randn(tokens, k)
        lanes, rows = prepare(x, group, activation), prepare(x, group, activation, token_rows=True)
        found = integers_of_rows(rows, group)
        assert torch.equal(found, integers(lanes))
        assert torch.equal(rows.affine[:, :tokens], lanes.affine[:, :tokens])
        assert rows.sums is not None
        assert torch.equal(rows.sums[:, :tokens].t(), found.sum(-1).int())


@pytest.mark.parametrize("tokens", [9, 64, 100])
def test_rows_of_most_slices_come_first(tokens: int) -> None:
    """Of every 64 tokens; with the same count in their order, each with its integers, step and sum."""
    x, counts = torch.randn(tokens, 192), torch.randint(1, 5, (tokens,), dtype=torch.int32)
    plain, rows = prepare(x, 64, token_rows=True), prepare(x, 64, token_rows=True, counts=counts)
    windows = range(0, tokens, 64)
    wanted = torch.cat([w + counts[w : w + 64].argsort(descending=True, stable=True) for w in windows])
    assert rows.placed is not None
    assert plain.placed is not None
    assert torch.equal(rows.placed, torch.stack([counts[wanted], wanted.int()]))
    assert torch.equal(plain.placed[1], torch.arange(tokens, dtype=torch.int32)), "all alike: as they are"
    assert torch.equal(integers_of_rows(rows, 64), integers_of_rows(plain, 64)[wanted])
    for of_rows, of_plain in ((rows.affine, plain.affine), (rows.sums, plain.sums)):
        assert of_rows is not None
        assert of_plain is not None
        assert torch.equal(of_rows[:, :tokens], of_plain[:, wanted])


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("size", [1e-36, 1.0, 1e30])
def test_activations_of_any_size(size: float, activation: Activation) -> None:
    check(torch.randn(3, 100) * size, 32, activation)


@pytest.mark.parametrize("largest", [1.0, 1.9, 1.98, 1.992, 1.9921875, 1.995, 1.99999])
def test_no_integer_is_too_large_for_its_halves(largest: float) -> None:
    x = torch.full((1, 32), largest)
    x[0, ::2] *= -1
    check(x, 32, A16)


def test_bfloat16_is_exact_within_a_factor_of_its_groups_largest() -> None:
    x = torch.randn(4, 128)
    x = (x.sign() * x.abs().clamp(2**-6, 1.9)).bfloat16()
    prepared = prepare(x, 64)
    step, _ = facts(prepared)
    assert torch.equal(integers(prepared).double() * step.double()[..., None], grouped(x, 64))


def test_halves_are_rounded_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 3.5, 0.0] * 4])
    assert integers(prepare(x, 32, A8))[0, 0, :8].tolist() == [127, 0, 2, 2, 0, -2, 4, 0]
    step = 2.0**-14
    x = torch.tensor([[1.0, 0.5 * step, 1.5 * step, 2.5 * step, -0.5 * step, -1.5 * step, 3.5 * step, 0.0] * 4])
    assert integers(prepare(x, 32))[0, 0, :8].tolist() == [1 << 14, 0, 2, 2, 0, -2, 4, 0]


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_group_that_is_not_finite_has_no_step(bad: float, activation: Activation) -> None:
    x = torch.randn(3, 96)
    clean = prepare(x, 32, activation)
    x[1, 40] = bad
    prepared = prepare(x, 32, activation)
    step, shift = facts(prepared)
    poisoned = torch.zeros(3, 3, dtype=torch.bool)
    poisoned[1, 1] = True
    assert torch.equal(step.isnan(), poisoned)
    assert torch.equal(shift.isnan(), poisoned)
    kept = ~poisoned
    assert torch.equal(integers(prepared)[kept], integers(clean)[kept])
    assert torch.equal(step[kept], facts(clean)[0][kept])


def test_a_group_of_zeros_is_zeros_with_a_step() -> None:
    for activation in Activation:
        prepared = prepare(torch.zeros(2, 64), 32, activation)
        assert not integers(prepared).any()
        assert facts(prepared)[0].isfinite().all()
        assert not facts(prepared)[1].any()


def test_more_columns_than_a_program_holds_at_a_time() -> None:
    x = torch.randn(2, 33000)
    check(x, 128, A16)


def test_a_token_does_not_depend_on_its_batch() -> None:
    x = torch.randn(10, 200)
    whole = prepare(x, 64)
    alone = prepare(x[7:8], 64)
    assert torch.equal(integers(alone)[0], integers(whole)[7])
    assert torch.equal(facts(alone)[0][0], facts(whole)[0][7])
    assert torch.equal(facts(alone)[1][0], facts(whole)[1][7])


def test_routing_by_the_way_changes_no_bit() -> None:
    x = torch.randn(5, 200)
    router, thresholds = (torch.ones(200), torch.ones(1)), torch.zeros(1)
    hist, mask = torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    found, wanted = wiring.prepare(x, router, thresholds, hist, mask, SliceSpec((2, 2), 64)), prepare(x, 64)
    for mine, other in ((found.high, wanted.high), (found.low, wanted.low)):
        assert torch.equal(in_order(mine, 5), in_order(other, 5))
    assert torch.equal(found.affine[:, :5], wanted.affine[:, :5])
    assert found.counts.tolist() == [2] * 5
    assert wanted.counts.tolist() == [1] * 5
