"""Blocks of tokens by products of warpgroups on the device: the bits of the kernels that every GPU has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import mobiquant_compiler as mq
from mobiquant_compiler import kernels, reference, wiring
from mobiquant_compiler.codegen.batch_configs import ROWS, BatchTile
from mobiquant_compiler.kernels import prepare_kernel, target_of
from mobiquant_compiler.runtime import fused, launch
from mobiquant_compiler.runtime.launch import Weight
from mobiquant_compiler.spec import Activation, Prefill, SliceSpec
from mobiquant_compiler.wiring import Order
from tests.kernel_cases import EVEN_K, UNEVEN_K, Case, integer_case, random_case, spec_id
from tests.network_cases import integer_network

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WHERE = "cuda"
FOUR, FINE, THREE, ONE = (SliceSpec((2,) * e, g) for e, g in ((4, 128), (4, 64), (3, 128), (1, 64)))
ALL = (FOUR, FINE, THREE, ONE)
TILES = (BatchTile(32, 1), BatchTile(32, 2), BatchTile(16, 1), BatchTile(16, 2))
each_tile = pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"m{tile.tokens}c{tile.consumers}")
TOKENS = (1, 7, 17, 32, 33, 64, 100)


@pytest.fixture(autouse=True)
def hopper() -> None:
    """Skip where there is no such kernel."""
    if torch.cuda.get_device_capability() != (9, 0) or kernels.gluon_refusal() is not None:
        pytest.skip(f"no batch_wgmma here: {kernels.gluon_refusal() or 'not sm_90'}")


def weight_of(case: Case) -> Weight:
    """Return the weight of a case."""
    return Weight(case.slices, case.scale, case.zero, case.bias)


def by_rows(cases: Sequence[Case], tile: BatchTile, activation: Activation = Activation.A16) -> list[Tensor]:
    """Multiply by batch_wgmma, whatever the number of programs."""
    spec, x, counts = cases[0].spec, cases[0].x, cases[0].counts
    k, target = x.shape[-1], target_of(x.device)
    weights = [weight_of(case) for case in cases]
    quantize = prepare_kernel(spec, k, target, activation, route=False, quantize=True, token_rows=True)
    unit = min(fused.row_unit(weight.rows) for weight in weights)
    facts = {"parts": len(cases), "has_bias": weights[0].bias is not None, "row_unit": unit}
    kernel = kernels.batch_kernel(spec, k, target, activation, tile=tile, **facts)
    return launch.multiply(kernel, launch.prepare(quantize, x, counts=counts), weights)


def by_lanes(case: Case, activation: Activation = Activation.A16) -> Tensor:
    """Multiply by sliced_mma."""
    assert wiring.order_of(case.x, [weight_of(case)], case.spec) is Order.LANES, "programs are few"
    facts = (case.spec, activation)
    return wiring.by_integers(case.x, case.counts, [weight_of(case)], *facts)[0]


@each_tile
@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("spec", ALL, ids=spec_id)
def test_bits_are_those_of_lanes(spec: SliceSpec, activation: Activation, tile: BatchTile) -> None:
    for k, n in ((EVEN_K, 150), (UNEVEN_K, 152)):
        for tokens in TOKENS:
            case = random_case(spec, tokens, n, k, dtype=torch.bfloat16, device=WHERE)
            for least in range(1, spec.num_slices + 1):  # of any count, then of fewer and fewer
                case.counts.clamp_(min=least)
                (found,) = by_rows([case], tile, activation)
                assert torch.equal(found, by_lanes(case, activation)), f"{tokens} tokens of {least} slices, {k} columns"
            for count in range(1, spec.num_slices):
                case.counts.fill_(count)
                (found,) = by_rows([case], tile, activation)
                assert torch.equal(found, by_lanes(case, activation)), f"{tokens} tokens, all of {count} slices"


@each_tile
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums_of_integers_are_exact(dtype: torch.dtype, tile: BatchTile) -> None:
    for k in (64, 128, 200, 640, EVEN_K):
        case = integer_case(FINE, 40, 70, k, bias=True, dtype=dtype, device=WHERE)
        found = by_rows([case], tile)[0]
        assert torch.equal(found, case.expected(torch.float32).to(dtype)), f"{k} columns"


@each_tile
@pytest.mark.parametrize("rows", [(64, 8), (130, 16, 200), (64, 3, 200, 65)], ids=str)
def test_siblings_in_one_launch(rows: tuple[int, ...], tile: BatchTile) -> None:
    cases = [integer_case(FOUR, 33, n, EVEN_K, bias=True, seed=n, device=WHERE) for n in rows]
    cases = [replace(case, x=cases[0].x, counts=cases[0].counts) for case in cases]
    for case, y in zip(cases, by_rows(cases, tile), strict=True):
        assert torch.equal(y, case.expected(torch.float32))


def last_rows(case: Case, count: int) -> Case:
    """Return a case of the last output rows of a weight."""
    n = case.scale.shape[0]
    slices = case.slices.view(case.spec.num_slices, n, -1)[:, n - count :].reshape(-1, count, case.slices.shape[-1])
    own = {name: getattr(case, name)[n - count :] for name in ("scale", "zero", "bias")}
    return replace(case, slices=slices.contiguous(), **own)


@pytest.mark.parametrize("tokens", [9, 17, 64, 100])
def test_ops_take_it_where_programs_are_many(tokens: int) -> None:
    n = 220 * ROWS
    case = random_case(FOUR, tokens, n, 256, dtype=torch.bfloat16, device=WHERE)
    assert wiring.order_of(case.x, [weight_of(case)], case.spec) is (Order.ROWS if tokens <= 32 else Order.SORTED)
    whole = wiring.by_integers(case.x, case.counts, [weight_of(case)], case.spec, Activation.A16)[0]
    assert torch.equal(whole[:, -150:], by_lanes(last_rows(case, 150)))
    one = wiring.by_integers(case.x[3:4], case.counts[3:4], [weight_of(case)], case.spec, Activation.A16)[0]
    assert torch.equal(whole[3], one[0]), "a token alone has the same bits"


@pytest.mark.parametrize("hidden", [0, 12])
@pytest.mark.parametrize(("n", "k"), [(220 * ROWS, 4096), (64 * ROWS, 4096), (220 * ROWS, 14336)])
def test_what_was_routed_has_the_bits_of_lanes(n: int, k: int, hidden: int) -> None:
    """In the order that tokens have, of one tile and of several, and sorted; eagerly and in a graph."""
    torch.use_deterministic_algorithms(False)  # filling would be captured too
    case = random_case(FOUR, 64, n, k, dtype=torch.bfloat16, device=WHERE)
    router = integer_network(k, 4, max(hidden, 1), device=WHERE)
    router, kind = (router, "mlp") if hidden else (router[:2], "energy")
    mask, few, orders = torch.zeros(1, dtype=torch.int32, device=WHERE), last_rows(case, 150), set()
    for tokens in (9, 16, 17, 32, 33, 64):
        x = case.x[:tokens]
        scores = (reference.mlp_scores if hidden else reference.energy_scores)(x, router)
        limits = torch.quantile(scores, torch.tensor([0.3, 0.5, 0.8], device=WHERE), dim=0).diagonal()
        orders.add(wiring.order_of(x, [weight_of(case)], FOUR))
        hist = torch.zeros(4, dtype=torch.int64, device=WHERE)
        counts = wiring.route(x, router, limits, hist, mask, kind)
        assert tokens == 9 or int((hist > 0).sum()) > 1, "counts differ"
        routing = (x, router, limits, hist, mask, kind)
        weight = [[part] for part in case.arguments[2:]]
        facts = (FOUR, Activation.A16, Prefill.ROUTED)
        once = hist.clone()
        (eager,) = wiring.elastic_linears(*routing, *weight, *facts)
        wanted = by_lanes(replace(few, x=x, counts=counts))
        assert torch.equal(eager[:, -150:], wanted), f"{tokens} tokens"
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (captured,) = wiring.elastic_linears(*routing, *weight, *facts)
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured[:, -150:], wanted), f"{tokens} tokens, captured"
        assert torch.equal(hist, 3 * once), "counted once a call"
    assert orders == {Order.ROWS, Order.LANES if n == 64 * ROWS else Order.SORTED}


@pytest.mark.parametrize("tokens", [17, 64])
def test_calls_in_graphs_that_torch_makes(tokens: int) -> None:
    """Before it captures, torch calls with memory of its graphs' pool, and fails where anybody keeps some."""
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 4096), nn.SiLU(), nn.Linear(4096, 4096)).to(WHERE, torch.bfloat16)
    mq.quantize_(model.eval().requires_grad_(False), budget=5)
    x = torch.randn(tokens, 256, dtype=torch.bfloat16, device=WHERE)
    wanted = model(x)
    compiled = torch.compile(model, backend="mobiquant", mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(x), wanted, rtol=2e-2, atol=2e-2)


def test_a_token_that_is_not_finite_spoils_no_other() -> None:
    case = random_case(FOUR, 40, 150, EVEN_K, dtype=torch.bfloat16, device=WHERE)
    clean = by_rows([case], TILES[1])[0]
    case.x[5, 3], case.x[39, 7] = float("nan"), float("inf")
    found = by_rows([case], TILES[1])[0]
    others = [token for token in range(40) if token not in (5, 39)]
    assert torch.equal(found[others], clean[others])
    assert not found[[5, 39]].isfinite().any()


def test_many_launches_in_a_graph_follow_counts() -> None:
    case = random_case(FOUR, 64, 600, 512, dtype=torch.bfloat16, device=WHERE)
    by_rows([case], TILES[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [by_rows([case], tile)[0] for tile in TILES * 5]
    for count in (1, 3, 4, 2):
        case.counts.fill_(count)
        case.counts[40] = 1
        graph.replay()
        wanted = by_lanes(case)
        for y in found:
            assert torch.equal(y, wanted)


@each_tile
def test_long_rows_many_times(tile: BatchTile) -> None:
    """Weights that come slowly: a stage that is read before it is there, or after, shows in some run."""
    n, k = 8192, 28672
    case = random_case(FOUR, 64, 256, k, dtype=torch.bfloat16, device=WHERE)
    repeat = n // 256
    slices = case.slices.view(4, 256, -1).repeat(1, repeat, 1).view(8, n, -1)
    scale, zero = case.scale.repeat(repeat, 1), case.zero.repeat(repeat, 1)
    whole = replace(case, slices=slices, scale=scale, zero=zero, bias=None)
    for count in (0, 2, 3, 4):
        if count:
            case.counts.fill_(count)
        wanted = by_lanes(replace(case, bias=None)).repeat(1, repeat)
        for run in range(20):
            wrong = (by_rows([whole], tile)[0] != wanted).nonzero()
            tokens, rows = (sorted({int(i) for i in column}) for column in wrong.t())
            assert not len(wrong), f"{count or 'mixed'} slices, run {run}: {len(wrong)} of rows {rows} tokens {tokens}"
