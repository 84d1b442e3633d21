"""Bring every spelling of a linear layer into one call."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from mobiquant_compiler.passes.base import PassContext, PassResult
from mobiquant_compiler.passes.edit import erase_unused, placeholders, replace, splice, value_of

LINEAR = torch._C._nn.linear
_MATMULS = {torch.matmul, torch.mm, operator.matmul, "matmul", "mm", "__matmul__"}
_ADDS = {torch.add, operator.add, operator.iadd, "add", "add_"}
_ADDMMS = {torch.addmm, "addmm"}


@dataclass(frozen=True, slots=True)
class NormaliseLinears:
    """Rewrite addmm, mm, matmul and matmul + add with a 2-D parameter into ``torch._C._nn.linear``.

    The weight of the result is a parameter [N, K], or ``parameter.t()`` where the parameter is [K, N] (GPT-2's
    Conv1D): later passes need to know these two forms only.

    Before::

        %addmm = call_function[torch.addmm](%bias, %x, %w)             # w [K, N]

    After::

        %t      = call_function[torch.t](%w)
        %linear = call_function[torch._C._nn.linear](%x, %t, %bias)
    """

    name: ClassVar[str] = "normalise-linears"
    after: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        """Rewrite in place; calls whose right operand is not a parameter are not linears and are left silently."""
        rewritten = 0
        inputs = enumerate(placeholders(gm))
        parameters = {node for index, node in inputs if isinstance(ctx.example(index), nn.Parameter)}
        for node in list(gm.graph.nodes):
            if node.op not in ("call_function", "call_method"):
                continue
            if node.target in _ADDMMS:
                rewritten += _rewrite_addmm(gm, node, parameters)
            elif node.target in _MATMULS:
                rewritten += _rewrite_matmul(gm, node, parameters)
        return PassResult(rewritten)


def parameter_of(node: object) -> tuple[Node, bool] | None:
    """Return the placeholder of a weight and whether it is transposed, None if `node` is not a weight.

    A weight is a 2-D input of the graph, or its transpose.
    """
    if not isinstance(node, Node):
        return None
    if _is_input_matrix(node):
        return node, False
    inner = _transposed(node)
    return (inner, True) if inner is not None and _is_input_matrix(inner) else None


def _is_input_matrix(node: Node) -> bool:
    value = value_of(node)
    return node.op == "placeholder" and isinstance(value, Tensor) and value.dim() == 2


def _transposed(node: Node) -> Node | None:
    """Return what a 2-D transpose is taken of."""
    inner = node.args[0] if node.args else None
    if not isinstance(inner, Node):
        return None
    if node.target in (torch.t, "t"):
        return inner
    if node.target in (torch.transpose, "transpose") and set(node.args[1:3]) in ({0, 1}, {-1, -2}):
        return inner
    if node.target is getattr and node.args[1] in ("T", "mT"):
        return inner
    return None


def _is_vector_parameter(node: object, size: object) -> bool:
    if not (isinstance(node, Node) and node.op == "placeholder"):
        return False
    value = value_of(node)
    return isinstance(value, Tensor) and value.dim() == 1 and value.shape[0] == size


def _rewrite_addmm(gm: GraphModule, node: Node, parameters: set[Node]) -> int:
    bias, x, weight = node.args[:3]
    found = parameter_of(weight)
    scaled = len(node.args) > 3 or any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta"))
    if found is None or found[0] not in parameters or scaled:
        return 0
    if not _is_vector_parameter(bias, value_of(node).shape[-1]):
        return 0
    _put_linear(gm, node, x, found, bias, node)
    return 1


def _rewrite_matmul(gm: GraphModule, node: Node, parameters: set[Node]) -> int:
    if len(node.args) != 2 or node.kwargs:
        return 0
    x, weight = node.args
    found = parameter_of(weight)
    if found is None or found[0] not in parameters or not isinstance(x, Node) or value_of(x).dim() < 2:
        return 0
    last, bias = node, None
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is not None and user.target in _ADDS and not user.kwargs and len(user.args) == 2:
        other = user.args[1] if user.args[0] is node else user.args[0]
        if _is_vector_parameter(other, value_of(node).shape[-1]):
            last, bias = user, other
    _put_linear(gm, node, x, found, bias, last)
    return 1


def _put_linear(gm: GraphModule, node: Node, x: object, weight: tuple[Node, bool], bias: object, last: Node) -> None:
    """Replace `last` by the canonical call; a right operand [K, N] is the transpose of a linear's weight.

    The call stands where the product `node` stood: what comes between it and `last` may write to its input.
    """
    placeholder, transposed = weight
    with splice(gm, before=node, origin=NormaliseLinears.name) as at:
        matrix = placeholder if transposed else at(torch.t, placeholder)
        replace(last, at(LINEAR, x, matrix, bias))
    erase_unused([node] if last is not node else [])
