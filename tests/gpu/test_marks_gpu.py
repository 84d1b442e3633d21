"""Tokens as rows, routed and placed in one launch: programs that wait for others, on any stream and in graphs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mobiquant_compiler as mq
from mobiquant_compiler import wiring
from mobiquant_compiler.runtime import marks
from mobiquant_compiler.runtime.launch import Prepared
from mobiquant_compiler.spec import Activation, SliceSpec
from tests.network_cases import integer_network

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WHERE = "cuda"
SPEC = SliceSpec()


class Routed:
    """Tokens of random integers, a router with a network or without, and thresholds that tell tokens apart."""

    def __init__(self, tokens: int, k: int, hidden: int, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.x = (torch.randint(-9, 10, (tokens, k), generator=g) * (1 + torch.arange(tokens) % 7)[:, None]).float()
        self.x = self.x.to(WHERE)
        router = integer_network(k, SPEC.num_slices, max(hidden, 1), seed=seed, device=WHERE)
        self.router, self.kind = (router, "mlp") if hidden else (router[:2], "energy")
        scores = (self.x.double() ** 2 @ router[0].double())[:, None] * router[1]
        self.thresholds = torch.quantile(scores, 0.6, dim=0).float()
        self.mask = torch.zeros(1, dtype=torch.int32, device=WHERE)

    def hist(self) -> Tensor:
        return torch.zeros(SPEC.num_slices, dtype=torch.int64, device=WHERE)

    def at_once(self, hist: Tensor) -> Prepared:
        """Route and quantize in one launch."""
        return wiring.prepare(self.x, self.router, self.thresholds, hist, self.mask, SPEC, token_rows=True)

    def one_by_one(self, hist: Tensor) -> Prepared:
        """Route, and quantize what has counts by then."""
        counts = wiring.route(self.x, self.router, self.thresholds, hist, self.mask, self.kind)
        return wiring.quantize(self.x, counts, SPEC, Activation.A16, token_rows=True)


def parts_of(prepared: Prepared) -> tuple[Tensor, ...]:
    """Return what a multiplication reads, rows that there are."""
    assert prepared.placed is not None
    assert prepared.sums is not None
    t = prepared.tokens
    return prepared.counts, prepared.placed, prepared.high[:, :, :t], prepared.affine[:, :t], prepared.sums[:, :t]


def assert_same(found: Prepared, wanted: Prepared) -> None:
    assert all(torch.equal(a, b) for a, b in zip(parts_of(found), parts_of(wanted), strict=True))


@pytest.mark.parametrize("hidden", [0, 12])
@pytest.mark.parametrize("k", [200, 4096, 14336])
@pytest.mark.parametrize("tokens", [1, 9, 33, 64])
def test_one_launch_places_tokens_as_two_do(tokens: int, k: int, hidden: int) -> None:
    case = Routed(tokens, k, hidden)
    hists = case.hist(), case.hist()
    assert_same(case.at_once(hists[0]), case.one_by_one(hists[1]))
    assert torch.equal(*hists)
    assert tokens < 9 or int((hists[0] > 0).sum()) > 1, "counts differ"


def captured(call: Callable[[], Prepared]) -> tuple[torch.cuda.CUDAGraph, Prepared]:
    """Return a graph of one call, and where it leaves its result."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    return graph, found


def test_replays_streams_and_calls_do_not_disturb_one_another() -> None:
    torch.use_deterministic_algorithms(False)  # filling would be captured too
    cases = [Routed(64, 4096, 0, seed=seed) for seed in range(4)]
    hist = cases[0].hist()
    wanted = [case.one_by_one(hist) for case in cases]
    cases[0].at_once(hist)  # compiles, and makes the first marks
    graphs = [captured(lambda case=case: case.at_once(hist)) for case in cases[:2]]  # type: ignore[misc]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    called: list[list[Prepared]] = [[], []]
    for _ in range(100):
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if number < 2:
                    graphs[number][0].replay()
                else:
                    called[number - 2].append(cases[number].at_once(hist))
    torch.cuda.synchronize()
    for number in (0, 1):
        assert_same(graphs[number][1], wanted[number])
        for found in called[number]:
            assert_same(found, wanted[2 + number])


def test_marks_are_left_as_they_were_found() -> None:
    case = Routed(40, 4096, 0)
    device = case.x.device
    mine = marks.marks_for(device)
    assert marks.marks_for(device) is mine, "a stream keeps its own"
    for _ in range(3):
        case.at_once(case.hist())
        assert not bool(mine.any())
    with torch.cuda.stream(torch.cuda.Stream()):
        assert marks.marks_for(device).data_ptr() != mine.data_ptr()


def test_each_captured_launch_has_marks_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(False)
    case, device = Routed(20, 4096, 0), torch.device("cuda", torch.cuda.current_device())
    wanted = case.at_once(case.hist())
    many = marks._LAUNCHES // 2 + 3
    found: list[int] = []
    for _ in range(2):
        marks.marks_for(device)  # a call between captures makes room for the next
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            found += [marks.marks_for(device).data_ptr() for _ in range(many)]
    assert len(set(found)) == 2 * many
    monkeypatch.setattr(marks, "_STORES", {})
    hist = case.hist()
    graph, prepared = captured(lambda: case.at_once(hist))  # zeroes memory of its own
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert_same(prepared, wanted)


@pytest.mark.parametrize("tokens", [17, 64])
def test_calls_before_a_capture_that_torch_makes(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In them torch allocates from the pool of its graphs, and fails where anybody keeps what it did not see."""
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 4096), nn.SiLU(), nn.Linear(4096, 4096)).to(WHERE, torch.bfloat16)
    mq.quantize_(model.eval().requires_grad_(False), budget=5)
    x = torch.randn(tokens, 256, dtype=torch.bfloat16, device=WHERE)
    wanted = model(x)
    monkeypatch.setattr(marks, "_STORES", {})
    compiled = torch.compile(model, backend="mobiquant", mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(x), wanted, rtol=2e-2, atol=2e-2)
