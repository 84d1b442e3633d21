"""Runs a pipeline: orders, times, verifies, observes. Passes do none of these."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from mobiquant_compiler.errors import MobiQuantError, PassFailed, PassOrder
from mobiquant_compiler.passes.base import GraphPass, PassContext
from mobiquant_compiler.passes.edit import output_values, placeholders
from mobiquant_compiler.passes.verify import verify
from mobiquant_compiler.report import Skip

Observer = Callable[[int, str, GraphModule], None]


@dataclass(frozen=True, slots=True)
class PassReport:
    """One pass over one graph.

    Attributes:
        name: The pass.
        ms: Wall time in milliseconds, verification left out.
        rewritten: Places changed.
        skipped: Candidates declined.
        ops: How the count of each op changed, only those that did.
    """

    name: str
    ms: float
    rewritten: int
    skipped: tuple[Skip, ...]
    ops: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        skipped = [{"name": s.name, "reason": str(s.reason), "detail": s.detail} for s in self.skipped]
        return {
            "name": self.name,
            "ms": round(self.ms, 3),
            "rewritten": self.rewritten,
            "skipped": skipped,
            "ops": self.ops,
        }


def op_counts(gm: GraphModule) -> dict[str, int]:
    """Count the calls of a graph by a short name of their target."""
    calls = (node for node in gm.graph.nodes if node.op.startswith("call"))
    return dict(Counter(node.target if isinstance(node.target, str) else _short(node.target) for node in calls))


def _short(target: Any) -> str:
    schema = getattr(target, "_schema", None)
    return schema.name.replace("::", ".") if schema else getattr(target, "__name__", str(target))


@dataclass(frozen=True)
class PassManager:
    """An ordered pipeline.

    Attributes:
        passes: The passes, in the order they run.
        observe: Called before the first pass (step 0, "input") and after each.
    """

    passes: Sequence[GraphPass]
    observe: Observer = lambda step, name, gm: None

    def __post_init__(self) -> None:
        order = [p.name for p in self.passes]
        for place, graph_pass in enumerate(self.passes):
            for needed in sorted(graph_pass.after):
                if needed in order and order.index(needed) > place:
                    raise PassOrder(name=graph_pass.name, after=needed, order=", ".join(order))

    def run(self, gm: GraphModule, ctx: PassContext) -> list[PassReport]:
        """Run every pass on `gm` in place.

        Raises:
            PassFailed: wraps whatever a pass raised that is not an error of ours.
            VerifyError: a pass left an invalid graph.
        """
        inputs = [node.name for node in placeholders(gm)]
        outputs = output_values(gm)
        self.observe(0, "input", gm)
        reports = []
        for step, graph_pass in enumerate(self.passes, 1):
            reports.append(self._run_one(graph_pass, gm, ctx))
            self.observe(step, graph_pass.name, gm)
            verify(gm, inputs, outputs, graph_pass.name)
        gm.recompile()
        return reports

    def _run_one(self, graph_pass: GraphPass, gm: GraphModule, ctx: PassContext) -> PassReport:
        before = op_counts(gm)
        start = time.perf_counter()
        try:
            result = graph_pass.run(gm, ctx)
        except MobiQuantError:
            raise
        except Exception as error:
            failed = PassFailed(
                name=graph_pass.name,
                graph=ctx.graph,
                where=type(error).__name__,
                reason=error,
                dump=f" Graphs are in {ctx.config.dump}." if ctx.config.dump else " Set MOBIQUANT_DUMP=DIR to see it.",
            )
            raise failed from error
        ms = (time.perf_counter() - start) * 1e3
        after = op_counts(gm)
        changed = {op: after.get(op, 0) - before.get(op, 0) for op in sorted({*before, *after})}
        changed = {op: delta for op, delta in changed.items() if delta}
        return PassReport(graph_pass.name, ms, result.rewritten, result.skipped, changed)
