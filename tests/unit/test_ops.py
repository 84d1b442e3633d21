"""Ops: CPU path against reference against float64, schemas and fakes, routing properties, telemetry."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from mobiquant_compiler import cpu, reference, wiring
from mobiquant_compiler.errors import BadInput, BadOption
from mobiquant_compiler.ops import ELASTIC_LINEARS, OPS, SCHEMAS
from mobiquant_compiler.packing import pack
from mobiquant_compiler.slices import reconstruct, slice_weight
from mobiquant_compiler.spec import MAX_SIBLINGS, PREFILL_TOKENS, Activation, Layout, Prefill, SliceSpec
from tests.tolerances import EXACT_MATH, RESULTS, assert_near

SPECS = [
    SliceSpec((2, 2, 2, 2), 32),
    SliceSpec((2, 2, 2, 2), 64, Layout.BIT_MAJOR),
    SliceSpec((4, 2, 2), 32),
    SliceSpec((3, 2, 1), 32, Layout.BIT_MAJOR),
    SliceSpec((1, 1), 128),
    SliceSpec((4,), 32),
]
IDS = [f"{spec.layout}-{''.join(map(str, spec.widths))}-{spec.group}" for spec in SPECS]
TOKENS = [0, 1, 2, 7, 64, 1000]


class Case:
    """One sliced weight, a router with thresholds that give mixed counts, and the arguments of every op."""

    def __init__(self, spec: SliceSpec, tokens: int, n: int = 24, k: int = 100, dtype=torch.float32, bias: bool = True):
        self.spec, self.tokens = spec, tokens
        sliced = slice_weight(torch.randn(n, k), spec, scale_dtype=torch.float32)
        self.codes, self.scale, self.zero = sliced.codes, sliced.scale, sliced.zero
        self.slices = pack(sliced.codes, spec)
        self.bias = torch.randn(n).to(dtype) if bias else None
        self.x = (torch.randn(tokens, k) * torch.exp(2 * torch.randn(tokens, 1))).to(dtype)
        further = spec.num_slices - 1
        self.router = [torch.rand(k) / k, 4.0 ** -torch.arange(further, dtype=torch.float32)]
        self.thresholds = torch.full((further,), 0.2)
        self.hist = torch.zeros(spec.num_slices, dtype=torch.int64)
        self.mask = torch.zeros(9, dtype=torch.int32)

    @property
    def route_args(self) -> tuple:
        return (self.x, self.router, self.thresholds, self.hist, self.mask, "energy", "routed")

    @property
    def weight_args(self) -> tuple:
        return (self.slices, self.scale, self.zero, self.bias, *self.spec_args)

    @property
    def spec_args(self) -> tuple:
        return (list(self.spec.widths), self.spec.group, str(self.spec.layout), "a16", "routed")

    def weights_args(self, number: int) -> tuple:
        """Return arguments of the plural ops: this weight and others of the same spec, every second without bias."""
        others = [Case(self.spec, 1, 8 * i, bias=i % 2 == 0) for i in range(1, number)]
        cases = [self, *others]
        return (*([getattr(c, name) for c in cases] for name in ("slices", "scale", "zero", "bias")), *self.spec_args)

    def counts(self) -> torch.Tensor:
        return torch.randint(1, self.spec.num_slices + 1, (self.tokens,), dtype=torch.int32)

    def exact(self, counts: torch.Tensor) -> torch.Tensor:
        """Return the result in float64, token by token, from codes that were never packed."""
        y = torch.zeros(self.tokens, self.scale.shape[0], dtype=torch.float64)
        for token, count in enumerate(counts.tolist()):
            rest = self.spec.total_bits - self.spec.bits(count)
            weight = reconstruct(self.codes >> rest, self.scale, self.zero, self.spec, count, torch.float64)
            y[token] = weight[:, : self.x.shape[1]] @ self.x[token].double()
        return y if self.bias is None else y + self.bias.double()


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_cpu_and_reference_equal_an_independent_float64_result(spec, tokens):
    case = Case(spec, tokens)
    counts = case.counts()
    wanted = case.exact(counts)
    assert_near(OPS.routed_linear(case.x, counts, *case.weight_args), wanted, EXACT_MATH)
    slow = reference.routed_linear(case.x, counts, *case.weight_args[:4], spec)
    assert_near(slow, wanted, EXACT_MATH)
    assert slow.dtype == case.x.dtype


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_tokens_that_all_use_one_count_take_the_short_way_to_the_same_result(spec):
    case = Case(spec, 5)
    for count in range(1, spec.num_slices + 1):
        counts = torch.full((5,), count, dtype=torch.int32)
        assert_near(OPS.routed_linear(case.x, counts, *case.weight_args), case.exact(counts), EXACT_MATH)


@pytest.mark.parametrize(("n", "k"), [(1, 32), (3, 33), (130, 257), (17, 1000)])
@pytest.mark.parametrize("layout", list(Layout))
def test_odd_shapes_and_no_bias(n, k, layout):
    case = Case(SliceSpec((2, 2, 2, 2), 64, layout), 9, n, k, bias=False)
    counts = case.counts()
    assert_near(OPS.routed_linear(case.x, counts, *case.weight_args), case.exact(counts), EXACT_MATH)


@pytest.mark.parametrize("dtype", list(RESULTS))
def test_result_has_the_dtype_of_x_and_one_rounding(dtype):
    case = Case(SPECS[0], 6, dtype=dtype)
    counts = case.counts()
    y = OPS.routed_linear(case.x, counts, *case.weight_args)
    assert y.dtype == dtype
    assert_near(y, case.exact(counts), RESULTS[dtype])


def test_cpu_path_cuts_large_weights_without_a_seam(monkeypatch):
    case = Case(SPECS[0], 3, n=70, k=128)
    counts = case.counts()
    whole = OPS.routed_linear(case.x, counts, *case.weight_args)
    monkeypatch.setattr(cpu, "_CHUNK", 1024)  # 16 rows at a time
    assert_near(OPS.routed_linear(case.x, counts, *case.weight_args), whole, EXACT_MATH)


@pytest.mark.parametrize("tokens", TOKENS)
def test_routes_agree_between_cpu_and_reference(tokens):
    case, other = Case(SPECS[0], tokens), torch.zeros(4, dtype=torch.int64)
    counts = OPS.route(*case.route_args)
    wanted = reference.route(case.x, case.router, case.thresholds, other, case.mask, "energy")
    assert counts.dtype == torch.int32
    assert counts.shape == (tokens,)
    assert torch.equal(counts, wanted)
    assert torch.equal(case.hist, other)
    assert int(case.hist.sum()) == tokens
    if tokens == 1000:
        assert (case.hist > 0).all(), "the case must mix counts"


def test_whole_op_is_route_and_routed_linear():
    case = Case(SPECS[0], 40)
    y = OPS.elastic_linear(*case.route_args[:-1], *case.weight_args)
    counts = OPS.route(*case.route_args)
    assert torch.equal(y, OPS.routed_linear(case.x, counts, *case.weight_args))
    assert case.hist.sum() == 80, "both calls count"


@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (2, 0), (2, 2, 2)])
def test_leading_dimensions_are_kept(shape):
    case = Case(SPECS[0], 8)
    x = torch.randn(*shape, 100)
    y = OPS.elastic_linear(x, *case.route_args[1:-1], *case.weight_args)
    assert y.shape == (*shape, 24)
    flat = OPS.elastic_linear(x.reshape(-1, 100), *case.route_args[1:-1], *case.weight_args)
    assert_near(y.reshape(-1, 24), flat, EXACT_MATH)
    assert OPS.route(x, *case.route_args[1:]).shape == shape


def opcheck_cases():
    """Yield every op at three sizes, and the ops that know layouts at every spec."""
    for name in sorted(SCHEMAS.keys() - {"elastic_linears"}):  # by hand only: no graph can have it
        yield from (pytest.param(name, SPECS[0], tokens, id=f"{name}-{tokens}") for tokens in (0, 1, 5))
    for name in ("elastic_linear", "slice_gemm", "routed_linears", "elastic_linears.n3"):
        yield from (pytest.param(name, SPECS[i], 5, id=f"{name}-{IDS[i]}") for i in (1, 2, 3))


@pytest.mark.parametrize(("name", "spec", "tokens"), list(opcheck_cases()))
def test_opcheck(name, spec, tokens):
    case = Case(spec, tokens)
    counts = case.counts()
    rows, offsets, grouped = OPS.gather(case.x, counts, spec.num_slices)
    arguments = {
        "route": case.route_args,
        "gather": (case.x, counts, spec.num_slices),
        "slice_gemm": (grouped, offsets, *case.weight_args),
        "scatter": (torch.randn(tokens, 24), rows, counts),
        "routed_linear": (case.x, counts, *case.weight_args),
        "elastic_linear": (*case.route_args[:-1], *case.weight_args),
        "routed_linears": (case.x, counts, *case.weights_args(3)),
        **{f"elastic_linears.n{n}": (*case.route_args[:-1], *case.weights_args(n)) for n in ELASTIC_LINEARS},
    }
    op, _, overload = name.partition(".")
    opcheck(getattr(getattr(OPS, op), overload or "default"), arguments[name])


@pytest.mark.parametrize("number", [1, 2, 3, MAX_SIBLINGS + 1])
def test_linears_of_one_input_in_one_call_by_hand(number):
    case = Case(SPECS[0], 5)
    slices, scale, zero, bias, *spec = case.weights_args(number)
    ys = OPS.elastic_linears(*case.route_args[:-1], slices, scale, zero, bias, *spec)
    counts = OPS.route(*case.route_args)
    for y, *weight in zip(ys, slices, scale, zero, bias, strict=True):
        assert torch.equal(y, OPS.routed_linear(case.x, counts, *weight, *spec))


def test_nan_in_one_token_stays_in_that_token():
    case = Case(SPECS[0], 6)
    clean = OPS.elastic_linear(*case.route_args[:-1], *case.weight_args)
    case.x[2, 5] = float("nan")
    y = OPS.elastic_linear(*case.route_args[:-1], *case.weight_args)
    others = [0, 1, 3, 4, 5]
    assert y[2].isnan().all()
    assert_near(y[others], clean[others], EXACT_MATH)
    assert OPS.route(*case.route_args)[2] == 1, "a NaN score asks for nothing"
    assert OPS.route(case.x[2:3], *case.route_args[1:]).tolist() == [1]


@given(tokens=st.integers(0, 40), slices=st.integers(1, 5), seed=st.integers(0, 1 << 30))
def test_scatter_undoes_gather(tokens, slices, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 7, generator=generator)
    counts = torch.randint(1, slices + 1, (tokens,), generator=generator, dtype=torch.int32)
    rows, offsets, grouped = OPS.gather(x, counts, slices)
    assert torch.equal(OPS.scatter(grouped, rows, counts), x)
    assert offsets[0] == 0
    assert offsets[-1] == tokens
    for count in range(1, slices + 1):
        start, stop = offsets[count - 1 : count + 1].tolist()
        members = rows[start:stop].long()
        assert (counts[members] == count).all()
        assert members.tolist() == sorted(members.tolist()), "stable: tokens keep their order"


@settings(max_examples=30)
@given(seed=st.integers(0, 1 << 30), low=st.floats(-6, 2), step=st.floats(0, 3))
def test_a_lower_threshold_never_gives_a_token_fewer_slices(seed, low, step):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 40, generator=generator)
    router = [torch.rand(40, generator=generator), torch.tensor([1.0, 0.25, 0.06])]
    hist, mask = torch.zeros(4, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    counts = [
        OPS.route(x, router, torch.full((3,), 10.0**exponent), hist, mask, "energy", "routed")
        for exponent in (low + step, low)
    ]
    assert (counts[0] <= counts[1]).all()


@pytest.mark.parametrize(("value", "count"), [(-torch.inf, 4), (torch.inf, 1)])
def test_infinite_thresholds_force_and_forbid(value, count):
    case = Case(SPECS[0], 12)
    case.x[0] = 0
    case.thresholds.fill_(value)
    assert (OPS.route(*case.route_args) == count).all()


def test_a_slice_needs_the_slice_before_it():
    case = Case(SPECS[0], 12)
    case.thresholds = torch.tensor([-torch.inf, torch.inf, -torch.inf])
    assert (OPS.route(*case.route_args) == 2).all()


@pytest.mark.parametrize("tokens", [1, 4])
def test_padding_is_left_out_of_the_histogram_and_only_there(tokens):
    case = Case(SPECS[0], tokens)
    plain = OPS.route(*case.route_args)
    case.hist.zero_()
    case.mask[0] = tokens
    case.mask[1 : 1 + tokens] = torch.tensor([0, 1, 1, 0][:tokens])
    assert torch.equal(OPS.route(*case.route_args), plain)
    assert int(case.hist.sum()) == {1: 0, 4: 2}[tokens]
    OPS.route(torch.randn(3, 100), *case.route_args[1:])  # another number of tokens is counted whole
    assert int(case.hist.sum()) == {1: 0, 4: 2}[tokens] + 3


@pytest.mark.parametrize("tokens", [0, 1, 2, 40])
@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_several_linears_at_once_are_each_of_them(spec, tokens):
    case = Case(spec, tokens)
    weights, number = case.weights_args(3), 3
    for counts in (case.counts(), torch.full((tokens,), spec.num_slices, dtype=torch.int32)):
        several = OPS.routed_linears(case.x, counts, *weights)
        slow = reference.routed_linears(case.x, counts, *weights[:4], spec)
        assert [y.shape for y in several] == [(tokens, n) for n in (24, 8, 16)]
        for i in range(number):
            own = [column[i] for column in weights[:4]]
            assert torch.equal(several[i], OPS.routed_linear(case.x, counts, *own, *case.spec_args))
            assert_near(several[i], slow[i], EXACT_MATH)


@pytest.mark.parametrize("number", ELASTIC_LINEARS)
def test_several_whole_linears_are_one_decision_and_their_products(number):
    case = Case(SPECS[0], 40)
    weights = case.weights_args(number)
    whole = ELASTIC_LINEARS[number](*case.route_args[:-1], *weights)
    assert case.hist.sum() == 40, "one decision, counted once"
    parts = OPS.routed_linears(case.x, OPS.route(*case.route_args), *weights)
    assert len(whole) == number
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    lead = [y.shape for y in ELASTIC_LINEARS[number](case.x.view(5, 8, -1), *case.route_args[1:-1], *weights)]
    assert lead == [(5, 8, y.shape[1]) for y in parts]


@pytest.mark.parametrize(
    ("place", "name", "wanted"), [(-1, "prefill", "'routed', 'full', 'exact'"), (-2, "activation", "'a16', 'a8'")]
)
def test_unknown_ways_to_compute_are_refused_by_name(place, name, wanted):
    case = Case(SPECS[0], 2)
    weight = list(case.weight_args)
    weight[place] = "a4"
    message = rf"mobiquant: option '{name}' got 'a4'; wanted one of \[{wanted}\]"
    with pytest.raises(BadOption, match=message):
        OPS.elastic_linear(*case.route_args[:-1], *weight)
    with pytest.raises(BadOption, match=message):
        OPS.routed_linear(case.x, case.counts(), *weight)
    if name == "prefill":
        with pytest.raises(BadOption, match=message):
            OPS.route(*case.route_args[:-1], "a4")


@pytest.mark.parametrize(
    "x", [torch.ones(3, 95), torch.ones(()), torch.ones(3, 100, dtype=torch.int32)], ids=["columns", "0-d", "int32"]
)
def test_whole_ops_refuse_wrong_inputs_on_any_device(x):
    case = Case(SPECS[0], 2)
    got = f"mobiquant: the input has dtype {x.dtype} and shape {tuple(x.shape)}; wanted floating point and shape"
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
    single, plural = (OPS.elastic_linear, wiring._elastic_linear), (OPS.elastic_linears, wiring._elastic_linears)
    for ops, weights in ((single, case.weight_args), (plural, case.weights_args(2))):
        for op, value in itertools.product(ops, (x, fake)):
            with pytest.raises(BadInput, match=re.escape(f"{got} [..., 100].")):
                op(value, *case.route_args[1:-1], *weights)
    assert not case.hist.any(), "nothing was counted"


@pytest.mark.parametrize("run", [OPS.route, lambda *args: reference.route(*args[:-1], Prefill(args[-1]))])
def test_full_prefill_gives_every_token_all_slices_below_the_ceiling(run):
    few, many = Case(SPECS[0], PREFILL_TOKENS), Case(SPECS[0], PREFILL_TOKENS + 1)
    for case in (few, many):
        case.thresholds = torch.tensor([0.2, torch.finfo(torch.float32).max, torch.inf])
        case.x[3, 7] = float("nan")
    assert torch.equal(run(*few.route_args[:-1], "full"), run(*few.route_args)), "few tokens are routed"
    many.mask = torch.zeros(100, dtype=torch.int32)
    many.mask[0], many.mask[1:61] = PREFILL_TOKENS + 1, 1
    counts = run(many.x.view(5, 13, -1), *many.route_args[1:-1], "full")
    assert counts.shape == (5, 13)
    assert counts.dtype == torch.int32
    assert (counts == 3).all(), "the last slice is above the ceiling"
    assert many.hist.tolist() == [0, 0, 60, 0], "what was really used, padding left out"
    for prefill in ("routed", "exact"):
        assert set(run(*many.route_args[:-1], prefill).tolist()) == {1, 2}


def test_full_prefill_of_one_slice():
    case = Case(SPECS[5], 100)
    assert (OPS.route(*case.route_args[:-1], "full") == 1).all()


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("prefill", ["routed", "exact"])
def test_ways_to_compute_change_nothing_where_no_integers_are_used(activation, prefill):
    case = Case(SPECS[0], 100)
    wanted = OPS.elastic_linear(*case.route_args[:-1], *case.weight_args)
    y = OPS.elastic_linear(*case.route_args[:-1], *case.weight_args[:-2], str(activation), prefill)
    assert torch.equal(y, wanted)
