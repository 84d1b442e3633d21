"""One launch for linears that read the same input by the same decision."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from mobiquant_compiler.errors import BadOption
from mobiquant_compiler.ops import ELASTIC_LINEARS, OPS
from mobiquant_compiler.passes.base import PassContext, PassResult
from mobiquant_compiler.passes.edit import erase_unused, mutates, replace, splice
from mobiquant_compiler.passes.share_routing import ROUTER_ARGS
from mobiquant_compiler.spec import MAX_SIBLINGS

_TENSORS = slice(2, 6)  # slices, scale, zero, bias: what each linear has of its own; the rest is common
_COMMON = slice(6, None)  # widths, group, layout, activation, prefill


@dataclass(frozen=True, slots=True)
class FuseSiblings:
    """Fuse `routed_linear` calls of one input, decision and spec; a decision that only they use is fused too.

    Before (gate and up of a gated MLP)::

        %counts = call_function[mobiquant.route](%x, %router, ...)
        %gate   = call_function[mobiquant.routed_linear](%x, %counts, %gate_slices, %gate_scale, %gate_zero, None, ...)
        %up     = call_function[mobiquant.routed_linear](%x, %counts, %up_slices, %up_scale, %up_zero, None, ...)

    After::

        %both = call_function[mobiquant.elastic_linears.n2](%x, %router, ..., [%gate_slices, %up_slices],
                    [%gate_scale, %up_scale], [%gate_zero, %up_zero], [None, None], ...)
        %gate = call_function[getitem](%both, 0)
        %up   = call_function[getitem](%both, 1)

    and with other users of ``%counts``, `route` and `routed_linears`. The launch stands where the first of its linears
    stood: one whose own inputs are computed later, and one behind a call that may write to any of them, is not of it.
    Such a linear is elastic all the same, so nothing is reported as skipped.

    Attributes:
        max_linears: Most linears of one launch, 2 to `spec.MAX_SIBLINGS`.
    """

    name: ClassVar[str] = "fuse-siblings"
    after: ClassVar[frozenset[str]] = frozenset({"share-routing", "expand-elastic", "fuse-elastic"})
    max_linears: int = MAX_SIBLINGS

    def __post_init__(self) -> None:
        if type(self.max_linears) is not int or not 2 <= self.max_linears <= MAX_SIBLINGS:
            wanted = f"a whole number from 2 to {MAX_SIBLINGS}"
            raise BadOption(where=f"pass {self.name}", name="max_linears", got=self.max_linears, wanted=wanted)

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        """Fuse every set of at least two."""
        order, writes = _positions(gm)
        siblings: dict[tuple[Any, ...], list[list[Node]]] = {}
        for node in gm.graph.nodes:
            if node.target is OPS.routed_linear.default:
                _join(siblings.setdefault((writes[node], *_key(node)), []), node, order, self.max_linears)
        launches = [members for sets in siblings.values() for members in sets if len(members) > 1]
        for members in launches:
            counts: Any = members[0].args[1]
            _fuse(gm, members, route_too=_is_their_own(counts, members) and writes[counts] == writes[members[0]])
        return PassResult(sum(map(len, launches)))


def _positions(gm: GraphModule) -> tuple[dict[Node, int], dict[Node, int]]:
    """Return the place of every node, and how many calls before it may have written to their arguments."""
    order, writes, seen = {}, {}, 0
    for place, node in enumerate(gm.graph.nodes):
        seen += mutates(node)
        order[node], writes[node] = place, seen
    return order, writes


def _key(node: Node) -> tuple[Any, ...]:
    args: tuple[Any, ...] = node.args
    widths, *common = args[_COMMON]
    return (*args[:2], tuple(widths), *common)


def _join(sets: list[list[Node]], node: Node, order: dict[Node, int], most: int) -> None:
    """Put a linear into the first set that has room and whose first linear comes after all that this one reads."""
    ready = max(order[value] for value in node.all_input_nodes)
    for members in sets:
        if len(members) < most and ready < order[members[0]]:
            members.append(node)
            return
    sets.append([node])


def _is_their_own(counts: Node, members: list[Node]) -> bool:
    """Say whether `counts` is a decision about the input of `members`, made as they are, that nobody else reads."""
    if counts.target is not OPS.route.default or set(counts.users) != set(members):
        return False
    first: tuple[Any, ...] = members[0].args
    return (counts.args[0], counts.args[-1]) == (first[0], first[-1])


def _fuse(gm: GraphModule, members: list[Node], *, route_too: bool) -> None:
    first = members[0]
    counts: Any = first.args[1]
    tensors = [list(column) for column in zip(*(node.args[_TENSORS] for node in members), strict=True)]
    with splice(gm, before=first, origin=FuseSiblings.name) as at:
        if route_too:
            elastic = ELASTIC_LINEARS[len(members)]
            fused = at(elastic, *counts.args[:ROUTER_ARGS], *tensors, *first.args[_COMMON])
        else:
            fused = at(OPS.routed_linears.default, first.args[0], counts, *tensors, *first.args[_COMMON])
    for number, node in enumerate(members):
        with splice(gm, before=node, origin=FuseSiblings.name) as at:
            replace(node, at(operator.getitem, fused, number))
    erase_unused([counts] if route_too else [])
