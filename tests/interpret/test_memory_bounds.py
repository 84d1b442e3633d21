"""Every address that a kernel touches is inside a tensor it was given: the interpreter alone would not notice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mobiquant_compiler import wiring
from mobiquant_compiler.codegen import cache
from mobiquant_compiler.codegen.configs import Target, TokenClass, kernel_spec
from mobiquant_compiler.runtime import fused, prefill
from mobiquant_compiler.runtime.launch import Weight
from mobiquant_compiler.spec import Activation, Family, SliceSpec
from tests.kernel_cases import SPECS, Case, integer_case, spec_id


def span_of(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of a tensor's first byte and of the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class Watch:
    """Stands between the interpreter and memory, and knows the tensors of the launch that runs."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.starts, self.stops = [], []
        self.checked = 0

    def allow(self, arguments: Any) -> None:
        """Let a launch touch the tensors among its arguments, and nothing else."""
        tensors = [a for a in arguments if isinstance(a, Tensor) and a.numel()]
        spans = sorted(span_of(t) for t in tensors if t.is_contiguous())
        for start, stop in (span_of(t) for t in tensors if not t.is_contiguous()):
            assert any(a <= start and stop <= b for a, b in spans), "a view of what is no argument itself"
        self.starts, self.stops = [s for s, _ in spans], [s for _, s in spans]

    def check(self, pointers: Any, mask: Any, size: int) -> None:
        """Fail where an address that is not masked is outside of all tensors."""
        import numpy

        used = pointers[mask.astype(bool)].astype(numpy.int64)
        self.checked += used.size
        inside = numpy.zeros(used.shape, bool)
        for start, stop in zip(self.starts, self.stops, strict=True):
            inside |= (used >= start) & (used + size <= stop)
        assert inside.all(), f"{(~inside).sum()} of {used.size} addresses are outside of every tensor"

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self.check(pointers, mask, dtype.itemsize if hasattr(dtype, "itemsize") else dtype().itemsize)
        return self.memory.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, values: Any, mask: Any) -> Any:
        self.check(pointers, mask, values.itemsize)
        return self.memory.store(pointers, values, mask)

    def atomic_rmw(self, operation: Any, pointers: Any, values: Any, mask: Any, order: Any) -> Any:
        self.check(pointers, mask, values.itemsize)
        return self.memory.atomic_rmw(operation, pointers, values, mask, order)


@pytest.fixture(autouse=True)
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Check every access of a test."""
    from triton.runtime import interpreter

    found = Watch(interpreter._interpreter)
    prepare = interpreter.GridExecutor._init_args_hst

    def watched(self: Any, positional: Any, keywords: Any) -> Any:
        given = prepare(self, positional, keywords)
        found.allow([*given[0], *given[1].values()])
        return given

    monkeypatch.setattr(interpreter, "_interpreter", found)
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", watched)
    yield found
    assert found.checked, "nothing was watched"


def needed(case: Case, most: int) -> Case:
    """Return the case with counts up to `most`, and without the slices after it."""
    return replace(case, counts=case.counts.clamp(max=most), slices=case.slices[: case.spec.bits(most)].clone())


def run(case: Case, activation: Activation = Activation.A16) -> Tensor:
    """Run the routed linear of a case."""
    return wiring.routed_linear(*case.arguments, case.spec, activation)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_linears_read_their_rows_and_the_slices_in_use(spec: SliceSpec, tokens: int) -> None:
    few = max(1, spec.num_slices - 1)
    for n, k, most in ((5, 3 * spec.group - 7, spec.num_slices), (17, spec.group, few), (24, spec.group, few)):
        case = integer_case(spec, tokens, n, k, bias=True)
        wanted = replace(case, counts=case.counts.clamp(max=most)).expected(torch.float32)
        assert torch.equal(run(needed(case, most)), wanted)


@pytest.mark.parametrize("groups", [16, 17])
@pytest.mark.parametrize("tokens", [1, 2])
def test_chains_that_come_out_even_and_chains_that_do_not(tokens: int, groups: int) -> None:
    for spec in (SPECS[2], SPECS[3], SPECS[5]):
        case = integer_case(spec, tokens, 3, groups * spec.group)
        assert torch.equal(run(case), case.expected(torch.float32))


@pytest.mark.parametrize("rows", [(3, 20, 16, 1), (16, 24, 40, 19), (8, 17)], ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_siblings_read_each_their_own(tokens: int, rows: tuple[int, ...]) -> None:
    cases = [needed(integer_case(SPECS[2], tokens, n, 70, bias=True, seed=n), 2) for n in rows]
    cases = [replace(case, x=cases[0].x, counts=cases[0].counts) for case in cases]
    columns = zip(*((c.slices, c.scale, c.zero, c.bias) for c in cases), strict=True)
    weights = [list(column) for column in columns]
    ys = wiring.routed_linears(cases[0].x, cases[0].counts, *weights, SPECS[2], Activation.A8)
    assert [y.shape for y in ys] == [(tokens, n) for n in rows]


@pytest.mark.parametrize("capacity", [1, 4, 5, 9])
@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("activation", list(Activation))
def test_routing_and_quantizing(activation: Activation, slices: int, capacity: int) -> None:
    x, spec = torch.randn(4, 41), SliceSpec((2,) * slices, 32)
    router, thresholds = (torch.ones(41), torch.ones(slices - 1)), torch.zeros(slices - 1)
    hist, mask = torch.zeros(slices, dtype=torch.int64), torch.zeros(capacity, dtype=torch.int32)
    mask[0] = 4
    wiring.prepare(x, router, thresholds, hist, mask, spec, activation)
    wiring.route(x, router, thresholds, hist, mask, "energy")


@pytest.mark.parametrize("k", [41, 300])
@pytest.mark.parametrize("tokens", [1, 3, 9, 64, 66])
@pytest.mark.parametrize("activation", list(Activation))
def test_rows(activation: Activation, tokens: int, k: int) -> None:
    x, spec = torch.randn(tokens, k), SliceSpec((2,) * 3, 64)
    counts = torch.arange(tokens, dtype=torch.int32) % 3 + 1
    given = wiring.quantize(x, counts, spec, activation, token_rows=True)
    assert given.placed is not None
    assert given.placed[1].sort().values.tolist() == list(range(tokens))
    router, thresholds = (torch.ones(k), torch.ones(2)), torch.full((2,), float(k))
    hist, mask = torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    chosen = wiring.prepare(x, router, thresholds, hist, mask, spec, activation, token_rows=True)
    assert chosen.placed is not None
    assert chosen.placed[1].tolist() == list(range(tokens))


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_workspaces(spec: SliceSpec) -> None:
    case = integer_case(spec, 1, 21, 2 * spec.group - 3)
    for most, (start, stop) in ((spec.num_slices, (0, 21)), (1, (3, 8)), (1, (20, 21))):
        part = needed(case, most)
        weight = Weight(part.slices, part.scale, part.zero, None)
        for sorted_rows in (True, False):
            chosen = kernel_spec(
                Family.DEQUANTIZE, spec, case.x.shape[1], TokenClass.MANY, Target.of(80), sorted_rows=sorted_rows
            )
            shape = (stop - start, chosen.k)
            offsets = torch.tensor([0] * most + [1] * (spec.num_slices + 1 - most), dtype=torch.int32)
            used = offsets if sorted_rows else torch.tensor([most], dtype=torch.int32)
            workspace = torch.empty((spec.num_slices, *shape) if sorted_rows else shape)
            prefill.dequantize(cache.load(chosen), weight, used, workspace, start)


@pytest.mark.parametrize(("tokens", "k"), [(1, 32), (3, 100), (65, 128), (7, 1100)])
def test_gathered_tokens(tokens: int, k: int) -> None:
    spec = SliceSpec((2, 2, 2), 32)
    kernel = cache.load(kernel_spec(Family.GATHER_TOKENS, spec, k, TokenClass.MANY, Target.of(80)))
    fused.gather(kernel, torch.randn(tokens, k), torch.arange(tokens, dtype=torch.int32) % 5)


def test_an_address_outside_is_noticed(watch: Watch) -> None:
    case = integer_case(SPECS[2], 1, 3, 64)
    case.counts.fill_(2)
    with pytest.raises(Exception, match="addresses are outside of every tensor"):
        run(replace(case, slices=case.slices[:2].clone()))
    assert watch.checked
