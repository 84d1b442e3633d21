"""fuse-siblings: hits, near-misses, a second run that changes nothing, and every graph run for its numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mobiquant_compiler.errors import BadOption
from mobiquant_compiler.linear import MobiLinear
from mobiquant_compiler.ops import OPS
from mobiquant_compiler.passes import DEFAULT_PIPELINE, load_pass
from mobiquant_compiler.spec import SliceSpec
from tests.graphs import Passed, run_passes
from tests.models_tiny import Block, seeded
from tests.unit.test_passes import Chain, calibrated_block

SPEC = SliceSpec((2, 2), 32)
NAMES = ("route", "routed_linear", "routed_linears", "elastic_linear", "elastic_linears")


def make(number: int, specs: dict[int, SliceSpec] | None = None, biased: tuple[int, ...] = (1,)) -> list[MobiLinear]:
    """Return linears of one router, of 8, 16, 24 and more rows, and thresholds that give tokens different counts."""
    made = []
    for i in range(number):
        bias = torch.randn(8 * i + 8) if i in biased else None
        made.append(MobiLinear.from_weight(torch.randn(8 * i + 8, 64), bias, (specs or {}).get(i, SPEC)))
    router = made[0].router
    for linear in made:
        linear.router = router
    router.thresholds.fill_(float(router.energy.mean() * 64 * router.gain[0]))
    return made


def run(function: Callable[..., Tensor], linears: list[MobiLinear], last: str = "fuse-siblings") -> Passed:
    """Run the pipeline on a function of input and linears, and check its numbers and what it counts."""
    model, x, hist = Chain(function, linears), torch.randn(30, 64), linears[0].router.hist
    done = run_passes(model, [x], [*DEFAULT_PIPELINE[:-1], last])
    with torch.no_grad():
        wanted = model(x.clone())
    assert done.again("fuse-siblings").rewritten == 0
    hist.zero_()
    assert torch.equal(done()[0], wanted)
    assert hist.min() > 0, "the case must mix counts"
    return done


def counted(done: Passed) -> dict[str, int]:
    """Return how often each op is called, those that are."""
    targets = [str(getattr(n.target, "_schema", n.target)).partition("(")[0] for n in done.gm.graph.nodes]
    names = [t.removeprefix("mobiquant::").partition(".")[0] for t in targets if t.startswith("mobiquant::")]
    return {name: names.count(name) for name in NAMES if name in names}


def joined(*parts: Tensor) -> Tensor:
    return torch.cat(parts, -1)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_siblings_become_one_whole_linear(number):
    linears = make(number)
    done = run(lambda x, *each: joined(*(linear(x) for linear in each)), linears)
    assert done.reports[-1].rewritten == number
    assert counted(done) == {"elastic_linears": 1}
    assert int(linears[0].router.hist.sum()) == 30, "one decision a token"


def test_attention_and_gated_mlp_take_four_launches():
    block, x = calibrated_block(), torch.randn(2, 9, 64) * 3
    done = run_passes(block, [x], DEFAULT_PIPELINE)
    assert done.reports[-1].rewritten == 5
    assert counted(done) == {"elastic_linear": 2, "elastic_linears": 2}
    with torch.no_grad():
        assert torch.equal(done()[0], block(x))
    assert done.again("fuse-siblings").rewritten == 0


def test_plain_models_decide_for_each_weight_and_keep_a_launch_for_each():
    done = run_passes(seeded(Block()), [torch.randn(2, 9, 64)], DEFAULT_PIPELINE)
    assert done.reports[-1].rewritten == 0
    assert counted(done) == {"elastic_linear": 7}


def test_results_keep_where_they_came_from():
    done = run(lambda x, a, b: joined(a(x), b(x)), make(2))
    fused = next(n for n in done.gm.graph.nodes if "elastic_linears" in str(n.target))
    items = list(fused.users)
    assert [item.args[1] for item in items] == [0, 1]
    assert [item.meta["mq_origin"][0] for item in items] == ["elastic_linear_default", "elastic_linear_default_1"]
    for node in (fused, *items):
        assert node.meta["mq_origin"][-1] == "fuse-siblings"
        assert node.meta["stack_trace"]


def test_a_decision_that_others_read_stays_one_of_its_own():
    specs = {2: SliceSpec((2, 2), 64)}
    done = run(lambda x, a, b, c: joined(a(x), b(x), c(x)), make(3, specs))
    assert done.reports[-1].rewritten == 2
    assert counted(done) == {"route": 1, "routed_linear": 1, "routed_linears": 1}


@pytest.mark.parametrize(
    ("number", "last", "wanted"),
    [
        (5, "fuse-siblings", {"route": 1, "routed_linear": 1, "routed_linears": 1}),
        (6, "fuse-siblings", {"route": 1, "routed_linears": 2}),
        (5, "fuse-siblings{max-linears=2}", {"route": 1, "routed_linear": 1, "routed_linears": 2}),
    ],
)
def test_more_linears_than_a_launch_takes(number, last, wanted):
    done = run(lambda x, *each: joined(*(linear(x) for linear in each)), make(number), last)
    assert counted(done) == wanted
    assert done.reports[-1].rewritten == number - wanted.get("routed_linear", 0)


@pytest.mark.parametrize("value", [1, 5, "many", 2.5, "true"])
def test_impossible_numbers_of_linears_are_refused(value):
    with pytest.raises(
        BadOption, match=r"pass fuse-siblings: option 'max_linears' got .* wanted a whole number from 2"
    ):
        load_pass(f"fuse-siblings{{max-linears={value}}}")


def mixed_prefill(linears: list[MobiLinear]) -> list[MobiLinear]:
    linears[1].prefill = "exact"
    return linears


def mixed_activation(linears: list[MobiLinear]) -> list[MobiLinear]:
    linears[1].activation = "a8"
    return linears


def written_between(x: Tensor, a: MobiLinear, b: MobiLinear) -> Tensor:
    x = x + 0
    first = a(x)
    x.mul_(torch.linspace(3, 0, x.shape[0]).unsqueeze(1))
    return joined(first, b(x))


def pair(x: Tensor, a: MobiLinear, b: MobiLinear) -> Tensor:
    return joined(a(x), b(x))


MISSES = {
    "one linear": (lambda x, a: a(x), lambda: make(1)),
    "other input": (lambda x, a, b: joined(a(x), b(x * 2)), lambda: make(2)),
    "other decision": (pair, lambda: [make(1)[0], make(1)[0]]),
    "input written to in between": (written_between, lambda: make(2)),
    "other widths": (pair, lambda: make(2, {1: SliceSpec((4, 2), 32)})),
    "other group": (pair, lambda: make(2, {1: SliceSpec((2, 2), 64)})),
    "other layout": (pair, lambda: make(2, {1: SliceSpec((2, 2), 32, "bit_major")})),
    "other activation": (pair, lambda: mixed_activation(make(2))),
    "other prefill": (pair, lambda: mixed_prefill(make(2))),
}


@pytest.mark.parametrize("name", MISSES)
def test_others_are_no_siblings(name):
    function, linears = MISSES[name]
    done = run(function, linears())
    assert done.reports[-1].rewritten == 0
    assert not {"routed_linears", "elastic_linears"} & set(counted(done))


class Late(nn.Module):
    """Three linears of one input; the second's bias is computed from the first's result."""

    def __init__(self, linears: list[MobiLinear]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def call(self, linear: MobiLinear, x: Tensor, counts: Tensor, bias: Tensor | None) -> Tensor:
        spec = (linear.widths, linear.group, linear.layout, "a16", "routed")
        return OPS.routed_linear.default(x, counts, linear.slices, linear.scale, linear.zero, bias, *spec)

    def forward(self, x: Tensor) -> Tensor:
        router = self.linears[0].router
        counts = OPS.route.default(
            x,
            [router.energy, router.gain],
            router.thresholds,
            router.hist,
            router.token_mask.tokens,
            "energy",
            "routed",
        )
        first = self.call(self.linears[0], x, counts, None)
        second = self.call(self.linears[1], x, counts, first.sum(0).repeat(2))
        return joined(first, second, self.call(self.linears[2], x, counts, self.linears[2].bias))


def test_a_linear_that_needs_another_ones_result_is_not_of_its_launch():
    model, x = Late(make(3, biased=(2,))), torch.randn(30, 64)
    done = run_passes(model, [x], ["fuse-siblings"])
    assert done.reports[-1].rewritten == 2, "the first and the third"
    assert counted(done) == {"route": 1, "routed_linear": 1, "routed_linears": 1}
    with torch.no_grad():
        assert torch.equal(done()[0], model(x))
    assert done.again("fuse-siblings").rewritten == 0


class Rerouted(Late):
    """A decision made before its input is written to, for linears that read it after."""

    def forward(self, x: Tensor) -> Tensor:
        x, router = x + 0, self.linears[0].router
        counts = OPS.route.default(
            x,
            [router.energy, router.gain],
            router.thresholds,
            router.hist,
            router.token_mask.tokens,
            "energy",
            "routed",
        )
        x.mul_(torch.linspace(3, 0, x.shape[0]).unsqueeze(1))
        return joined(*(self.call(linear, x, counts, None) for linear in self.linears))


def test_a_decision_about_what_the_input_was_before_is_not_made_again():
    model, x = Rerouted(make(2)), torch.randn(30, 64)
    done = run_passes(model, [x], ["fuse-siblings"])
    assert counted(done) == {"route": 1, "routed_linears": 1}
    with torch.no_grad():
        assert torch.equal(done()[0], model(x))
