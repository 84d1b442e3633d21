"""Graphs as Dynamo hands them over, and passes run on them outside of a compilation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from mobiquant_compiler import CompileConfig
from mobiquant_compiler.backend import compile_graph
from mobiquant_compiler.passes import PassContext, PassManager, PassReport, load_pass
from mobiquant_compiler.passes.edit import own_graph
from mobiquant_compiler.passes.manager import Observer
from mobiquant_compiler.runtime.weights import BoundGraph, Slot


def capture(model: nn.Module, *args: Any, dynamic: bool | None = None) -> tuple[GraphModule, list[Any]]:
    """Return the one graph that Dynamo makes of a call, and its inputs."""
    found: list[tuple[GraphModule, list[Any]]] = []

    def collect(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        found.append((gm, list(inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=collect, dynamic=dynamic)(*args)
    torch._dynamo.reset()
    (graph,) = found
    return graph


def without_inductor(**options: Any) -> Callable[..., Any]:
    """Return our backend with the graph interpreted in the end: the same rewrite and look-ups, no compile time."""
    config = CompileConfig.from_options(options)
    return lambda gm, inputs, **_: compile_graph(gm, inputs, config, lambda graph, _: graph.forward)


@dataclass
class Passed:
    """A graph that passes have run on.

    Attributes:
        gm: The graph as it is now.
        inputs: Its original inputs.
        ctx: What the passes noted.
        reports: One a pass.
    """

    gm: GraphModule
    inputs: list[Any]
    ctx: PassContext
    reports: list[PassReport]

    def again(self, name: str) -> PassReport:
        """Run one more pass."""
        (report,) = PassManager([load_pass(name)]).run(self.gm, self.ctx)
        return report

    def targets(self) -> list[str]:
        """Return the short names of all calls, in order."""
        calls = [n for n in self.gm.graph.nodes if n.op.startswith("call")]
        return [str(getattr(n.target, "__name__", n.target)).removesuffix(".default") for n in calls]

    def __call__(self) -> Any:
        """Run the graph on its inputs, slices of plain weights looked up as the backend does."""
        extra = []
        if self.ctx.bindings:
            limits = self.ctx.config.slices.limits
            slots = [Slot(b.name, b.index, b.transposed, b.spec, limits(b.name)) for b in self.ctx.bindings]
            extra = BoundGraph(slots, self.ctx.config.budget).inputs(self.inputs)
        with torch.no_grad():
            return self.gm(*(int(v) if isinstance(v, torch.SymInt) else v for v in self.inputs), *extra)


def run_passes(
    model: nn.Module,
    args: Sequence[Any],
    names: Sequence[str],
    config: CompileConfig | None = None,
    dynamic: bool | None = None,
    observe: Observer = lambda step, name, gm: None,
) -> Passed:
    """Capture a model and run the named passes on its graph."""
    gm, inputs = capture(model, *args, dynamic=dynamic)
    ctx = PassContext("graph-0", config or CompileConfig(), inputs)
    with torch.no_grad():
        owned = own_graph(gm, inputs)
        reports = PassManager([load_pass(name) for name in names], observe).run(owned, ctx)
    return Passed(owned, inputs, ctx, reports)
