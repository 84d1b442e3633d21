"""route_quantize and sliced_mma against the reference, through the launch code: one weight, any number of tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mobiquant_compiler import reference, wiring
from mobiquant_compiler.spec import Activation, Prefill, SliceSpec
from tests.kernel_cases import BIT, SLICE, SPECS, Case, integer_case, random_case, spec_id
from tests.tolerances import A8_TOLERANCE, INTEGER_NORM, TOLERANCES, relative_norm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EXACT_DTYPES = DTYPES[:2]  # the interpreter truncates on the way to bfloat16, devices round
# A failing example is not made smaller: that would run kernels for minutes.
FEW = settings(max_examples=3, phases=(Phase.explicit, Phase.generate))


def run(case: Case, activation: Activation = Activation.A16, prefill: Prefill = Prefill.ROUTED) -> Tensor:
    """Run the routed linear of a case."""
    return wiring.routed_linear(*case.arguments, case.spec, activation, prefill)


def several_steps(spec: SliceSpec) -> int:
    """Return a number of columns of 17 groups, the last cut off: two steps of eight chains, most of them of one."""
    return 17 * spec.group - 5


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@given(data=st.data())
@settings(FEW, max_examples=4)
def test_one_token_is_exact_on_integers(spec: SliceSpec, data: st.DataObject) -> None:
    k = data.draw(st.integers(32, 300), "k")
    n = data.draw(st.sampled_from((1, 3, 8, 17, 24, 32, 33)), "n")
    bias, seed = data.draw(st.booleans(), "bias"), data.draw(st.integers(0, 99), "seed")
    case = integer_case(spec, 1, n, k, bias=bias, seed=seed)
    case.counts.fill_(data.draw(st.integers(1, spec.num_slices), "count"))
    assert torch.equal(run(case), case.expected(torch.float32))


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@pytest.mark.parametrize("rows", [3, 24])
def test_one_token_is_exact_at_every_count(spec: SliceSpec, rows: int) -> None:
    case = integer_case(spec, 1, rows, several_steps(spec))
    for count in range(1, spec.num_slices + 1):
        case.counts.fill_(count)
        assert torch.equal(run(case), case.expected(torch.float32)), f"{count} slices"


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@given(data=st.data())
@FEW
def test_small_batches_are_exact_on_integers(spec: SliceSpec, data: st.DataObject) -> None:
    tokens = data.draw(st.sampled_from((2, 7, 9, 17)), "tokens")
    k = data.draw(st.integers(32, 200), "k")
    n = data.draw(st.sampled_from((1, 17, 33)), "n")
    bias, seed = data.draw(st.booleans(), "bias"), data.draw(st.integers(0, 99), "seed")
    dtype = data.draw(st.sampled_from(EXACT_DTYPES), "dtype")
    case = integer_case(spec, tokens, n, k, bias=bias, seed=seed, dtype=dtype)
    y = run(case)
    assert torch.equal(y, case.expected(torch.float32).to(y.dtype))


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@pytest.mark.parametrize("tokens", [3, 10, 19])
def test_batches_are_exact_over_several_steps(spec: SliceSpec, tokens: int) -> None:
    case = integer_case(spec, tokens, 3, several_steps(spec), bias=True, seed=tokens)
    assert torch.equal(run(case), case.expected(torch.float32))


@pytest.mark.parametrize("k", [1024, 1100])
@pytest.mark.parametrize("tokens", [1, 2])
def test_as_many_steps_in_every_chain_and_one_more_in_some(k: int, tokens: int) -> None:
    case = integer_case(SPECS[2], tokens, 18, k)
    assert torch.equal(run(case), case.expected(torch.float32))


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[3], SPECS[5]], ids=spec_id)
@pytest.mark.parametrize("tokens", [33, 64, 65])
def test_large_batches_are_exact_on_integers(spec: SliceSpec, tokens: int) -> None:
    case = integer_case(spec, tokens, 5, 100, bias=True, seed=tokens)
    assert torch.equal(run(case), case.expected(torch.float32))


@pytest.mark.parametrize("tokens", [1, 7, 12, 20])
@pytest.mark.parametrize("counts", [(1,), (4,), (1, 2), (3, 4), (1, 4), (2, 3, 4)], ids=str)
def test_batches_of_any_mix_of_counts(tokens: int, counts: tuple[int, ...]) -> None:
    """Batches that leave out the first counts, the last, or those between."""
    case = integer_case(SPECS[2], tokens, 3, 64, seed=3)
    case.counts.copy_(torch.tensor(counts).repeat(tokens)[:tokens])
    assert torch.equal(run(case), case.expected(torch.float32))


@pytest.mark.parametrize("odd", [0, 7, 8, 14])
def test_one_token_differs(odd: int) -> None:
    case = integer_case(SPECS[2], 15, 3, 64)
    for most, other in ((4, 1), (1, 4), (2, 3)):
        case.counts.fill_(most)
        case.counts[odd] = other
        assert torch.equal(run(case), case.expected(torch.float32)), f"all {most}, one {other}"


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("spec", [SPECS[2], SPECS[6]], ids=spec_id)
def test_counts_that_cannot_be_are_the_nearest_that_can(spec: SliceSpec, tokens: int) -> None:
    case = integer_case(spec, tokens, 3, 64)
    wild = torch.tensor([0, 99, -7, 1, spec.num_slices + 1, 2**31 - 1, -(2**31)]).repeat(2)[:tokens]
    for counts in (wild, wild.roll(1)):
        near = replace(case, counts=counts.clamp(1, spec.num_slices).int())
        assert torch.equal(run(replace(case, counts=counts.int())), near.expected(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[1], SPECS[5], SPECS[11]], ids=spec_id)
def test_random_data_is_near_the_float64_reference(spec: SliceSpec, tokens: int, dtype: torch.dtype) -> None:
    case = random_case(spec, tokens, 9, 300, dtype=dtype, scale_dtype=torch.bfloat16)
    atol, rtol, _ = TOLERANCES[dtype]
    y = run(case)
    assert y.dtype is dtype
    torch.testing.assert_close(y.double(), case.expected(), atol=atol, rtol=rtol)


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_errors_are_as_small_as_fixed_point_allows(spec: SliceSpec, activation: Activation) -> None:
    case = random_case(spec, 1, 33, 600)
    case.counts.fill_(spec.num_slices)
    assert relative_norm(run(case, activation), case.expected()) <= INTEGER_NORM[activation].error


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_scales_of_any_dtype(tokens: int, scale_dtype: torch.dtype) -> None:
    case = integer_case(SPECS[2], tokens, 17, 100)
    case = replace(case, scale=case.scale.to(scale_dtype), zero=case.zero.to(scale_dtype))
    assert torch.equal(run(case), case.expected(torch.float32))


@pytest.mark.parametrize("tokens", [1, 3, 10])
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[4], SPECS[5]], ids=spec_id)
def test_eight_bit_activations_on_request(spec: SliceSpec, tokens: int) -> None:
    case = random_case(spec, tokens, 9, 256)
    y = run(case, Activation.A8)
    torch.testing.assert_close(y.double(), case.expected(), atol=A8_TOLERANCE.atol, rtol=A8_TOLERANCE.rtol)
    assert not torch.equal(y, run(case)), "eight bits are fewer than sixteen"


@pytest.mark.parametrize("tokens", [1, 3, 10])
def test_eight_bit_activations_are_exact_where_the_step_is(tokens: int) -> None:
    spec = SliceSpec((2, 2), 32, SLICE)
    case = integer_case(spec, tokens, 5, 96, largest=127)
    case.x[:, ::32] = 127.0  # the largest of each group is 127: a step of one
    assert torch.equal(run(case, Activation.A8), case.expected(torch.float32))


@pytest.mark.usefixtures("checked_overflow")
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[10]], ids=spec_id)
@pytest.mark.parametrize("tokens", [1, 2])
def test_no_integer_overflows_at_the_largest_codes_and_activations(spec: SliceSpec, tokens: int) -> None:
    """128 products of 255 and of the largest fixed-point activation of either sign, where all codes are ones."""
    case = integer_case(spec, tokens, 1, 128)
    case.slices.fill_(-1)
    case.counts.fill_(spec.num_slices)
    for last in (spec.num_slices, 1):  # tokens that are unlike append slice after slice
        case.counts[-1] = last
        for value in (1.99, -1.99, 1.0):
            case.x.fill_(value)
            torch.testing.assert_close(run(case).double(), case.expected(), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (), (1, 1), (2, 3)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    spec = SPECS[2]
    tokens = torch.Size(shape).numel()
    case = integer_case(spec, max(tokens, 1), 3, 40)
    x, counts = case.x[:tokens].view(*shape, 40), case.counts[:tokens].view(shape)
    y = wiring.routed_linear(x, counts, *case.arguments[2:], spec)
    assert y.shape == (*shape, 3)
    assert torch.equal(y.view(tokens, 3), case.expected(torch.float32)[:tokens])


@pytest.mark.parametrize("tokens", [1, 4])
def test_strided_and_misaligned_activations(tokens: int) -> None:
    spec = SPECS[2]
    case = integer_case(spec, tokens, 3, 41, dtype=torch.float16)
    wide = torch.zeros(tokens, 100, dtype=torch.float16)
    wide[:, 7:48] = case.x
    y = wiring.routed_linear(wide[:, 7:48], *case.arguments[1:], spec)
    assert torch.equal(y, case.expected(torch.float32).half())


def test_weights_that_lie_where_no_vector_load_reaches() -> None:
    case = integer_case(SPECS[2], 3, 5, 64, bias=True)
    memory = torch.zeros(case.slices.numel() + 1, dtype=torch.int32)
    memory[1:] = case.slices.flatten()
    strided = case.scale.repeat_interleave(2, 1)[:, ::2]
    moved = replace(case, slices=memory[1:].view_as(case.slices), scale=strided)
    assert torch.equal(run(moved), case.expected(torch.float32))


@pytest.mark.parametrize("tokens", [1, 4, 12])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_reach_their_token_only(bad: float, tokens: int) -> None:
    spec = SPECS[2]
    case = integer_case(spec, tokens, 3, 64)
    case.x[0, 5] = bad
    y = run(case)
    assert y[0].isnan().all()
    assert torch.equal(y[1:], case.expected(torch.float32)[1:])


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30, 1e30])
def test_activations_of_any_size(size: float) -> None:
    spec = SliceSpec((2, 2), 32, BIT)
    case = random_case(spec, 2, 3, 64)
    x = (case.x.double() * size).float()
    arguments = (x, case.counts, *case.arguments[2:5], None)
    wanted = reference.routed_linear(x.double(), *arguments[1:], spec)
    y = wiring.routed_linear(*arguments, spec).double()
    torch.testing.assert_close(y, wanted, rtol=1e-3, atol=max(1e-3 * size, 1e-37))


@pytest.mark.parametrize("tokens", [1, 6])
def test_slice_gemm_takes_counts_from_offsets(tokens: int) -> None:
    spec = SPECS[3]
    case = integer_case(spec, tokens, 5, 70, bias=True)
    rows, offsets, grouped = reference.gather(case.x, case.counts, spec.num_slices)
    y = wiring.slice_gemm(grouped, offsets, *case.arguments[2:], spec)
    assert torch.equal(reference.scatter(y, rows, case.counts), case.expected(torch.float32))


def test_float64_goes_to_the_reference_on_record(caplog: pytest.LogCaptureFixture) -> None:
    spec = SPECS[2]
    case = integer_case(spec, 2, 3, 40, dtype=torch.float64)
    assert torch.equal(run(case), case.expected())
    assert "no kernel: activations are torch.float64" in caplog.text


@pytest.mark.parametrize("prefill", list(Prefill))
def test_any_way_of_prefill_is_exact_where_there_is_no_other(prefill: Prefill) -> None:
    """On a CPU no library's GEMM is asked: all are the integer path."""
    case = integer_case(SPECS[2], 66, 3, 40, bias=True)
    assert torch.equal(run(case, prefill=prefill), case.expected(torch.float32))
