"""Let plain linears read slices that are looked up by the identity of the run-time weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from mobiquant_compiler.config import matches
from mobiquant_compiler.errors import TrainingGraph
from mobiquant_compiler.linear import MASK_CAPACITY
from mobiquant_compiler.ops import OPS
from mobiquant_compiler.passes.base import Binding, PassContext, PassResult, layer_name
from mobiquant_compiler.passes.edit import add_input, placeholders, replace, splice, value_of
from mobiquant_compiler.passes.normalise_linears import LINEAR, parameter_of
from mobiquant_compiler.report import Skip, SkipReason
from mobiquant_compiler.slices import WEIGHT_DTYPES
from mobiquant_compiler.spec import Activation, Prefill, SliceSpec

PER_LINEAR = ("slices", "scale", "zero", "energy", "gain", "thresholds", "hist")
PER_GRAPH = ("mask",)
_RANKINGS = {"topk", "sort", "argsort", "argmax"}
# What mixes columns: the outputs of a linear before it are not what is ranked behind it.
_PRODUCTS = {"matmul", "mm", "bmm", "baddbmm", "addmm", "einsum", "scaled_dot_product_attention", "embedding"}


@dataclass(frozen=True, slots=True)
class BindSlices:
    """Replace each plain linear by `elastic_linear` on new inputs that the runtime fills at every call.

    Weight values are never read here: Dynamo lifts parameters to inputs and guards nothing about them, so one graph
    serves many weights (per-layer compile) and weights may be swapped, loaded or edited between calls.

    Before::

        %linear = call_function[torch._C._nn.linear](%x, %w, %bias)

    After (seven inputs a linear, one a graph, appended)::

        %elastic = call_function[mobiquant.elastic_linear](%x, [%energy, %gain], %thresholds, %hist, %mask,
                       energy, %slices, %scale, %zero, %bias, [2, 2, 2, 2], 64, slice_major, a16, routed)
    """

    name: ClassVar[str] = "bind-slices"
    after: ClassVar[frozenset[str]] = frozenset({"normalise-linears"})

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        """Bind every linear whose weight is a parameter; the others are skipped with a reason."""
        already = [node for node in gm.graph.nodes if node.target is OPS.elastic_linear.default]
        ctx.rewritten[:] = [layer_name(node) for node in already]
        _refuse_training(already)
        inputs = {node: index for index, node in enumerate(placeholders(gm))}
        skipped: list[Skip] = []
        bound: dict[tuple[Node, bool], dict[str, Node]] = {}
        shared: dict[str, Node] = {}
        ranked = _ranked_linears(gm)
        # One graph has one device: mixed ones do not reach a backend as one graph of linears.
        for node in [n for n in gm.graph.nodes if n.target is LINEAR]:
            name = layer_name(node)
            weight = parameter_of(node.args[1])
            reason = _decline(node, name, weight, inputs, ranked, ctx)
            if reason is not None:
                skipped.append(reason)
                continue
            assert weight is not None, "declined otherwise"
            shared = shared or _shared_inputs(gm, ctx, value_of(weight[0]).device)
            if weight not in bound:
                bound[weight] = _bind(gm, name, weight, inputs[weight[0]], ctx)
            _rewrite(gm, node, bound[weight], shared, ctx.config.slices.spec_for(value_of(node.args[0]).shape[-1]))
            ctx.rewritten.append(name)
        return PassResult(len(ctx.rewritten) - len(already), tuple(skipped))


def _refuse_training(elastic: list[Node]) -> None:
    """Refuse a graph in which a gradient would have to pass an elastic linear: it would be left out unannounced."""
    for node in elastic:
        x: Any = node.args[0]
        if torch.is_grad_enabled() and value_of(x).requires_grad:
            raise TrainingGraph(what=f"the input of {layer_name(node)}")


def _ranked_linears(gm: GraphModule) -> set[Node]:
    """Return the linears of a normalised graph whose outputs are ranked, with no other product between."""
    found: set[Node] = set()
    seen: set[Node] = set()
    left = [node for ranking in gm.graph.nodes if _called(ranking) in _RANKINGS for node in _ranked_by(ranking)]
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target is LINEAR:
            found.add(node)
        elif _called(node) not in _PRODUCTS:
            left.extend(node.all_input_nodes)
    return found


def _ranked_by(ranking: Node) -> list[Node]:
    first: Any = ranking.args[0] if ranking.args else ranking.kwargs.get("input")
    return [first] if isinstance(first, Node) else []


def _called(node: Node) -> str:
    """Return the name of what a node calls, functions and methods alike."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _decline(
    node: Node,
    name: str,
    weight: tuple[Node, bool] | None,
    inputs: dict[Node, int],
    ranked: set[Node],
    ctx: PassContext,
) -> Skip | None:
    """Return why a linear keeps its weight, None where it can be bound."""
    config = ctx.config.slices
    placeholder = weight[0] if weight else None
    example = ctx.example(inputs[placeholder]) if placeholder in inputs else None
    if weight is None or not isinstance(example, nn.Parameter):
        return Skip(name, SkipReason.NOT_A_WEIGHT)
    if not matches(name, config.include):
        return Skip(name, SkipReason.NOT_INCLUDED)
    if tied := _other_use(weight[0]):
        return Skip(name, SkipReason.TIED, tied)
    if not config.selects(name):
        return Skip(name, SkipReason.EXCLUDED)
    if node in ranked:
        return Skip(name, SkipReason.RANKED)
    if example.dtype not in WEIGHT_DTYPES:
        return Skip(name, SkipReason.DTYPE, str(example.dtype))
    n, k = _shape(example, weight[1])
    if config.is_too_narrow(k):
        return Skip(name, SkipReason.TOO_NARROW, f"{n} x {k}")
    if torch.is_grad_enabled() and example.requires_grad:
        raise TrainingGraph(what=f"the weight of {name}")
    return None


def _other_use(placeholder: Node) -> str:
    """Return a user of the weight that is not a linear (an embedding that shares it), or nothing."""
    for user in placeholder.users:
        if user.target is LINEAR and user.args[1] is placeholder:
            continue
        if parameter_of(user) is not None and all(u.target is LINEAR for u in user.users):
            continue
        return layer_name(user)
    return ""


def _shape(weight: Tensor, transposed: bool) -> tuple[int, int]:
    n, k = weight.shape
    return (k, n) if transposed else (n, k)


def _bind(gm: GraphModule, name: str, weight: tuple[Node, bool], index: int, ctx: PassContext) -> dict[str, Node]:
    """Add the inputs of one weight and note what the runtime must fill them with."""
    example = ctx.example(index)
    assert example is not None, "declined otherwise"
    n, k = _shape(example, weight[1])
    spec = ctx.config.slices.spec_for(k)
    number = len(ctx.bindings)
    ctx.bindings.append(Binding(name, index, weight[1], spec))
    scales = spec.scale_shape(n, k)
    # Weight values are unknown now, so their scales must fit whatever comes: float32.
    kinds = {
        "slices": (spec.packed_shape(n, k), torch.int32),
        "scale": (scales, torch.float32),
        "zero": (scales, torch.float32),
        "energy": ((k,), torch.float32),
        "gain": ((spec.num_slices - 1,), torch.float32),
        "thresholds": ((spec.num_slices - 1,), torch.float32),
        "hist": ((spec.num_slices,), torch.int64),
    }
    return {key: add_input(gm, f"mq{number}_{key}", *kinds[key], example.device, BindSlices.name) for key in PER_LINEAR}


def _shared_inputs(gm: GraphModule, ctx: PassContext, device: torch.device) -> dict[str, Node]:
    kinds = {"mask": ((1 + MASK_CAPACITY,), torch.int32)}
    return {key: add_input(gm, f"mq_{key}", *kinds[key], device, BindSlices.name) for key in PER_GRAPH}


def _rewrite(gm: GraphModule, node: Node, own: dict[str, Node], shared: dict[str, Node], spec: SliceSpec) -> None:
    x, _, *rest = node.args
    bias = rest[0] if rest else node.kwargs.get("bias")
    with splice(gm, before=node, origin=BindSlices.name) as at:
        elastic = at(
            OPS.elastic_linear.default,
            x,
            [own["energy"], own["gain"]],
            own["thresholds"],
            own["hist"],
            shared["mask"],
            "energy",
            own["slices"],
            own["scale"],
            own["zero"],
            bias,
            list(spec.widths),
            spec.group,
            str(spec.layout),
            str(Activation.A16),
            str(Prefill.ROUTED),
        )
        replace(node, elastic)
