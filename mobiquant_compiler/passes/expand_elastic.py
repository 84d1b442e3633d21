"""Open elastic linears up into the four ops that later passes reason about."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from mobiquant_compiler.ops import OPS
from mobiquant_compiler.passes.base import PassContext, PassResult
from mobiquant_compiler.passes.edit import replace, splice
from mobiquant_compiler.passes.share_routing import ROUTER_ARGS, route_args


@dataclass(frozen=True, slots=True)
class ExpandElastic:
    """Rewrite `elastic_linear` and `routed_linear` into route, gather, slice_gemm and scatter.

    Linears with one input and one decision share the gather.

    Before::

        %y = call_function[mobiquant.elastic_linear](%x, %router, %thresholds, %hist, %mask, energy, %slices, ...)

    After::

        %counts  = call_function[mobiquant.route](%x, %router, %thresholds, %hist, %mask, energy, routed)
        %gather  = call_function[mobiquant.gather](%x, %counts, 4)
        %rows, %offsets, %grouped = getitem(%gather, 0 .. 2)
        %product = call_function[mobiquant.slice_gemm](%grouped, %offsets, %slices, ...)
        %y       = call_function[mobiquant.scatter](%product, %rows, %counts)
    """

    name: ClassVar[str] = "expand-elastic"
    after: ClassVar[frozenset[str]] = frozenset({"bind-slices", "share-routing"})

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        """Expand every elastic linear of the graph."""
        gathers: dict[tuple[Node, Node], tuple[Node, Node, Node]] = {}
        rewritten = 0
        for node in list(gm.graph.nodes):
            if node.target is OPS.elastic_linear.default:
                _expand(gm, node, None, gathers)
            elif node.target is OPS.routed_linear.default:
                counts: Any = node.args[1]
                _expand(gm, node, counts, gathers)
            else:
                continue
            rewritten += 1
        return PassResult(rewritten)


def _expand(
    gm: GraphModule, node: Node, counts: Node | None, gathers: dict[tuple[Node, Node], tuple[Node, Node, Node]]
) -> None:
    args: tuple[Any, ...] = node.args
    x = args[0]
    weight = args[ROUTER_ARGS if counts is None else 2 :]
    widths = weight[4]
    with splice(gm, before=node, origin=ExpandElastic.name) as at:
        counts = counts if counts is not None else at(OPS.route.default, *route_args(args))
        if (x, counts) not in gathers:
            gathered = at(OPS.gather.default, x, counts, len(widths))
            parts = [at(operator.getitem, gathered, i) for i in range(3)]
            gathers[x, counts] = (parts[0], parts[1], parts[2])
        rows, offsets, grouped = gathers[x, counts]
        product = at(OPS.slice_gemm.default, grouped, offsets, *weight)
        replace(node, at(OPS.scatter.default, product, rows, counts))
