"""The manager: order, wrapping, verification of deliberately broken passes; the registry; plugins."""

from __future__ import annotations

import dataclasses
import inspect
import operator
import pickle
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest
import torch
from torch import nn

from mobiquant_compiler import CompileConfig
from mobiquant_compiler.backend import pipeline
from mobiquant_compiler.errors import BadOption, DuplicatePass, PassFailed, PassOrder, UnknownPass, VerifyError
from mobiquant_compiler.ops import OPS
from mobiquant_compiler.passes import (
    DEFAULT_PIPELINE,
    PASSES,
    PassContext,
    PassManager,
    PassResult,
    load_pass,
    registry,
)
from mobiquant_compiler.passes.base import fingerprint
from mobiquant_compiler.passes.edit import mutates, own_graph, splice
from mobiquant_compiler.passes.registry import all_passes, pass_names, split_pipeline
from mobiquant_compiler.report import Skip, SkipReason
from tests.graphs import capture


@dataclass(frozen=True)
class Probe:
    """A pass made of a function, as a plugin would bring it."""

    name: ClassVar[str] = "probe"
    after: ClassVar[frozenset[str]] = frozenset()
    action: object = None
    size: int = 3

    def run(self, gm, ctx) -> PassResult:
        """Run the function."""
        return self.action(gm, ctx) or PassResult()


def run(action, model=None, config=None):
    gm, inputs = capture(model or nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.randn(3, 64))
    ctx = PassContext("graph-7", config or CompileConfig(), inputs)
    return PassManager([Probe(action)]).run(own_graph(gm, inputs), ctx)


def find(gm, text):
    return next(n for n in gm.graph.nodes if text in n.name)


def remove_input(gm, ctx):
    node = next(n for n in gm.graph.nodes if n.op == "placeholder")
    node.replace_all_uses_with([n for n in gm.graph.nodes if n.op == "placeholder"][-1])
    gm.graph.erase_node(node)


def swap_inputs(gm, ctx):
    first, second = [n for n in gm.graph.nodes if n.op == "placeholder"][:2]
    second.append(first)


def change_dtype(gm, ctx):
    output = next(n for n in gm.graph.nodes if n.op == "output")
    with splice(gm, output, "probe") as at:
        output.args = ((at(torch.Tensor.double, output.args[0][0]),),)


def change_shape(gm, ctx):
    output = next(n for n in gm.graph.nodes if n.op == "output")
    with splice(gm, output, "probe") as at:
        output.args = ((at(torch.sum, output.args[0][0]),),)


def drop_output(gm, ctx):
    next(n for n in gm.graph.nodes if n.op == "output").args = ((),)


def forget_value(gm, ctx):
    linear = find(gm, "linear") if any("linear" in n.name for n in gm.graph.nodes) else find(gm, "input_")
    with gm.graph.inserting_before(linear.next):
        node = gm.graph.call_function(torch.relu, (linear,))
    linear.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)


def half_build(gm, ctx):
    output = next(n for n in gm.graph.nodes if n.op == "output")
    value = output.args[0][0]
    with splice(gm, output, "probe") as at:
        counts = at(torch.ops.aten.ones.default, [3])
        gathered = at(OPS.gather.default, value, at(torch.Tensor.int, counts), 4)
        at(torch.relu, at(operator.getitem, gathered, 2))


def break_order(gm, ctx):
    last = next(n for n in gm.graph.nodes if n.op == "output").args[0][0]
    next(iter(gm.graph.nodes)).prepend(last)


BROKEN = {
    remove_input: "original inputs moved",
    swap_inputs: "original inputs moved",
    change_dtype: "outputs changed",
    change_shape: "outputs changed",
    drop_output: "outputs changed",
    forget_value: "node without a fake value",
    half_build: "half-built elastic linear",
    break_order: "invalid graph",
}


@pytest.mark.parametrize("action", BROKEN, ids=lambda a: a.__name__)
def test_verification_catches_a_broken_pass(action):
    with pytest.raises(VerifyError, match=f"verify after probe: {BROKEN[action]} ") as caught:
        run(action)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_whatever_a_pass_raises_is_wrapped_with_pass_and_graph():
    class Odd(Exception):
        """Cannot be pickled by name."""

    def fail(gm, ctx):
        raise Odd("no such thing")

    with pytest.raises(
        PassFailed, match=r"probe: failed on graph graph-7 at Odd: no such thing\. Set MOBIQUANT"
    ) as caught:
        run(fail)
    assert isinstance(caught.value.__cause__, Odd)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(PassFailed, match=r"Graphs are in somewhere\."):
        run(fail, config=CompileConfig(dump="somewhere"))


def test_our_own_errors_pass_unwrapped():
    def fail(gm, ctx):
        raise BadOption(where="x", name="y", got=1, wanted=2)

    with pytest.raises(BadOption):
        run(fail)


def test_reports_tell_time_changes_and_skips():
    def add(gm, ctx):
        relu = find(gm, "input_2") if any("input_2" in n.name for n in gm.graph.nodes) else find(gm, "relu")
        with splice(gm, relu, "probe") as at:
            relu.replace_input_with(relu.args[0], at(torch.neg, relu.args[0]))
        return PassResult(1, (Skip("a", SkipReason.TIED),))

    (report,) = run(add)
    assert (report.name, report.rewritten, report.ops) == ("probe", 1, {"neg": 1})
    assert report.ms >= 0
    assert report.to_dict()["skipped"] == [{"name": "a", "reason": "tied to another parameter", "detail": ""}]


def test_observers_see_the_input_and_every_pass():
    gm, inputs = capture(nn.Linear(64, 64), torch.randn(3, 64))
    seen = []
    manager = PassManager([load_pass(n) for n in DEFAULT_PIPELINE], lambda step, name, gm: seen.append((step, name)))
    with torch.no_grad():
        manager.run(own_graph(gm, inputs), PassContext("g", CompileConfig(), inputs))
    assert seen == list(enumerate(["input", *DEFAULT_PIPELINE]))


def test_order_is_checked_before_anything_runs():
    with pytest.raises(PassOrder, match=r"expand-elastic must run after .*share-routing.* the order given is"):
        PassManager([load_pass("expand-elastic"), load_pass("share-routing")])
    PassManager([load_pass("expand-elastic")])  # only what runs at all must come before


def test_registry_keys_are_pass_names_class_names_and_file_names():
    assert set(DEFAULT_PIPELINE) == set(PASSES)
    for key, target in PASSES.items():
        made = load_pass(key)
        module, _, name = target.partition(":")
        assert made.name == key
        assert type(made).__name__ == name == "".join(part.title() for part in key.split("-"))
        assert module.rsplit(".", 1)[-1] == key.replace("-", "_")
        assert dataclasses.is_dataclass(made)
        assert type(made).__dataclass_params__.frozen
        assert "Before" in inspect.getdoc(type(made))
        assert "After" in inspect.getdoc(type(made))
        assert made.after <= set(PASSES)


def test_options_of_passes():
    assert load_pass("share-routing{min-linears=5}").min_linears == 5
    for text, words in (
        ("{min_linears=x}", "option 'min_linears' got 'x'; wanted a whole number from 2"),
        ("{min_linears=true}", "option 'min_linears' got True; wanted a whole number"),
        ("{min_linears=3", "wanted share-routing{option=value}"),
        ("{name=x}", r"wanted one of \['min_linears'\]"),
    ):
        with pytest.raises(BadOption, match=words):
            load_pass(f"share-routing{text}")
    with pytest.raises(BadOption, match="pass share-routing: option 'most' got 5; wanted one of"):
        load_pass("share-routing{most=5}")
    with pytest.raises(UnknownPass, match="no pass is named 'shrae'; known passes are normalise-linears"):
        load_pass("shrae")


def test_pipelines_split_outside_braces():
    text = "bind-slices, share-routing{min-linears=3,x=1},fuse-elastic"
    assert split_pipeline(text) == ["bind-slices", "share-routing{min-linears=3,x=1}", "fuse-elastic"]
    assert pipeline(CompileConfig(passes=text)) == split_pipeline(text)
    assert pipeline(CompileConfig(passes=("bind-slices", "a,b"))) == ["bind-slices", "a", "b"]
    assert pipeline(CompileConfig()) == list(DEFAULT_PIPELINE)


@pytest.fixture
def plugins(monkeypatch):
    """Give the package the entry points that a test wants."""

    def install(**points):
        found = [EntryPoint(name.replace("_", "-"), value, registry.ENTRY_POINTS) for name, value in points.items()]
        monkeypatch.setattr(registry, "entry_points", lambda group: found)
        all_passes.cache_clear()

    yield install
    all_passes.cache_clear()


def test_plugins_are_found_by_entry_point(plugins, monkeypatch):
    monkeypatch.setitem(sys.modules, "a_plugin", sys.modules[__name__])
    plugins(probe="a_plugin:Probe")
    assert pass_names() == [*PASSES, "probe"]
    made = load_pass("probe{size=9}")
    assert type(made).__name__ == "Probe"
    assert made.size == 9


def test_plugins_may_not_take_a_name_that_is_in_use(plugins):
    plugins(bind_slices="a_plugin:Probe")
    with pytest.raises(DuplicatePass, match=r"'bind-slices' is registered twice, by mobiquant_compiler\.passes\."):
        load_pass("normalise-linears")


def test_fingerprints_move_with_options_only():
    assert fingerprint(load_pass("share-routing")) == fingerprint(load_pass("share-routing"))
    assert fingerprint(load_pass("share-routing")) != fingerprint(load_pass("share-routing{min-linears=4}"))
    assert fingerprint(load_pass("share-routing")) != fingerprint(load_pass("fuse-elastic"))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.add_(1), True),
        (lambda x: torch.relu_(x), True),
        (lambda x: torch.nn.functional.relu(x, inplace=True), True),
        (lambda x: torch.add(x, 1, out=x), True),
        (lambda x: torch.ops.aten.add_.Tensor(x, x), True),
        (lambda x: x.add(1), False),
        (lambda x: x.__add__(1), False),
        (lambda x: torch.ops.aten.add.Tensor(x, x), False),
    ],
)
def test_calls_that_may_write_are_recognised(function, expected):
    class Module(nn.Module):
        def forward(self, x):
            return function(x)

    graph = torch.fx.symbolic_trace(Module()).graph
    assert any(mutates(node) for node in graph.nodes) is expected


@pytest.mark.parametrize("target", [operator.iadd, operator.setitem, operator.imul])
def test_operators_that_write_are_recognised(target):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    assert mutates(graph.call_function(target, (x, x)))
    assert not mutates(x)
    assert not mutates(graph.call_function(OPS.route.default, (x,)))
