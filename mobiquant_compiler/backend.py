"""The backend of ``torch.compile(model, backend="mobiquant")``, found by entry point: the pipeline, top to bottom."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from mobiquant_compiler.budgets import set_initial_budget
from mobiquant_compiler.config import CompileConfig
from mobiquant_compiler.dump import DumpObserver, GraphReport, trace_artifact, write_report
from mobiquant_compiler.errors import BadOption, StrictSkip, UnknownOption
from mobiquant_compiler.passes import DEFAULT_PIPELINE, PassContext, PassManager, PassReport, load_pass
from mobiquant_compiler.passes.edit import as_static_fakes, own_graph
from mobiquant_compiler.passes.manager import op_counts
from mobiquant_compiler.passes.registry import split_pipeline
from mobiquant_compiler.report import Coverage, SkipReason
from mobiquant_compiler.runtime.weights import BoundGraph, Slot, Source

log = logging.getLogger("mobiquant_compiler")
_NUMBERS = itertools.count()
REPORTS: deque[GraphReport] = deque(maxlen=256)  # one a compiled graph, newest last

Compiled = Callable[..., Any]
Finish = Callable[[GraphModule, Sequence[Any]], Compiled]


def mobiquant(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Compiled:
    """Compile one graph of Dynamo's: linears become elastic, the rest is Inductor's.

    Args:
        gm: Graph.
        example_inputs: The caller's tensors and SymInts.
        mode: torch.compile's mode, handed to Inductor.
        options: Fields of `CompileConfig`.
        **kwargs: ``name`` (torch >= 2.15) is accepted.

    Raises:
        ConfigError: unknown or wrong options, by name.
        GraphError: a graph that cannot be rewritten, or `strict` and a linear was skipped.
    """
    for name in kwargs.keys() - {"name"}:
        raise UnknownOption(where="backend 'mobiquant'", name=name, known="mode, options, name")
    config = CompileConfig.from_options(options)
    return compile_graph(gm, example_inputs, config, lambda graph, inputs: _inductor(graph, inputs, mode, config))


def compile_graph(gm: GraphModule, example_inputs: Sequence[Any], config: CompileConfig, finish: Finish) -> Compiled:
    """Run the pipeline on a graph and hand it to `finish`; what is returned takes the graph's original inputs."""
    graph = f"graph-{next(_NUMBERS)}"
    folder = Path(config.dump) / graph if config.dump else None
    ctx = PassContext(graph, config, example_inputs)
    owned = own_graph(gm, example_inputs)
    before = op_counts(owned)

    passes = [load_pass(text) for text in pipeline(config)]
    reports = PassManager(passes, DumpObserver(graph, folder)).run(owned, ctx)

    report = _report(ctx, reports, before, owned, folder)
    _check_strict(config, report)
    bound = _bound_graph(ctx)
    if bound is None:
        set_initial_budget(example_inputs, config.budget)
        return finish(owned, example_inputs)
    bound.compiled = finish(owned, [*example_inputs, *as_static_fakes(bound.begin(example_inputs))])
    return bound


def pipeline(config: CompileConfig) -> list[str]:
    """Return the passes to run, as ``name`` or ``name{option=value}``.

    Raises:
        BadOption: passes were chosen without the one that another option needs.
    """
    if config.passes is None:
        return list(DEFAULT_PIPELINE)
    chosen = [text for entry in config.passes for text in split_pipeline(entry)]
    for name in ("activation", "prefill"):
        value = getattr(config, name)
        if value is not None and "set-execution" not in chosen:
            wanted = "the pass set-execution among `passes`, which applies it"
            raise BadOption(where="backend 'mobiquant'", name=name, got=value, wanted=wanted)
    return chosen


def _inductor(gm: GraphModule, inputs: Sequence[Any], mode: str | None, config: CompileConfig) -> Compiled:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = dict(list_mode_options(mode)) if mode and mode != "default" else {}
    compiled: Any = compile_fx(gm, list(inputs), config_patches=patches | dict(config.inductor))
    return compiled


def _bound_graph(ctx: PassContext) -> BoundGraph | None:
    """Return the run-time side of the weights that bind-slices found, None where there are none."""
    if not ctx.bindings:
        return None
    limits = ctx.config.slices.limits
    slots = [Slot(b.name, b.index, b.transposed, b.spec, limits(b.name)) for b in ctx.bindings]
    return BoundGraph(slots, ctx.config.budget, _checkpoint_source(ctx.config))


def _checkpoint_source(config: CompileConfig) -> Source | None:
    if config.checkpoint is None:
        return None
    from mobiquant_compiler.checkpoint import weight_source

    return weight_source(Path(config.checkpoint))


def _report(
    ctx: PassContext,
    passes: Sequence[PassReport],
    before: Mapping[str, int],
    gm: GraphModule,
    folder: Path | None,
) -> GraphReport:
    skipped = [skip for p in passes for skip in p.skipped]
    coverage = Coverage(ctx.rewritten, skipped)
    where = str(folder) if folder else None
    report = GraphReport(ctx.graph, coverage, passes, dict(before), op_counts(gm), where)
    REPORTS.append(report)
    log.info("%s: %s", ctx.graph, coverage)
    trace_artifact(f"mobiquant_{ctx.graph}_coverage", str(coverage))
    if folder is not None:
        write_report(report, folder)
    return report


def _check_strict(config: CompileConfig, report: GraphReport) -> None:
    asked = (SkipReason.EXCLUDED, SkipReason.NOT_INCLUDED)
    skips = [s for s in report.coverage.skipped if s.reason not in asked]
    if config.strict and skips:
        raise StrictSkip(count=len(skips), graph=report.graph, skips="; ".join(map(str, skips)))


def dry_run(model: nn.Module, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> list[GraphReport]:
    """Run the pipeline on every graph of a model without Inductor: what would be rewritten, and what not.

    Args:
        model: Module, quantized or plain.
        *args: Inputs of one forward call.
        options: As for torch.compile.
        **kwargs: Keyword inputs.

    Returns:
        A report a graph, in the order of compilation.
    """
    config = CompileConfig.from_options(options)
    found: list[GraphReport] = []

    def collect(gm: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        compiled = compile_graph(gm, example_inputs, config, lambda graph, inputs: graph.forward)
        found.append(REPORTS[-1])
        return compiled

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=collect)(*args, **kwargs)
    torch._dynamo.reset()
    return found
