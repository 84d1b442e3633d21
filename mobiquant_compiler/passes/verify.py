"""What must hold after every pass."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from mobiquant_compiler.errors import VerifyError
from mobiquant_compiler.ops import OPS
from mobiquant_compiler.passes.edit import output_values, placeholders, value_of

# Values only have a meaning inside their op family: a pass that leaves one for somebody else stopped half way.
_CONSUMERS: dict[object, tuple[object, ...]] = {
    OPS.gather.default: (torch.ops.mobiquant.slice_gemm.default, torch.ops.mobiquant.scatter.default),
    OPS.slice_gemm.default: (torch.ops.mobiquant.scatter.default,),
}


def verify(gm: GraphModule, inputs: list[str], outputs: list[tuple[str, Any]], after: str) -> None:
    """Check the graph after the pass `after`.

    Args:
        gm: The graph.
        inputs: Names of the original placeholders; they must stay the first ones, in order.
        outputs: Shapes and dtypes of the outputs before the pipeline.
        after: Name of the pass, for the message.

    Raises:
        VerifyError: names the node and what is wrong.
    """
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise VerifyError(name=after, what="invalid graph", node="?", got=error, wanted="a graph that lints") from error
    names = [node.name for node in placeholders(gm)]
    if names[: len(inputs)] != inputs:
        raise VerifyError(name=after, what="original inputs moved", node=names[:1], got=names, wanted=inputs)
    if output_values(gm) != outputs:
        raise VerifyError(name=after, what="outputs changed", node="output", got=output_values(gm), wanted=outputs)
    for node in gm.graph.nodes:
        _verify_node(node, after)


def _verify_node(node: Node, after: str) -> None:
    unknown = node.op == "call_function" and value_of(node) is None
    if unknown and any(value_of(user) is not None or user.op == "output" for user in node.users):
        raise VerifyError(name=after, what="node without a fake value", node=node.name, got=None, wanted="meta['val']")
    allowed = _CONSUMERS.get(node.target)
    if allowed is None:
        return
    for user in _through_getitem(node):
        if user.target not in allowed:
            raise VerifyError(
                name=after, what="half-built elastic linear", node=node.name, got=user.format_node(), wanted=allowed
            )


def _through_getitem(node: Node) -> list[Node]:
    users: list[Node] = []
    for user in node.users:
        users += list(user.users) if getattr(user.target, "__name__", "") == "getitem" else [user]
    return users
