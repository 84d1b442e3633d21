"""Trained routers on the device: a kernel chooses slice counts as the reference does, with the same bits everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mobiquant_compiler as mq
from mobiquant_compiler import reference, warming, wiring
from mobiquant_compiler.codegen import cache
from mobiquant_compiler.linear import Router, elastic_linears
from mobiquant_compiler.ops import OPS
from mobiquant_compiler.runtime.paths import execution_paths, reset_execution_paths
from mobiquant_compiler.spec import PREFILL_TOKENS, Activation, Path, Prefill, SliceSpec
from tests import waiting
from tests.kernel_cases import EVEN_K, SPECS, integer_case, random_case
from tests.network_cases import INF, WAYS, apart, integer_network, random_network, score_of, scores64, turns_at
from tests.tolerances import NETWORK_SCORES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WHERE = "cuda"
TOKENS = (1, 2, 7, PREFILL_TOKENS, PREFILL_TOKENS + 1, PREFILL_TOKENS + 3, 1000)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Columns, hidden units and dtype of activations: an odd number of columns, several steps and several passes are among
# them. Every one is six kernels to compile.
SHAPES = ((40, 12, FP32), (577, 5, FP16), (EVEN_K, 12, FP32), (4096, 12, BF16), (1100, 40, BF16), (14336, 12, FP16))


def normal(tokens: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return tokens of different sizes."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, k, generator=g) * (0.5 + torch.rand(tokens, 1, generator=g))).to(WHERE, dtype)


def both(x: Tensor, router: list[Tensor], thresholds: Tensor, mask: Tensor | None = None) -> None:
    """Check counts and histogram of either kernel, on top of what was there, and that quantizing wrote everything."""
    mask = torch.zeros(1, dtype=torch.int32, device=WHERE) if mask is None else mask
    before = torch.arange(len(thresholds) + 1, device=WHERE) * 5
    wanted_hist, hist, again = before.clone(), before.clone(), before.clone()
    wanted = reference.route(x, router, thresholds, wanted_hist, mask, "mlp")
    assert torch.equal(wiring.route(x, router, thresholds, hist, mask, "mlp"), wanted)
    assert torch.equal(hist, wanted_hist)
    spec = SliceSpec((1,) * len(before), 128)
    quantized = wiring.prepare(x, router, thresholds, again, mask, spec, Activation.A16)
    assert torch.equal(quantized.counts, wanted.flatten())
    assert torch.equal(again, wanted_hist)
    plain = wiring.prepare(x, router[:2], thresholds, again, mask, spec, Activation.A16)
    tokens = wanted.numel()
    assert torch.equal(quantized.affine[:, :tokens], plain.affine[:, :tokens]), "as a data-free router quantizes"
    assert torch.equal(bytes_of(quantized.high, tokens), bytes_of(plain.high, tokens))
    assert torch.equal(bytes_of(quantized.low, tokens), bytes_of(plain.low, tokens))


def bytes_of(half: Tensor, tokens: int) -> Tensor:
    """Return the bytes of real tokens, groups of 128: what lies there for tokens that are none was not written."""
    groups, blocks, *_ = half.shape
    parts = half.view(groups, blocks, 2, 8, 64)  # a token has four lanes of sixteen bytes in either part
    return parts.movedim(2, 3).reshape(groups, blocks * 8, 128)[:, :tokens]


@pytest.fixture
def without_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any call of the reference fail."""

    def refuse(*args: Any) -> Tensor:
        raise AssertionError("a trained router went to the reference")

    monkeypatch.setattr(reference, "route", refuse)
    monkeypatch.setitem(reference.SCORES, "mlp", refuse)


@pytest.mark.parametrize(("k", "hidden", "dtype"), SHAPES, ids=str)
def test_counts_are_exact_where_scores_are(k: int, hidden: int, dtype: torch.dtype) -> None:
    for tokens in TOKENS:
        router, g = integer_network(k, 4, hidden, device=WHERE), torch.Generator().manual_seed(tokens)
        x = torch.randint(-3, 4, (tokens, k), generator=g).to(WHERE, dtype)
        thresholds = reference.mlp_scores(x, router).median(0).values
        both(x, router, thresholds)


@pytest.mark.parametrize("slices", [1, 2, 8])
def test_any_number_of_slices(slices: int) -> None:
    for tokens in (1, 70):
        router, x = integer_network(200, slices, 12, device=WHERE), torch.ones(tokens, 200, device=WHERE)
        both(x, router, torch.full((slices - 1,), 1.0, device=WHERE))


@pytest.mark.parametrize(("k", "hidden", "dtype"), SHAPES, ids=str)
def test_counts_where_thresholds_are_between_scores(k: int, hidden: int, dtype: torch.dtype) -> None:
    router = random_network(k, 4, hidden, device=WHERE)
    for tokens in (1, 7, PREFILL_TOKENS + 1):
        x = normal(tokens, k, dtype)
        both(x, router, apart(scores64(x, router)))


@pytest.mark.parametrize(("k", "hidden", "dtype"), SHAPES, ids=str)
def test_scores_are_as_near_as_float32_allows(k: int, hidden: int, dtype: torch.dtype) -> None:
    router, x = random_network(k, 4, hidden, device=WHERE), normal(1, k, dtype)
    wanted = scores64(x, router)[0].tolist()
    for index in range(3):
        error = abs(score_of(WAYS[0], x, router, index) - wanted[index]) / wanted[index]
        assert error <= NETWORK_SCORES.error, NETWORK_SCORES.reason


@pytest.mark.parametrize(("k", "hidden", "dtype"), SHAPES, ids=str)
def test_a_token_scores_to_the_same_bits_everywhere(k: int, hidden: int, dtype: torch.dtype) -> None:
    router, x = random_network(k, 4, hidden, device=WHERE), normal(1000, k, dtype)
    for token in (0, 3):
        found = score_of(WAYS[0], x[token : token + 1], router, 1)
        for way in WAYS:
            assert turns_at(way, x[token : token + 1], router, 1, 0, found), f"{way.name}, alone"
            for tokens in TOKENS[1:]:
                for place in {0, tokens // 2, tokens - 1}:
                    batch = x[torch.arange(tokens, device=WHERE) + 4 if tokens < 900 else slice(None)].clone()
                    batch[place] = x[token]
                    assert turns_at(way, batch, router, 1, place, found), f"{way.name}, {place} of {tokens}"


@pytest.mark.parametrize("tokens", [5, PREFILL_TOKENS + 5])
def test_padding_is_not_counted(tokens: int) -> None:
    router, x = integer_network(200, 4, 12, device=WHERE), torch.ones(tokens, 200, device=WHERE)
    for described in (tokens, tokens + 1):
        mask = torch.zeros(100, dtype=torch.int32, device=WHERE)
        mask[0], mask[1::3] = described, 1
        both(x, router, torch.full((3,), 100.0, device=WHERE), mask)


@pytest.mark.parametrize("tokens", [3, PREFILL_TOKENS + 3])
@pytest.mark.parametrize("bad", [float("nan"), INF, -INF])
def test_a_token_that_is_not_finite_gets_the_base_slice(bad: float, tokens: int) -> None:
    router, x = random_network(200, 4, 12, device=WHERE), normal(tokens, 200)
    x[1, 7] = bad
    hist, mask = torch.zeros(4, dtype=torch.int64, device=WHERE), torch.zeros(1, dtype=torch.int32, device=WHERE)
    counts = wiring.route(x, router, torch.full((3,), -INF, device=WHERE), hist, mask, "mlp").tolist()
    assert counts == [1 if token == 1 else 4 for token in range(tokens)]


@pytest.mark.usefixtures("without_reference")
@pytest.mark.parametrize("shape", [(0,), (), (2, 3), (2, 40)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    router = integer_network(200, 4, 12, device=WHERE)
    hist, mask = torch.zeros(4, dtype=torch.int64, device=WHERE), torch.zeros(1, dtype=torch.int32, device=WHERE)
    high = torch.full((3,), INF, device=WHERE)
    counts = OPS.route(torch.ones(*shape, 200, device=WHERE), router, high, hist, mask, "mlp", "routed")
    assert counts.shape == shape
    assert bool((counts == 1).all())
    assert hist.tolist() == [counts.numel(), 0, 0, 0]


def step_of(case: Any, router: list[Tensor], thresholds: Tensor, hist: Tensor) -> Callable[[], Tensor]:
    """Return a call of one elastic linear that asks a trained router."""
    mask, spec = torch.zeros(1, dtype=torch.int32, device=WHERE), case.spec
    weight = (case.slices, case.scale, case.zero, case.bias)
    options = (list(spec.widths), spec.group, str(spec.layout), "a16", "exact")
    return lambda: OPS.elastic_linear(case.x, router, thresholds, hist, mask, "mlp", *weight, *options)


@pytest.mark.parametrize("tokens", [1, 7, PREFILL_TOKENS, PREFILL_TOKENS + 6])
def test_a_captured_graph_follows_thresholds(tokens: int) -> None:
    torch.use_deterministic_algorithms(False)  # filling would be captured too, and warns
    k, spec = 200, SPECS[0]
    case, router = integer_case(spec, tokens, 130, k, device=WHERE), random_network(k, 4, 12, device=WHERE)
    thresholds, hist = torch.zeros(3, device=WHERE), torch.zeros(4, dtype=torch.int64, device=WHERE)
    warming.warm_kernels(spec, 130, k, torch.float32, WHERE, hidden=12)
    step, compiled = step_of(case, router, thresholds, hist), cache.compiled_kernels()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    assert cache.compiled_kernels() == compiled
    for levels in (torch.full((3,), -INF), torch.full((3,), INF), apart(scores64(case.x, router))):
        thresholds.copy_(levels)
        y.fill_(float("nan"))
        hist.zero_()
        graph.replay()
        wanted_hist, mask = torch.zeros_like(hist), torch.zeros(1, dtype=torch.int32, device=WHERE)
        case.counts.copy_(reference.route(case.x, router, thresholds, wanted_hist, mask, "mlp"))
        assert torch.equal(hist, wanted_hist)
        assert torch.equal(y, case.expected(torch.float32))


@pytest.mark.usefixtures("without_reference")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("hidden", [12, 20])
def test_nothing_compiles_after_warming_up_and_nothing_falls_back(hidden: int, dtype: torch.dtype) -> None:
    spec, k = SliceSpec((2, 1, 2), 64), 576
    warming.warm_kernels(spec, 48, k, dtype, WHERE, bias_dtype=dtype, hidden=hidden)
    compiled, router = cache.compiled_kernels(), random_network(k, 3, hidden, device=WHERE)
    hist, mask = torch.zeros(3, dtype=torch.int64, device=WHERE), torch.zeros(1, dtype=torch.int32, device=WHERE)
    reset_execution_paths()
    for tokens in (1, 2, 3, 16, 17, PREFILL_TOKENS, PREFILL_TOKENS + 1, 128, 1000):
        case = random_case(spec, tokens, 48, k, dtype=dtype, device=WHERE)
        routing = (case.x, router, torch.zeros(2, device=WHERE), hist, mask, "mlp")
        weight = (case.slices, case.scale, case.zero, case.bias)
        for prefill in (Prefill.ROUTED, Prefill.EXACT):
            OPS.elastic_linear(*routing, *weight, list(spec.widths), 64, "slice_major", "a16", str(prefill))
        OPS.route(*routing, "routed")
        assert cache.compiled_kernels() == compiled, f"{tokens} tokens"
    assert str(Path.REFERENCE) not in {row["path"] for row in execution_paths()}


@pytest.mark.parametrize("tokens", [1, 20, PREFILL_TOKENS + 1])
def test_nothing_waits_for_the_device(tokens: int) -> None:
    torch.use_deterministic_algorithms(False)
    case, router = integer_case(SPECS[0], tokens, 130, 200, device=WHERE), random_network(200, 4, 12, device=WHERE)
    step = step_of(case, router, torch.zeros(3, device=WHERE), torch.zeros(4, dtype=torch.int64, device=WHERE))
    step()  # what is compiled or loaded once may wait
    with waiting.is_an_error():
        step()


@pytest.mark.usefixtures("without_reference")
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_model_of_trained_routers_follows_thresholds_in_a_graph(tokens: int) -> None:
    torch.use_deterministic_algorithms(False)
    model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Tanh(), torch.nn.Linear(512, 256))
    model = model.eval().requires_grad_(False).to(WHERE, torch.bfloat16)
    mq.quantize_(model)
    routers: list[Router] = [linear.router for linear in elastic_linears(model).values()]
    for number, router in enumerate(routers):
        router.learn(random_network(512, 4, 12, seed=number)[2:])
    x = torch.randn(tokens, 512, dtype=torch.bfloat16, device=WHERE)
    mq.warmup(model)
    compiled = cache.compiled_kernels()
    model(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    seen = []
    for level in (-INF, INF):
        for router in routers:
            router.thresholds.fill_(level)
        y.fill_(float("nan"))
        graph.replay()
        seen.append(y.clone())
        assert torch.equal(y, model(x))
    assert not torch.equal(*seen)
    assert cache.compiled_kernels() == compiled
