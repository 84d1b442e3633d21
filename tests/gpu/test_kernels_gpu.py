"""Kernels on the device against the reference: every regime, capture into CUDA graphs, memory poisoned beforehand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mobiquant_compiler import reference, wiring
from mobiquant_compiler.ops import OPS
from mobiquant_compiler.spec import Activation, SliceSpec
from tests.kernel_cases import BIT, SLICE, Case, integer_case, random_case, spec_id
from tests.tolerances import A8_TOLERANCE, TOLERANCES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECS = (
    SliceSpec((2, 2, 2, 2), 128, SLICE),
    SliceSpec((2, 2, 2, 2), 64, BIT),
    SliceSpec((4, 2, 2), 64, SLICE),
    SliceSpec((3, 3, 2), 32, BIT),
    SliceSpec((1,) * 8, 128, SLICE),
    SliceSpec((4, 4), 32, SLICE),
)
TOKENS = (1, 2, 7, 33, 64, 130, 1000)
K = 200  # sums of integers stay exact in float32, and no group divides it


@pytest.fixture(autouse=True)
def _cache_and_poison(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """Emit kernels into a directory of this run; what no kernel writes is NaN or the largest integer."""
    directory: Path = tmp_path_factory.getbasetemp() / "kernels"
    monkeypatch.setenv("MOBIQUANT_CACHE", str(directory))
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def run(case: Case, activation: Activation = Activation.A16) -> torch.Tensor:
    """Run the routed linear of a case on the device."""
    return wiring.routed_linear(*case.arguments, case.spec, activation)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_integers_are_exact_for_every_number_of_tokens(spec: SliceSpec) -> None:
    for tokens in TOKENS:
        case = integer_case(spec, tokens, 203, K, bias=True, seed=tokens, device="cuda")
        assert torch.equal(run(case), case.expected(torch.float32)), f"{tokens} tokens"


@pytest.mark.parametrize("spec", SPECS[:4], ids=spec_id)
def test_decode_is_exact_at_every_count(spec: SliceSpec) -> None:
    case = integer_case(spec, 1, 203, K, device="cuda")
    for count in range(1, spec.num_slices + 1):
        case.counts.fill_(count)
        assert torch.equal(run(case), case.expected(torch.float32)), f"{count} slices"


@pytest.mark.parametrize("tokens", [7, 20, 40, 100, 130, 300])
def test_tiles_of_any_mix_of_counts(tokens: int) -> None:
    """Tiles that leave out the first counts, the last, or those between."""
    case = integer_case(SPECS[0], tokens, 203, K, device="cuda")
    for counts in ((1,), (2,), (4,), (1, 2), (3, 4), (2, 3), (1, 4), (2, 3, 4)):
        case.counts.copy_(torch.tensor(counts).repeat(tokens)[:tokens])
        assert torch.equal(run(case), case.expected(torch.float32)), f"counts {counts}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_random_data_is_near_the_float64_reference(tokens: int, dtype: torch.dtype) -> None:
    case = random_case(SPECS[0], tokens, 513, 2048, dtype=dtype, device="cuda")
    atol, rtol, _ = TOLERANCES[dtype]
    torch.testing.assert_close(run(case).double(), case.expected(), atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_outputs_are_rounded_once(dtype: torch.dtype) -> None:
    for tokens in (1, 20):
        case = integer_case(SPECS[0], tokens, 65, K, bias=True, dtype=dtype, device="cuda")
        assert torch.equal(run(case), case.expected(torch.float32).to(dtype))


def test_a_token_does_not_depend_on_its_batch() -> None:
    case = random_case(SPECS[0], 300, 130, 512, dtype=torch.bfloat16, device="cuda")
    whole = run(case)
    for start, stop in ((0, 2), (2, 20), (20, 84), (84, 300)):
        part = Case(case.spec, case.x[start:stop], case.counts[start:stop], *case.arguments[2:])
        assert torch.equal(run(part), whole[start:stop]), f"tokens {start} to {stop}"


@pytest.mark.parametrize("tokens", [1, 30])
def test_eight_bit_activations_on_request(tokens: int) -> None:
    case = random_case(SPECS[0], tokens, 64, 512, device="cuda")
    y = run(case, Activation.A8).double()
    torch.testing.assert_close(y, case.expected(), atol=A8_TOLERANCE.atol, rtol=A8_TOLERANCE.rtol)


@pytest.mark.parametrize("tokens", [1, 30])
def test_values_that_are_not_finite_reach_their_token_only(tokens: int) -> None:
    for bad in (float("nan"), float("inf")):
        case = integer_case(SPECS[0], tokens, 65, K, bias=True, device="cuda")
        case.x[0, 5] = bad
        y = run(case)
        assert y[0].isnan().all()
        assert y[1:].isfinite().all()


@pytest.mark.parametrize("tokens", [1, 5, 1000])
@pytest.mark.parametrize("slices", [1, 4])
def test_route(tokens: int, slices: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    x = torch.randint(-3, 4, (tokens, 1500), generator=g).to("cuda", torch.bfloat16)
    energy = torch.randint(0, 3, (1500,), generator=g).float().cuda()
    gain = 4.0 ** -torch.arange(slices - 1, dtype=torch.float32, device="cuda")
    thresholds = torch.randint(4000, 8000, (slices - 1,), generator=g).cuda() * gain
    for described in (0, tokens):
        mask = torch.randint(0, 2, (2000,), generator=g, dtype=torch.int32).cuda()
        mask[0] = described
        hist, wanted_hist = torch.zeros(2, slices, dtype=torch.int64, device="cuda")
        wanted = reference.route(x, (energy, gain), thresholds, wanted_hist, mask, "energy")
        counts = wiring.route(x, (energy, gain), thresholds, hist, mask, "energy")
        assert torch.equal(counts, wanted)
        assert torch.equal(hist, wanted_hist)


def test_the_ops_run_kernels() -> None:
    case = integer_case(SPECS[2], 9, 65, K, bias=True, device="cuda")
    weight = (*case.arguments[2:], list(case.spec.widths), case.spec.group, str(case.spec.layout))
    wanted = case.expected(torch.float32)
    assert torch.equal(OPS.routed_linear(case.x, case.counts, *weight), wanted)
    rows, offsets, grouped = OPS.gather(case.x, case.counts, case.spec.num_slices)
    assert torch.equal(OPS.scatter(OPS.slice_gemm(grouped, offsets, *weight), rows, case.counts), wanted)
    assert OPS.routed_linear(case.x[:0], case.counts[:0], *weight).shape == (0, 65)


@pytest.mark.parametrize("tokens", [1, 16, 100])
def test_a_captured_graph_follows_counts_and_thresholds(tokens: int) -> None:
    torch.use_deterministic_algorithms(False)  # filling would be captured too, and warns
    spec = SPECS[0]
    case = integer_case(spec, tokens, 130, K, bias=True, device="cuda")
    weight = (*case.arguments[2:], list(spec.widths), spec.group, str(spec.layout))
    energy, gain = torch.ones(K, device="cuda"), torch.tensor([1.0, 0.5, 0.25], device="cuda")
    thresholds = torch.zeros(3, device="cuda")
    hist = torch.zeros(4, dtype=torch.int64, device="cuda")
    mask = torch.zeros(9, dtype=torch.int32, device="cuda")
    wiring.warm_kernels(spec, 130, K, torch.float32, "cuda", bias_dtype=torch.float32)

    def step() -> torch.Tensor:
        return OPS.elastic_linear(case.x, [energy, gain], thresholds, hist, mask, "energy", *weight)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    scores = case.x.square().sum(1)
    for levels in ((-1.0, -1.0, -1.0), (float("inf"),) * 3, tuple((scores.median() * gain).tolist())):
        thresholds.copy_(torch.tensor(levels))
        y.fill_(float("nan"))
        hist.zero_()
        graph.replay()
        wanted_hist = torch.zeros_like(hist)
        counts = reference.route(case.x, (energy, gain), thresholds, wanted_hist, mask, "energy")
        assert torch.equal(hist, wanted_hist)
        wanted = reference.routed_linear(case.x, counts, *case.arguments[2:], spec)
        assert torch.equal(y, wanted)


def test_float64_goes_to_the_reference() -> None:
    case = integer_case(SPECS[0], 3, 5, K, dtype=torch.float64, device="cuda")
    assert torch.equal(run(case), case.expected())
