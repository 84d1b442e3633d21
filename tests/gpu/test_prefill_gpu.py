"""The workspace way of prefill on the device: exact workspaces, products by group, capture, no wait for the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mobiquant_compiler import wiring
from mobiquant_compiler.codegen import cache
from mobiquant_compiler.codegen.cache import Kernel
from mobiquant_compiler.codegen.configs import TokenClass, kernel_spec
from mobiquant_compiler.packing import unpack
from mobiquant_compiler.runtime import prefill
from mobiquant_compiler.runtime.launch import Weight
from mobiquant_compiler.slices import reconstruct
from mobiquant_compiler.spec import Family, SliceSpec
from tests import waiting
from tests.kernel_cases import BIT, SPECS, Case, integer_case, random_case, spec_id
from tests.prefill_calls import uniform_linear, workspace_linear
from tests.tolerances import WORKSPACE_RMS, WORKSPACE_TOLERANCES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Few bits: weights of `integer_case` are exact in bfloat16, sums in float32, so outputs are rounded once and no more.
EXACT_SPECS = (SliceSpec((2, 2), 64), SliceSpec((2, 1), 32, BIT))
K = 200  # no group divides it
NAN = float("nan")


@pytest.fixture
def grouped() -> None:
    """Skip, with the reason, where the device has no grouped GEMM."""
    reason = prefill.supports(torch.empty(1, dtype=torch.bfloat16, device="cuda"), 512, 2048)
    if reason is not None:
        pytest.skip(reason)


def kernel_of(spec: SliceSpec, k: int, sorted_rows: bool = True) -> Kernel:
    """Return the kernel for tokens sorted by their counts, or that for tokens of one count."""
    target = wiring.target_of(torch.device("cuda", torch.cuda.current_device()))
    return cache.load(kernel_spec(Family.DEQUANTIZE, spec, k, TokenClass.MANY, target, sorted_rows=sorted_rows))


def packed(case: Case) -> Weight:
    """Return the weight of a case."""
    return Weight(case.slices, case.scale, case.zero, case.bias)


def weight_of(case: Case, count: int, dtype: torch.dtype) -> Tensor:
    """Return ``W_count`` as a workspace holds it: the float32 reference, rounded once."""
    codes = unpack(case.slices, case.spec, count)
    return reconstruct(codes, case.scale.float(), case.zero.float(), case.spec, count).to(dtype)


def with_rounded_weights(case: Case) -> Tensor:
    """Return the products in float64 of activations and weights rounded to their dtype, without bias."""
    y = torch.empty(case.x.shape[0], case.scale.shape[0], dtype=torch.float64, device="cuda")
    for count in range(1, case.spec.num_slices + 1):
        weight = weight_of(case, count, case.x.dtype)[:, : case.x.shape[1]].double()
        y[case.counts == count] = case.x[case.counts == count].double() @ weight.t()
    return y


def offsets_for(counts: set[int], slices: int) -> Tensor:
    """Return offsets of groups of which those in `counts` have tokens."""
    sizes = torch.tensor([0, *(3 if c in counts else 0 for c in range(1, slices + 1))])
    return sizes.cumsum(0).to("cuda", torch.int32)


def run(case: Case) -> Tensor:
    """Run the workspace linear of a case."""
    return workspace_linear(kernel_of(case.spec, case.x.shape[-1]), *case.arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_workspaces_are_the_reference_rounded_once(spec: SliceSpec, dtype: torch.dtype) -> None:
    case = random_case(spec, 1, 203, K, device="cuda")
    last = spec.num_slices
    for used in ({*range(1, last + 1)}, {1}, {last}, {1, last}, {*range(1, last)}):
        workspace = torch.full((last, 203, spec.padded(K)), NAN, dtype=dtype, device="cuda")
        prefill.dequantize(kernel_of(spec, K), packed(case), offsets_for(used, last), workspace)
        for count in range(1, last + 1):
            if count in used:
                assert torch.equal(workspace[count - 1], weight_of(case, count, dtype)), f"{count} of {used}"
            else:
                assert workspace[count - 1].isnan().all(), f"{count} is not in {used}"
    for count in range(1, last + 1):
        case.counts.fill_(count)
        workspace = torch.full((203, spec.padded(K)), NAN, dtype=dtype, device="cuda")
        prefill.dequantize(kernel_of(spec, K, sorted_rows=False), packed(case), case.counts, workspace)
        assert torch.equal(workspace, weight_of(case, count, dtype)), f"all tokens use {count}"


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
def test_a_large_workspace_and_rows_of_it(scale_dtype: torch.dtype) -> None:
    case = random_case(SPECS[0], 1, 4099, 4096, scale_dtype=scale_dtype, device="cuda")
    offsets = offsets_for({1, 2, 3, 4}, 4)
    for first, rows in ((0, 4099), (1, 1), (4000, 99)):
        workspace = torch.full((4, rows, 4096), NAN, dtype=torch.bfloat16, device="cuda")
        prefill.dequantize(kernel_of(SPECS[0], 4096), packed(case), offsets, workspace, first)
        for count in range(1, 5):
            wanted = weight_of(case, count, torch.bfloat16)[first : first + rows]
            assert torch.equal(workspace[count - 1], wanted), f"{rows} rows from {first}, {count} slices"


def test_small_scales_are_not_flushed() -> None:
    case = random_case(SPECS[0], 1, 33, 128, scale_dtype=torch.float32, device="cuda")
    case.scale.mul_(1e-38)
    workspace = torch.full((4, 33, 128), NAN, device="cuda")
    prefill.dequantize(kernel_of(SPECS[0], 128), packed(case), offsets_for({1, 4}, 4), workspace)
    for count in (1, 4):
        assert torch.equal(workspace[count - 1], weight_of(case, count, torch.float32))


def test_weights_of_more_than_two_to_the_31_columns() -> None:
    spec, k = SliceSpec((2,), 128), 8192
    n = (1 << 31) // k + 3
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free memory")
    slices = torch.randint(-(1 << 31), 1 << 31, spec.packed_shape(n, k), dtype=torch.int32, device="cuda")
    scale = torch.rand(spec.scale_shape(n, k), device="cuda").half()
    zero = torch.rand(spec.scale_shape(n, k), device="cuda").half()
    weight, one = Weight(slices, scale, zero, None), torch.ones(1, dtype=torch.int32, device="cuda")
    workspace = torch.full((n, k), NAN, dtype=torch.bfloat16, device="cuda")
    prefill.dequantize(kernel_of(spec, k, sorted_rows=False), weight, one, workspace)
    last = torch.full((1, 4, k), NAN, dtype=torch.bfloat16, device="cuda")
    prefill.dequantize(kernel_of(spec, k), weight, offsets_for({1}, 1), last, n - 4)
    for rows in (slice(0, 4), slice(n - 4, n)):
        # Rows of one unit follow one another, so a few of them are a packed weight of their own.
        codes = unpack(slices.view(n, -1)[rows].reshape(2, 4, -1), spec, 1)
        wanted = reconstruct(codes, scale[rows].float(), zero[rows].float(), spec, 1).bfloat16()
        assert torch.equal(workspace[rows], wanted)
    assert torch.equal(last[0], wanted)
    assert not workspace.isnan().any()


@pytest.mark.usefixtures("grouped")
@pytest.mark.parametrize("spec", EXACT_SPECS, ids=spec_id)
@pytest.mark.parametrize("tokens", [1, 2, 7, 65, 130, 1000])
def test_products_of_integers_are_rounded_once(spec: SliceSpec, tokens: int) -> None:
    for n in (203, 256, 1):
        case = integer_case(spec, tokens, n, K, dtype=torch.bfloat16, seed=tokens, device="cuda")
        assert torch.equal(run(case), case.expected(torch.float32).bfloat16()), f"{n} rows"


@pytest.mark.usefixtures("grouped")
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[1], SPECS[3]], ids=spec_id)
@pytest.mark.parametrize("tokens", [65, 130, 1000])
def test_products_are_near_the_float64_reference(spec: SliceSpec, tokens: int) -> None:
    case = random_case(spec, tokens, 513, 2048, dtype=torch.bfloat16, device="cuda")
    y, wanted = run(case).double(), case.expected()
    atol, rtol, _ = WORKSPACE_TOLERANCES[torch.bfloat16]
    torch.testing.assert_close(y, wanted, atol=atol, rtol=rtol)
    assert (y - wanted).norm() <= WORKSPACE_RMS * wanted.norm()


@pytest.mark.usefixtures("grouped")
@pytest.mark.parametrize("counts", [(1,), (4,), (1, 4), (2, 3), (3,), (1, 2, 3, 4)], ids=str)
def test_counts_that_no_token_has(counts: tuple[int, ...]) -> None:
    """Weights compared as they were rounded: what is left is one rounding of the output."""
    for tokens in (65, 1000):
        case = random_case(SPECS[0], tokens, 520, 1000, dtype=torch.bfloat16, device="cuda")
        case.counts.copy_(torch.tensor(counts).repeat(tokens)[:tokens])
        y = workspace_linear(kernel_of(SPECS[0], 1000), *case.arguments[:5], None)
        torch.testing.assert_close(y.double(), with_rounded_weights(case), rtol=2**-8, atol=1e-4)


@pytest.mark.usefixtures("grouped")
def test_linears_that_share_their_tokens() -> None:
    cases = [integer_case(EXACT_SPECS[1], 130, n, K, dtype=torch.bfloat16, seed=n, device="cuda") for n in (64, 203)]
    cases[1] = replace(cases[1], x=cases[0].x, counts=cases[0].counts)
    weights = [packed(case) for case in cases]
    found = prefill.workspace_linears(kernel_of(EXACT_SPECS[1], K), cases[0].x, cases[0].counts, weights)
    for y, case in zip(found, cases, strict=True):
        assert torch.equal(y, case.expected(torch.float32).bfloat16())


@pytest.mark.usefixtures("grouped")
def test_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "WORKSPACE_BYTES", 1)
    case = integer_case(EXACT_SPECS[0], 130, 700, K, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(run(case), case.expected(torch.float32).bfloat16())


@pytest.mark.usefixtures("grouped")
def test_values_that_are_not_finite_reach_their_token_only() -> None:
    case = random_case(SPECS[0], 200, 256, 512, dtype=torch.bfloat16, device="cuda")
    case.x[17, 5] = NAN
    y = run(case)
    assert y[17].isnan().all()
    y[17] = 0
    assert y.isfinite().all()


@pytest.mark.usefixtures("grouped")
@pytest.mark.parametrize("shape", [(0,), (2, 0), (), (1, 1), (2, 65)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    tokens = torch.Size(shape).numel()
    case = integer_case(EXACT_SPECS[0], max(tokens, 1), 40, K, dtype=torch.bfloat16, device="cuda")
    x, counts = case.x[:tokens].view(*shape, K), case.counts[:tokens].view(shape)
    y = workspace_linear(kernel_of(case.spec, K), x, counts, *case.arguments[2:])
    assert y.shape == (*shape, 40)
    assert torch.equal(y.view(tokens, 40), case.expected(torch.float32).bfloat16()[:tokens])


@pytest.mark.usefixtures("grouped")
@pytest.mark.parametrize("tokens", [65, 1000])
def test_nothing_waits_for_the_device(tokens: int) -> None:
    torch.use_deterministic_algorithms(False)
    case = random_case(SPECS[0], tokens, 513, K, dtype=torch.bfloat16, device="cuda")
    uniform, kernel = kernel_of(SPECS[0], K, sorted_rows=False), kernel_of(SPECS[0], K)

    def both() -> None:
        workspace_linear(kernel, *case.arguments)
        uniform_linear(uniform, *case.arguments)

    both()  # what is compiled or loaded once may wait
    with waiting.is_an_error():
        both()


@pytest.mark.usefixtures("grouped")
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("tokens", [65, 1000])
def test_a_captured_graph_follows_counts(tokens: int, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(False)  # filling would be captured too, and warns
    if chunked:
        monkeypatch.setattr(prefill, "WORKSPACE_BYTES", 1)
    case = random_case(SPECS[0], tokens, 520, 2048, dtype=torch.bfloat16, device="cuda")
    run(case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(case)
    atol, rtol, _ = WORKSPACE_TOLERANCES[torch.bfloat16]
    for counts in ((1,), (4,), (2, 4), (1, 2, 3, 4)):
        case.counts.copy_(torch.tensor(counts).repeat(tokens)[:tokens])
        y.fill_(NAN)
        graph.replay()
        torch.testing.assert_close(y.double(), case.expected(), atol=atol, rtol=rtol)
        assert torch.equal(y, run(case)), f"counts {counts}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 65, 300])
def test_products_with_one_count_are_near_the_float64_reference(tokens: int, dtype: torch.dtype) -> None:
    case = random_case(SPECS[0], tokens, 513, 2000, dtype=dtype, device="cuda")
    atol, rtol, _ = WORKSPACE_TOLERANCES[dtype]
    for count in (1, 3, 4):
        case.counts.fill_(count)
        y = uniform_linear(kernel_of(SPECS[0], 2000, sorted_rows=False), *case.arguments)
        assert y.dtype is dtype
        torch.testing.assert_close(y.double(), case.expected(), atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_with_one_count_in_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "WORKSPACE_BYTES", 1)
    case = integer_case(EXACT_SPECS[0], 70, 700, K, dtype=dtype, device="cuda")
    case.counts.fill_(2)
    y = uniform_linear(kernel_of(case.spec, K, sorted_rows=False), *case.arguments)
    # Libraries may round partial sums to the dtype of the output, which float32 alone does without an error.
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 0.0}[dtype]
    torch.testing.assert_close(y.double(), case.expected(), rtol=rounding, atol=100 * rounding)


def test_a_captured_graph_follows_the_one_count() -> None:
    torch.use_deterministic_algorithms(False)
    case = random_case(SPECS[0], 300, 513, 2048, dtype=torch.bfloat16, device="cuda")
    case.counts.fill_(4)
    kernel = kernel_of(SPECS[0], 2048, sorted_rows=False)
    uniform_linear(kernel, *case.arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = uniform_linear(kernel, *case.arguments)
    atol, rtol, _ = WORKSPACE_TOLERANCES[torch.bfloat16]
    for count in (1, 3, 4):
        case.counts.fill_(count)
        y.fill_(NAN)
        graph.replay()
        torch.testing.assert_close(y.double(), case.expected(), atol=atol, rtol=rtol)


def test_what_is_supported() -> None:
    assert prefill.supports(torch.empty(2, 128, dtype=torch.float16, device="cuda"), 8, 128) is not None
    major, _ = torch.cuda.get_device_capability()
    found = prefill.supports(torch.empty(2, 128, dtype=torch.bfloat16, device="cuda"), 8, 128)
    assert (found is None) == (major in (9, 10))
