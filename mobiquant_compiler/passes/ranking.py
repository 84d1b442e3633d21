"""Find linears whose outputs are ranked: what a mixture chooses experts by."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from mobiquant_compiler.passes.normalise_linears import LINEAR

_RANKINGS = {"topk", "sort", "argsort", "argmax"}
# What mixes columns: the outputs of a linear before it are not what is ranked behind it.
_PRODUCTS = {"matmul", "mm", "bmm", "baddbmm", "addmm", "einsum", "scaled_dot_product_attention", "embedding"}


def ranked_linears(gm: GraphModule) -> set[Node]:
    """Return the linears of a normalised graph whose outputs are ranked, with no other product between."""
    found: set[Node] = set()
    seen: set[Node] = set()
    left = [node for ranking in gm.graph.nodes if _name(ranking) in _RANKINGS for node in _ranked_by(ranking)]
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target is LINEAR:
            found.add(node)
        elif _name(node) not in _PRODUCTS:
            left.extend(node.all_input_nodes)
    return found


def _ranked_by(ranking: Node) -> list[Node]:
    first: Any = ranking.args[0] if ranking.args else ranking.kwargs.get("input")
    return [first] if isinstance(first, Node) else []


def _name(node: Node) -> str:
    """Return the name of what a node calls, functions and methods alike."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
