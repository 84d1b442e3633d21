"""Let the options of a compilation decide how elastic linears compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from mobiquant_compiler.ops import NAMESPACE
from mobiquant_compiler.passes.base import PassContext, PassResult


@dataclass(frozen=True, slots=True)
class SetExecution:
    """Write the backend's options `activation` and `prefill`, where they are given, into the ops that take them.

    Before::

        %y = call_function[mobiquant.elastic_linear](%x, ..., %slices, ..., 64, slice_major, a16, routed)

    After, with ``options={"prefill": "full"}``::

        %y = call_function[mobiquant.elastic_linear](%x, ..., %slices, ..., 64, slice_major, a16, full)
    """

    name: ClassVar[str] = "set-execution"
    after: ClassVar[frozenset[str]] = frozenset({"bind-slices"})

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        """Change every op that says otherwise."""
        options = {"activation": ctx.config.activation, "prefill": ctx.config.prefill}
        wanted = {name: value for name, value in options.items() if value is not None}
        return PassResult(sum(_set(node, wanted) for node in gm.graph.nodes) if wanted else 0)


def _set(node: Node, wanted: dict[str, str]) -> bool:
    """Write the wanted arguments into a call of one of our ops, and say whether any changed."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.name.startswith(f"{NAMESPACE}::"):
        return False
    before = (node.args, node.kwargs)
    names = [argument.name for argument in schema.arguments]
    node.args = tuple(wanted.get(name, value) for name, value in zip(names, node.args, strict=False))
    node.kwargs = {name: wanted.get(name, value) for name, value in node.kwargs.items()}
    return (node.args, node.kwargs) != before
