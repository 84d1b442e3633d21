"""Put the four ops back together into what one call does well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from mobiquant_compiler.ops import OPS
from mobiquant_compiler.passes.base import PassContext, PassResult
from mobiquant_compiler.passes.edit import erase_unused, replace, splice
from mobiquant_compiler.passes.share_routing import ROUTER_ARGS


@dataclass(frozen=True, slots=True)
class FuseElastic:
    """Fuse gather, slice_gemm and scatter of one decision into `routed_linear`; a decision of its own is fused too.

    One launch then serves a linear on a CPU, and the CUDA path chooses its kernels by the number of tokens without a
    grouped copy of the activations.

    Before::

        %counts  = call_function[mobiquant.route](%x, ...)
        %gather  = call_function[mobiquant.gather](%x, %counts, 4)
        %product = call_function[mobiquant.slice_gemm](%grouped, %offsets, %slices, ...)
        %y       = call_function[mobiquant.scatter](%product, %rows, %counts)

    After, with other users of ``%counts``::

        %y = call_function[mobiquant.routed_linear](%x, %counts, %slices, ...)

    and without::

        %y = call_function[mobiquant.elastic_linear](%x, ..., %slices, ...)
    """

    name: ClassVar[str] = "fuse-elastic"
    after: ClassVar[frozenset[str]] = frozenset({"expand-elastic"})

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        """Fuse every complete chain; a chain with other users of its parts stays as it is."""
        chains = [c for c in map(_match, list(gm.graph.nodes)) if c is not None]
        shared: dict[Node, int] = {}
        for chain in chains:
            shared[chain.counts] = shared.get(chain.counts, 0) + 1
        for chain in chains:
            _fuse(gm, chain, alone=shared[chain.counts] == 1)
        return PassResult(len(chains))


@dataclass(frozen=True, slots=True)
class _Chain:
    counts: Node
    gather: Node
    parts: tuple[Node, ...]
    product: Node
    scatter: Node


def _match(scatter: Node) -> _Chain | None:
    """Return the chain that ends in `scatter`, None where it is not one."""
    if scatter.target is not OPS.scatter.default:
        return None
    args: tuple[Any, ...] = scatter.args
    product, rows, counts = args
    if product.target is not OPS.slice_gemm.default or len(product.users) != 1:
        return None
    grouped, offsets = product.args[:2]
    gather = rows.args[0]
    if gather.target is not OPS.gather.default or grouped.args[0] is not gather or offsets.args[0] is not gather:
        return None
    return _Chain(counts, gather, (rows, offsets, grouped), product, scatter) if gather.args[1] is counts else None


def _fuse(gm: GraphModule, chain: _Chain, *, alone: bool) -> None:
    x = chain.gather.args[0]
    weight = chain.product.args[2:]
    route = chain.counts
    # The gather's getitems and this scatter are the only users of a decision made for one linear.
    alone = alone and set(route.users) <= {chain.gather, chain.scatter}
    whole = alone and route.target is OPS.route.default and route.args[-1] == weight[-1]  # one way of prefill
    with splice(gm, before=chain.scatter, origin=FuseElastic.name) as at:
        if whole:
            fused = at(OPS.elastic_linear.default, *route.args[:ROUTER_ARGS], *weight)
        else:
            fused = at(OPS.routed_linear.default, x, route, *weight)
        replace(chain.scatter, fused)
    erase_unused([chain.product, *chain.parts, chain.gather, *([route] if whole else [])])
