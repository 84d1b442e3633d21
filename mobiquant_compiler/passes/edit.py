"""Editing graphs: the one place that inserts nodes, and the one place that touches private torch.fx and Dynamo API."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

ORIGIN = "mq_origin"


def value_of(node: Node) -> Any:
    """Return the fake value of a node: Dynamo's `example_value`, or `val`."""
    value = node.meta.get("example_value")
    return node.meta.get("val") if value is None else value


def fake_values(args: Any) -> Any:
    """Replace nodes by their fake values inside arguments."""
    return torch.fx.map_arg(args, value_of)


def fake_mode_of(gm: GraphModule) -> FakeTensorMode:
    """Return the fake mode that the graph's values belong to."""
    # Not `detect_fake_mode`: while a backend runs, Dynamo's context already holds another mode than its graph.
    values = (value_of(node) for node in gm.graph.nodes if node.op == "placeholder")
    modes = (value.fake_mode for value in values if isinstance(value, FakeTensor))
    return next(modes, None) or FakeTensorMode(allow_non_fake_inputs=True)


def own_graph(gm: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """Return a copy of Dynamo's graph that placeholders may be added to, every node with a fake value.

    Dynamo reads its own graph again after the backend returns, and fails on placeholders it does not know; AOT wants
    `_dynamo_source` and the parameter names on whatever graph it is given.
    """
    graph = Graph()
    mapping: dict[Node, Node] = {}
    output = graph.graph_copy(gm.graph, mapping)
    graph.output(output)
    for old, new in mapping.items():
        new.meta = copy.copy(old.meta)
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    owned = GraphModule(gm, graph, class_name=type(gm).__name__)
    owned.meta = copy.copy(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        owned._param_name_to_source = gm._param_name_to_source
    if any(value_of(node) is None and node.users for node in graph.nodes if node.op != "get_attr"):
        _propagate(owned, example_inputs)
    return owned


def _propagate(gm: GraphModule, example_inputs: Sequence[Any]) -> None:
    mode = fake_mode_of(gm)
    FakeTensorProp(gm, mode).propagate(*example_inputs)


class Cursor:
    """Inserts calls before one node; each call runs on fake values, so metadata is true from the start."""

    def __init__(self, gm: GraphModule, before: Node, origin: str) -> None:
        self.gm, self.before, self.origin = gm, before, origin
        self.mode = fake_mode_of(gm)

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Insert ``target(*args, **kwargs)`` and return its node."""
        with self.gm.graph.inserting_before(self.before):
            node = self.gm.graph.call_function(target, args, kwargs)
        with self.mode:
            value = target(*fake_values(args), **fake_values(kwargs))
        mark(node, value, self.before, self.origin)
        return node


def mark(node: Node, value: Any, source: Node, origin: str) -> None:
    """Give a new node its fake value and the place it was made from."""
    node.meta["val"] = node.meta["example_value"] = value
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in source.meta:
            node.meta[key] = source.meta[key]
    node.meta[ORIGIN] = (*source.meta.get(ORIGIN, (source.name,)), origin)


@contextmanager
def splice(gm: GraphModule, before: Node, origin: str) -> Iterator[Cursor]:
    """Insert a chain of nodes before `before`, for the pass `origin`.

    Example:
        >>> with splice(gm, before=linear, origin="expand-elastic") as at:
        ...     counts = at(OPS.route.default, x, router, thresholds, hist, mask, kind)
    """
    yield Cursor(gm, before, origin)


def replace(old: Node, new: Node) -> None:
    """Let users of `old` use `new`, and erase `old` (its inputs stay, even if unused now)."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def erase_unused(nodes: Sequence[Node]) -> None:
    """Erase the nodes of a rewritten pattern that nobody uses any more, users first."""
    for node in nodes:
        if not node.users and node.op != "placeholder":
            node.graph.erase_node(node)


def add_input(
    gm: GraphModule, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, origin: str
) -> Node:
    """Append a placeholder for a tensor that keeps its address between calls."""
    last = placeholders(gm)[-1]
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(name)
    with fake_mode_of(gm):
        value = torch.empty(shape, dtype=dtype, device=device)
    node.meta["val"] = node.meta["example_value"] = value
    node.meta[ORIGIN] = (origin,)
    # AOT takes this as "same address every call": CUDA graphs then read the buffer itself, not a copy.
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    node._dynamo_source = None
    return node


def as_static_fakes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return stand-ins for inputs that Dynamo does not know, with fixed shapes.

    AOT would give real tensors without a source symbolic sizes of their own, which nothing could guard.
    """
    mode = detect_fake_mode()
    return [mode.from_tensor(t, static_shapes=True) for t in tensors] if mode else list(tensors)


def placeholders(gm: GraphModule) -> list[Node]:
    """Return the graph's inputs in order."""
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


_INPLACE = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imatmul", "ipow", "iand", "ior", "ixor", "setitem"}


def mutates(node: Node) -> bool:
    """Say whether a call may write to its arguments; our own ops write to histograms only and do not count."""
    if node.op not in ("call_function", "call_method"):
        return False
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace"):
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable) and not schema.name.startswith("mobiquant::")
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in _INPLACE or (name.endswith("_") and not name.endswith("__"))


def output_values(gm: GraphModule) -> list[tuple[str, Any]]:
    """Describe the graph's outputs for comparison: name-free, shape and dtype as text."""
    node = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    described: list[tuple[str, Any]] = []

    def visit(value: Node) -> Node:
        fake = value_of(value)
        kind = (tuple(map(str, fake.shape)), fake.dtype) if isinstance(fake, Tensor) else type(fake).__name__
        described.append((str(len(described)), kind))
        return value

    torch.fx.map_arg(node.args[0], visit)
    return described
