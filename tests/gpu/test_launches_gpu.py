"""Launches on the device: several weights in one, one after another without waiting, captured, and warmed up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mobiquant_compiler as mq
from mobiquant_compiler import reference, warming, wiring
from mobiquant_compiler.codegen import cache
from mobiquant_compiler.ops import OPS
from mobiquant_compiler.runtime import launch
from mobiquant_compiler.runtime.launch import Prepared, Weight
from mobiquant_compiler.spec import PREFILL_TOKENS, Activation, Prefill, SliceSpec
from tests import waiting
from tests.kernel_cases import EVEN_K, SPECS, Case, integer_case, random_case, spec_id

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WHERE = "cuda"
K = 200
INF = float("inf")


def siblings(spec: SliceSpec, tokens: int, rows: Sequence[int], *, bias: bool = False, k: int = K) -> list[Case]:
    """Return cases of several weights that share activations and counts."""
    cases = [integer_case(spec, tokens, n, k, bias=bias, seed=s, device=WHERE) for s, n in enumerate(rows)]
    return [replace(case, x=cases[0].x, counts=cases[0].counts) for case in cases]


def weights_of(cases: Sequence[Case]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor | None]]:
    """Return the tensors of all weights as the op takes them."""
    return [c.slices for c in cases], [c.scale for c in cases], [c.zero for c in cases], [c.bias for c in cases]


def run(cases: Sequence[Case], activation: Activation = Activation.A16) -> list[Tensor]:
    """Run all weights of the cases in one op."""
    spec = cases[0].spec
    return wiring.routed_linears(cases[0].x, cases[0].counts, *weights_of(cases), spec, activation, Prefill.EXACT)


@pytest.mark.parametrize("rows", [(203, 5), (1, 130, 16), (160, 3, 40, 1), (33, 33, 33, 33), (16, 24, 40, 31)], ids=str)
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[6]], ids=spec_id)
def test_weights_of_any_rows_in_one_launch(
    spec: SliceSpec, rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[int] = []
    multiply = launch.multiply

    def watched(kernel: launch.LaunchableKernel, prepared: Prepared, weights: Sequence[Weight]) -> list[Tensor]:
        launches.append(len(weights))
        return multiply(kernel, prepared, weights)

    monkeypatch.setattr(launch, "multiply", watched)
    for tokens in (1, 2, 20, 100):
        cases = siblings(spec, tokens, rows, bias=len(rows) % 2 == 0)
        for y, case in zip(run(cases), cases, strict=True):
            assert torch.equal(y, case.expected(torch.float32)), f"{tokens} tokens"
    assert launches == [len(rows)] * 4


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_weight_has_the_same_bits_among_siblings(activation: Activation, tokens: int) -> None:
    cases = [random_case(SPECS[0], tokens, n, EVEN_K, dtype=torch.bfloat16, seed=n, device=WHERE) for n in (30, 170, 2)]
    cases = [replace(case, x=cases[0].x, counts=cases[0].counts) for case in cases]
    for case, y in zip(cases, run(cases, activation), strict=True):
        assert torch.equal(y, wiring.routed_linear(*case.arguments, case.spec, activation))


@pytest.mark.parametrize("tokens", [1, 9])
def test_siblings_of_different_dtypes(tokens: int) -> None:
    first, second, third = siblings(SPECS[2], tokens, (17, 5, 3), bias=True)
    other = replace(second, scale=second.scale.float(), zero=second.zero.float())
    for cases in ([first, other], [first, replace(third, bias=None), second]):
        for case, y in zip(cases, run(cases), strict=True):
            assert torch.equal(y, case.expected(torch.float32))


def arguments_of(spec: SliceSpec, activation: str = "a16", prefill: str = "routed") -> tuple[object, ...]:
    """Return what ops take after the tensors."""
    return (list(spec.widths), spec.group, str(spec.layout), activation, prefill)


def test_the_ops_run_kernels() -> None:
    case = integer_case(SPECS[3], 9, 65, K, bias=True, device=WHERE)
    weight = (*case.arguments[2:], *arguments_of(case.spec))
    wanted = case.expected(torch.float32)
    assert torch.equal(OPS.routed_linear(case.x, case.counts, *weight), wanted)
    rows, offsets, grouped = OPS.gather(case.x, case.counts, case.spec.num_slices)
    assert torch.equal(OPS.scatter(OPS.slice_gemm(grouped, offsets, *weight), rows, case.counts), wanted)
    assert OPS.routed_linear(case.x[:0], case.counts[:0], *weight).shape == (0, 65)
    cases = [case, case]
    for y in OPS.routed_linears(case.x, case.counts, *weights_of(cases), *arguments_of(case.spec)):
        assert torch.equal(y, wanted)


def router_of(k: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Return router, thresholds, histogram and mask for four slices."""
    energy, gain = torch.ones(k, device=WHERE), torch.tensor([1.0, 0.5, 0.25], device=WHERE)
    hist = torch.zeros(4, dtype=torch.int64, device=WHERE)
    return [energy, gain], torch.zeros(3, device=WHERE), hist, torch.zeros(9, dtype=torch.int32, device=WHERE)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("tokens", [1, 16, 64, 100])
def test_a_captured_graph_follows_thresholds(tokens: int, parts: int) -> None:
    torch.use_deterministic_algorithms(False)  # filling would be captured too, and warns
    spec = SPECS[0]
    cases = siblings(spec, tokens, (130, 20, 7)[:parts], bias=True)
    router, thresholds, hist, mask = router_of(K)
    rows = sum(case.slices.shape[1] for case in cases)
    warming.warm_kernels(spec, rows, K, torch.float32, WHERE, bias_dtype=torch.float32, parts=parts)

    def step() -> list[Tensor]:
        routing = (cases[0].x, router, thresholds, hist, mask, "energy")
        return OPS.elastic_linears(*routing, *weights_of(cases), *arguments_of(spec))

    compiled = cache.compiled_kernels()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ys = step()
    assert cache.compiled_kernels() == compiled
    scores = cases[0].x.square().sum(1)
    for levels in ((-1.0, -1.0, -1.0), (INF,) * 3, tuple((scores.median() * router[1]).tolist())):
        thresholds.copy_(torch.tensor(levels))
        for y in ys:
            y.fill_(float("nan"))
        hist.zero_()
        graph.replay()
        wanted_hist = torch.zeros_like(hist)
        counts = reference.route(cases[0].x, router, thresholds, wanted_hist, mask, "energy")
        assert torch.equal(hist, wanted_hist)
        for y, case in zip(ys, cases, strict=True):
            assert torch.equal(y, replace(case, counts=counts).expected(torch.float32))


@pytest.mark.parametrize("tokens", [1, 8, 30])
def test_a_captured_graph_follows_counts(tokens: int) -> None:
    torch.use_deterministic_algorithms(False)
    case = integer_case(SPECS[0], tokens, 130, K, device=WHERE)
    warming.warm_kernels(SPECS[0], 130, K, torch.float32, WHERE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = wiring.routed_linear(*case.arguments, case.spec)
    for counts in ((1,), (4,), (2, 4), (1, 2, 3, 4)):
        case.counts.copy_(torch.tensor(counts).repeat(tokens)[:tokens])
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, case.expected(torch.float32)), f"counts {counts}"


class Block(nn.Module):
    """Linears that share their input, one behind another: enough launches for one to overtake another."""

    def __init__(self, k: int = 512, depth: int = 6) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(nn.ModuleList((nn.Linear(k, k), nn.Linear(k, k))) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for left, right in self.pairs:
            x = torch.nn.functional.normalize(left(x) + torch.tanh(right(x)), dim=-1) * 20
        return x


def elastic_block() -> Block:
    """Return a quantized block in bfloat16."""
    model = Block().eval().requires_grad_(False).to(WHERE, torch.bfloat16)
    mq.quantize_(model)
    return model


def test_launches_find_what_children_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kept: dict[str, int] = {}

    def progress(stage: str, done: int, total: int) -> None:
        kept[stage] = len(list(tmp_path.rglob("*.cubin")))

    report = mq.warmup(elastic_block(), max_tokens=16, workers=8, progress=progress)
    assert report.workers > 1
    assert kept["kernels"] == kept["compile"] > 0, "launches compiled nothing more"


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_a_captured_model_follows_the_budget(tokens: int) -> None:
    torch.use_deterministic_algorithms(False)
    model, x = elastic_block(), torch.randn(tokens, 512, dtype=torch.bfloat16, device=WHERE)
    mq.warmup(model)
    model(x)
    compiled = cache.compiled_kernels()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    seen = []
    for bits in (2, 8, 3, 5.5):
        mq.set_budget(model, bits)
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        seen.append(y.clone())
        assert torch.equal(y, model(x)), f"{bits} bits: a replay has the bits of a call"
    assert not torch.equal(seen[0], seen[1])
    assert cache.compiled_kernels() == compiled


@pytest.mark.parametrize("tokens", [1, 12])
def test_kernels_that_overlap_wait_for_what_they_read(tokens: int) -> None:
    """Launched in one go and one by one: the same bits, though each begins before the one before it ends."""
    torch.use_deterministic_algorithms(False)
    model, x = elastic_block(), torch.randn(tokens, 512, dtype=torch.bfloat16, device=WHERE)
    wanted = x
    for left, right in model.pairs:
        ys = []
        for linear in (left, right):
            scores = reference.energy_scores(wanted, [linear.router.energy, linear.router.gain])
            linear.router.thresholds.copy_(scores.median(0).values)  # tokens differ in their counts
            ys.append(linear(wanted))
            torch.cuda.synchronize()
        wanted = torch.nn.functional.normalize(ys[0] + torch.tanh(ys[1]), dim=-1) * 20
        torch.cuda.synchronize()
    for _ in range(20):
        found = model(x)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("parts", [1, 2])
def test_nothing_compiles_after_warming_up(parts: int, activation: Activation, dtype: torch.dtype) -> None:
    spec, k = SliceSpec((2, 1, 2), 64), 576
    rows = 48 * parts
    warming.warm_kernels(spec, rows, k, dtype, WHERE, bias_dtype=dtype, parts=parts, activation=activation)
    compiled = cache.compiled_kernels()
    assert compiled > 0
    energy = torch.ones(k, device=WHERE)
    gain, thresholds = torch.ones(2, device=WHERE), torch.zeros(2, device=WHERE)
    hist = torch.zeros(3, dtype=torch.int64, device=WHERE)
    mask = torch.zeros(1, dtype=torch.int32, device=WHERE)
    for tokens in (1, 2, 3, 8, 16, 17, 33, PREFILL_TOKENS, PREFILL_TOKENS + 1, 128, 1000):
        cases = [random_case(spec, tokens, 48, k, dtype=dtype, seed=s, device=WHERE) for s in range(parts)]
        routing = (cases[0].x, [energy, gain], thresholds, hist, mask, "energy")
        for prefill in Prefill:
            options = arguments_of(spec, str(activation), str(prefill))
            OPS.elastic_linears(*routing, *weights_of(cases), *options)
            OPS.routed_linears(cases[0].x, cases[0].counts, *weights_of(cases), *options)
        OPS.route(*routing, "routed")
        assert cache.compiled_kernels() == compiled, f"{tokens} tokens"


@pytest.mark.parametrize("tokens", [1, 20, PREFILL_TOKENS])
def test_nothing_waits_for_the_device(tokens: int) -> None:
    torch.use_deterministic_algorithms(False)
    cases = siblings(SPECS[0], tokens, (130, 20), bias=True)
    router, thresholds, hist, mask = router_of(K)

    def step() -> None:
        routing = (cases[0].x, router, thresholds, hist, mask, "energy")
        OPS.elastic_linears(*routing, *weights_of(cases), *arguments_of(SPECS[0]))

    step()  # what is compiled or loaded once may wait
    with waiting.is_an_error():
        step()
