"""Route once for linears that read the same input through the same router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from mobiquant_compiler.errors import BadOption
from mobiquant_compiler.ops import OPS
from mobiquant_compiler.passes.base import PassContext, PassResult
from mobiquant_compiler.passes.edit import mutates, replace, splice

ROUTER_ARGS = 6  # x, router, thresholds, hist, mask, kind


@dataclass(frozen=True, slots=True)
class ShareRouting:
    """Split elastic linears that share input and router into one `route` and a `routed_linear` each.

    Before (q, k and v of an attention block)::

        %q = call_function[mobiquant.elastic_linear](%x, [%energy, %gain], %thresholds, ..., %q_slices, ..., routed)
        %k = call_function[mobiquant.elastic_linear](%x, [%energy, %gain], %thresholds, ..., %k_slices, ..., routed)

    After::

        %counts = call_function[mobiquant.route](%x, [%energy, %gain], %thresholds, %hist, %mask, energy, routed)
        %q = call_function[mobiquant.routed_linear](%x, %counts, %q_slices, ...)
        %k = call_function[mobiquant.routed_linear](%x, %counts, %k_slices, ...)

    Telemetry then counts such an input once instead of once a linear; averages are the same.
    """

    name: ClassVar[str] = "share-routing"
    after: ClassVar[frozenset[str]] = frozenset({"bind-slices", "set-execution"})
    min_linears: int = 2

    def __post_init__(self) -> None:
        if type(self.min_linears) is not int or self.min_linears < 2:
            wanted = "a whole number from 2"
            raise BadOption(where=f"pass {self.name}", name="min_linears", got=self.min_linears, wanted=wanted)

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        """Rewrite every group of at least `min_linears`."""
        groups: dict[tuple[Any, ...], list[Node]] = {}
        writes = 0  # an input written to between two linears is not the same input
        for node in gm.graph.nodes:
            writes += mutates(node)
            if node.target is OPS.elastic_linear.default:
                groups.setdefault((writes, *_key(node)), []).append(node)
        rewritten = 0
        for members in groups.values():
            if len(members) >= self.min_linears:
                _share(gm, members)
                rewritten += len(members)
        return PassResult(rewritten)


def route_args(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what the `route` inside of an `elastic_linear` with these arguments takes."""
    return (*args[:ROUTER_ARGS], args[-1])


def _key(node: Node) -> tuple[Any, ...]:
    args: tuple[Any, ...] = node.args
    x, router, *rest = route_args(args)
    return (x, tuple(router), *rest)


def _share(gm: GraphModule, members: list[Node]) -> None:
    first = members[0]
    with splice(gm, before=first, origin=ShareRouting.name) as at:
        counts = at(OPS.route.default, *route_args(first.args))
    for node in members:
        with splice(gm, before=node, origin=ShareRouting.name) as at:
            replace(node, at(OPS.routed_linear.default, node.args[0], counts, *node.args[ROUTER_ARGS:]))
