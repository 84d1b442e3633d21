"""The integer path on the device against the reference: one weight, any number of tokens."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from mobiquant_compiler import reference, wiring
from mobiquant_compiler.spec import Activation, Prefill, SliceSpec
from tests.kernel_cases import EVEN_K, SPECS, UNEVEN_K, Case, integer_case, random_case, spec_id
from tests.tolerances import A8_TOLERANCE, INTEGER_NORM, TOLERANCES, relative_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BF16 = torch.bfloat16
DTYPES = (torch.float32, torch.float16, BF16)
TOKENS = (1, 2, 7, 8, 9, 17, 32, 33, 64, 130, 1000)
K = 200  # no group divides it


def run(case: Case, activation: Activation = Activation.A16) -> Tensor:
    """Run the routed linear of a case on the device, on the integer path."""
    return wiring.routed_linear(*case.arguments, case.spec, activation, Prefill.EXACT)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_integers_are_exact_for_every_number_of_tokens(spec: SliceSpec) -> None:
    for tokens in TOKENS:
        case = integer_case(spec, tokens, 203, K, bias=True, seed=tokens, device="cuda")
        assert torch.equal(run(case), case.expected(torch.float32)), f"{tokens} tokens"


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_integers_are_exact_over_several_steps(spec: SliceSpec) -> None:
    """Chains that come out even, whose loads ask for nothing, and chains of which some end a step before others."""
    for k in (EVEN_K, UNEVEN_K) if spec in SPECS[:4] or spec.group == 128 else (EVEN_K,):
        for tokens in (1, 3, 20):
            case = integer_case(spec, tokens, 70, k, bias=True, seed=tokens, device="cuda")
            assert torch.equal(run(case), case.expected(torch.float32)), f"{tokens} tokens, {k} columns"


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_one_token_is_exact_at_every_count(spec: SliceSpec) -> None:
    """Of one step, of two and three of which some chains lack the last, of four; one tile of rows, and less."""
    for k, rows in product((K, UNEVEN_K, 36 * spec.group, 64 * spec.group), (203, 40, 16, 8)):
        case = integer_case(spec, 1, rows, k, bias=True, device="cuda")
        for count in range(1, spec.num_slices + 1):
            case.counts.fill_(count)
            assert torch.equal(run(case), case.expected(torch.float32)), f"{count} slices, {rows} rows, {k} columns"


@pytest.mark.parametrize("tokens", [1, 7, 20, 40, 100, 300])
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[1], SPECS[6]], ids=spec_id)
def test_batches_of_any_mix_of_counts(spec: SliceSpec, tokens: int) -> None:
    """Batches that leave out the first counts, the last, or those between."""
    case = integer_case(spec, tokens, 203, K, bias=True, device="cuda")
    for counts in ((1,), (2,), (4,), (1, 2), (3, 4), (2, 3), (1, 4), (2, 3, 4)):
        case.counts.copy_(torch.tensor(counts).repeat(tokens)[:tokens])
        assert torch.equal(run(case), case.expected(torch.float32)), f"counts {counts}"


@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_counts_that_cannot_be_are_the_nearest_that_can(tokens: int) -> None:
    case = integer_case(SPECS[0], tokens, 65, K, bias=True, device="cuda")
    wild = torch.tensor([0, 99, -7, 5, 2**31 - 1, -(2**31)]).repeat(4)[:tokens]
    near = replace(case, counts=wild.clamp(1, 4).int().cuda())
    assert torch.equal(run(replace(case, counts=wild.int().cuda())), near.expected(torch.float32))


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_every_variant_is_as_near_as_fixed_point_allows(spec: SliceSpec, activation: Activation) -> None:
    for tokens in (1, 5, 40):
        case = random_case(spec, tokens, 300, EVEN_K, device="cuda")
        for count in range(1, spec.num_slices + 1):
            case.counts.fill_(count)
            error = relative_norm(run(case, activation), case.expected())
            assert error <= INTEGER_NORM[activation].error, f"{tokens} tokens, {count} slices"


@pytest.mark.parametrize(("dtype", "scale_dtype"), [*zip(DTYPES, DTYPES[::-1], strict=True), (BF16, BF16)], ids=str)
def test_activations_and_scales_of_any_dtype(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    atol, rtol, _ = TOLERANCES[dtype]
    for tokens in (1, 40):
        case = random_case(SPECS[0], tokens, 513, EVEN_K, dtype=dtype, scale_dtype=scale_dtype, device="cuda")
        y = run(case)
        assert y.dtype is dtype
        torch.testing.assert_close(y.double(), case.expected(), atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_outputs_are_rounded_once(dtype: torch.dtype) -> None:
    for tokens in (1, 20):
        case = integer_case(SPECS[0], tokens, 65, K, bias=True, dtype=dtype, device="cuda")
        assert torch.equal(run(case), case.expected(torch.float32).to(dtype))


@pytest.mark.parametrize("tokens", [1, 30])
def test_eight_bit_activations_on_request(tokens: int) -> None:
    case = random_case(SPECS[0], tokens, 64, 512, device="cuda")
    y = run(case, Activation.A8).double()
    torch.testing.assert_close(y, case.expected(), atol=A8_TOLERANCE.atol, rtol=A8_TOLERANCE.rtol)
    spec = SliceSpec((2, 2), 32)
    case = integer_case(spec, tokens, 65, 96, largest=127, device="cuda")
    case.x[:, ::32] = 127.0  # the largest of each group is 127: a step of one
    assert torch.equal(run(case, Activation.A8), case.expected(torch.float32))


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[10]], ids=spec_id)
@pytest.mark.parametrize("tokens", [1, 9])
def test_the_largest_codes_and_activations_do_not_overflow(spec: SliceSpec, tokens: int) -> None:
    case = integer_case(spec, tokens, 33, 256, device="cuda")
    case.slices.fill_(-1)
    case.counts.fill_(spec.num_slices)
    for value in (1.99, -1.99, 1.0):
        case.x.fill_(value)
        torch.testing.assert_close(run(case).double(), case.expected(), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("tokens", [1, 30])
def test_values_that_are_not_finite_reach_their_token_only(tokens: int) -> None:
    for bad in (float("nan"), float("inf")):
        case = integer_case(SPECS[0], tokens, 65, K, bias=True, device="cuda")
        case.x[0, 5] = bad
        y = run(case)
        assert y[0].isnan().all()
        assert torch.equal(y[1:], case.expected(torch.float32)[1:])


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30, 1e30])
def test_activations_of_any_size(size: float) -> None:
    case = random_case(SPECS[1], 2, 33, 64, device="cuda")
    x = (case.x.double() * size).float()
    case = replace(case, x=x, bias=None)
    torch.testing.assert_close(run(case).double(), case.expected(), rtol=1e-3, atol=max(1e-3 * size, 1e-37))


def test_small_and_strided_tensors() -> None:
    case = integer_case(SPECS[2], 4, 3, 41, dtype=torch.float16, device="cuda")
    wide = torch.zeros(4, 100, dtype=torch.float16, device="cuda")
    wide[:, 7:48] = case.x
    wanted = case.expected(torch.float32).half()
    memory = torch.zeros(case.slices.numel() + 1, dtype=torch.int32, device="cuda")
    memory[1:] = case.slices.flatten()
    moved = replace(case, x=wide[:, 7:48], slices=memory[1:].view_as(case.slices))
    assert torch.equal(run(moved), wanted)
    for shape in ((0,), (2, 0), (2, 2), (4, 1)):
        x, counts = case.x[: torch.Size(shape).numel()], case.counts[: torch.Size(shape).numel()]
        y = wiring.routed_linear(x.view(*shape, 41), counts.view(shape), *case.arguments[2:], SPECS[2])
        assert torch.equal(y.view(-1, 3), wanted[: x.shape[0]])


@pytest.mark.parametrize("tokens", [1, 5])
def test_many_output_rows(tokens: int) -> None:
    """More than the kernels for few rows are made for, and offsets of outputs beyond 16 bits."""
    case = integer_case(SPECS[0], tokens, 70001, 128, bias=True, device="cuda")
    assert torch.equal(run(case), case.expected(torch.float32))


@pytest.mark.parametrize("tokens", [1, 5, 1000])
@pytest.mark.parametrize("slices", [1, 4])
@pytest.mark.parametrize("k", [1500, 33000])
def test_route(tokens: int, slices: int, k: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    x = torch.randint(-3, 4, (tokens, k), generator=g).to("cuda", torch.bfloat16)
    energy = torch.randint(0, 3, (k,), generator=g).float().cuda()
    gain = 4.0 ** -torch.arange(slices - 1, dtype=torch.float32, device="cuda")
    thresholds = torch.randint(3 * k, 5 * k, (slices - 1,), generator=g).cuda() * gain
    for described in (0, tokens):
        mask = torch.randint(0, 2, (2000,), generator=g, dtype=torch.int32).cuda()
        mask[0] = described
        hist, wanted_hist = torch.zeros(2, slices, dtype=torch.int64, device="cuda")
        wanted = reference.route(x, (energy, gain), thresholds, wanted_hist, mask, "energy")
        counts = wiring.route(x, (energy, gain), thresholds, hist, mask, "energy")
        assert torch.equal(counts, wanted)
        assert torch.equal(hist, wanted_hist)


def test_float64_goes_to_the_reference() -> None:
    case = integer_case(SPECS[0], 3, 5, K, dtype=torch.float64, device="cuda")
    assert torch.equal(run(case), case.expected())
