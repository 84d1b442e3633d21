"""quantize_activation, decode_gemv and grouped_gemm against the reference, through the launch code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mobiquant_compiler import reference, wiring
from mobiquant_compiler.spec import Activation, SliceSpec
from tests.kernel_cases import BIT, SLICE, SPECS, integer_case, random_case, spec_id
from tests.tolerances import A8_TOLERANCE, TOLERANCES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EXACT_DTYPES = DTYPES[:2]  # the interpreter truncates on the way to bfloat16, devices round
FAST = settings(max_examples=4)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@given(data=st.data())
@FAST
def test_decode_is_exact_on_integers(spec: SliceSpec, data: st.DataObject) -> None:
    k = data.draw(st.integers(32, 140), "k")
    n = data.draw(st.sampled_from((1, 3)), "n")
    bias, seed = data.draw(st.booleans(), "bias"), data.draw(st.integers(0, 99), "seed")
    case = integer_case(spec, 1, n, k, bias=bias, seed=seed)
    case.counts.fill_(data.draw(st.integers(1, spec.num_slices), "count"))
    assert torch.equal(wiring.routed_linear(*case.arguments, spec), case.expected(torch.float32))


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[5]], ids=spec_id)
def test_decode_is_exact_at_every_count(spec: SliceSpec) -> None:
    case = integer_case(spec, 1, 2, 64)
    for count in range(1, spec.num_slices + 1):
        case.counts.fill_(count)
        assert torch.equal(wiring.routed_linear(*case.arguments, spec), case.expected(torch.float32))


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@given(data=st.data())
@FAST
def test_small_batches_are_exact_on_integers(spec: SliceSpec, data: st.DataObject) -> None:
    tokens = data.draw(st.sampled_from((2, 7, 17)), "tokens")
    k = data.draw(st.integers(32, 200), "k")
    n = data.draw(st.sampled_from((1, 17, 33)), "n")
    bias, seed = data.draw(st.booleans(), "bias"), data.draw(st.integers(0, 99), "seed")
    case = integer_case(
        spec, tokens, n, k, bias=bias, seed=seed, dtype=data.draw(st.sampled_from(EXACT_DTYPES), "dtype")
    )
    y = wiring.routed_linear(*case.arguments, spec)
    assert torch.equal(y, case.expected(torch.float32).to(y.dtype))


@pytest.mark.parametrize("tokens", [64, 130])
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[3], SPECS[5]], ids=spec_id)
def test_large_batches_are_exact_on_integers(spec: SliceSpec, tokens: int) -> None:
    case = integer_case(spec, tokens, 9, 100, bias=True, seed=tokens)
    assert torch.equal(wiring.routed_linear(*case.arguments, spec), case.expected(torch.float32))


@pytest.mark.parametrize("counts", ["all_one", "all_most", "one_differs"])
def test_prefill_tiles_of_one_count_and_of_several(counts: str) -> None:
    spec = SPECS[0]
    case = integer_case(spec, 70, 5, 128, seed=3)
    case.counts.fill_(1 if counts == "all_one" else 4)
    if counts == "one_differs":
        case.counts[40] = 2
    assert torch.equal(wiring.routed_linear(*case.arguments, spec), case.expected(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[1], SPECS[5]], ids=spec_id)
def test_random_data_is_near_the_float64_reference(spec: SliceSpec, tokens: int, dtype: torch.dtype) -> None:
    case = random_case(spec, tokens, 9, 300, dtype=dtype, scale_dtype=torch.bfloat16)
    atol, rtol, _ = TOLERANCES[dtype]
    y = wiring.routed_linear(*case.arguments, spec)
    assert y.dtype is dtype
    torch.testing.assert_close(y.double(), case.expected(), atol=atol, rtol=rtol)


@pytest.mark.parametrize("tokens", [1, 3])
def test_eight_bit_activations_on_request(tokens: int) -> None:
    spec = SPECS[0]
    case = random_case(spec, tokens, 9, 256)
    y = wiring.routed_linear(*case.arguments, spec, Activation.A8)
    torch.testing.assert_close(y.double(), case.expected(), atol=A8_TOLERANCE.atol, rtol=A8_TOLERANCE.rtol)


@pytest.mark.parametrize("tokens", [1, 3])
def test_eight_bit_activations_are_exact_where_the_step_is(tokens: int) -> None:
    spec = SliceSpec((2, 2), 32, SLICE)
    case = integer_case(spec, tokens, 5, 96, largest=127)
    case.x[:, ::32] = 127.0  # the largest of each group is 127: a step of one
    y = wiring.routed_linear(*case.arguments, spec, Activation.A8)
    assert torch.equal(y, case.expected(torch.float32))


def test_a_token_does_not_depend_on_its_batch() -> None:
    spec = SliceSpec((2, 2, 2, 2), 32, SLICE)
    case = random_case(spec, 70, 7, 64)
    whole = wiring.routed_linear(*case.arguments, spec)
    weight = case.arguments[2:]
    for start, stop in ((0, 2), (2, 20), (20, 70)):
        part = wiring.routed_linear(case.x[start:stop], case.counts[start:stop], *weight, spec)
        assert torch.equal(part, whole[start:stop])


@pytest.mark.parametrize("shape", [(0,), (2, 0), (), (1, 1), (2, 3)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    spec = SPECS[2]
    tokens = torch.Size(shape).numel()
    case = integer_case(spec, max(tokens, 1), 3, 40)
    x, counts = case.x[:tokens].view(*shape, 40), case.counts[:tokens].view(shape)
    y = wiring.routed_linear(x, counts, *case.arguments[2:], spec)
    assert y.shape == (*shape, 3)
    assert torch.equal(y.view(tokens, 3), case.expected(torch.float32)[:tokens])


def test_strided_and_misaligned_activations() -> None:
    spec = SPECS[2]
    case = integer_case(spec, 4, 3, 41, dtype=torch.float16)
    wide = torch.zeros(4, 100, dtype=torch.float16)
    wide[:, 7:48] = case.x
    y = wiring.routed_linear(wide[:, 7:48], *case.arguments[1:], spec)
    assert torch.equal(y, case.expected(torch.float32).half())


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_reach_their_token_only(bad: float, tokens: int) -> None:
    spec = SPECS[2]
    case = integer_case(spec, tokens, 3, 64)
    case.x[0, 5] = bad
    y = wiring.routed_linear(*case.arguments, spec)
    assert y[0].isnan().all()
    assert y[1:].isfinite().all()


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
    assert torch.equal(wiring.routed_linear(*case.arguments, spec), case.expected())
    assert "no kernel: activations are torch.float64" in caplog.text


def test_warming_up_runs_every_kernel() -> None:
    assert wiring.warm_kernels(SPECS[2], 8, 64, torch.float16, "cpu", max_tokens=2, bias_dtype=torch.float16) == 6
