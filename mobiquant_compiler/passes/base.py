"""What a pass is: options as fields, one `run`, a result that says what it did and what it declined."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor
from torch.fx import GraphModule, Node

from mobiquant_compiler.config import CompileConfig
from mobiquant_compiler.report import Skip
from mobiquant_compiler.spec import SliceSpec


@dataclass(frozen=True, slots=True)
class Binding:
    """A plain weight that run-time slices are looked up for.

    Attributes:
        name: Layer it belongs to, for reports.
        index: Position of the weight among the graph's original inputs.
        transposed: The weight is [K, N] (Conv1D).
        spec: How it becomes slices.
    """

    name: str
    index: int
    transposed: bool
    spec: SliceSpec


@dataclass(slots=True)
class PassContext:
    """What passes know besides the graph.

    Attributes:
        graph: Name of the graph in reports.
        config: Options of the backend.
        example_inputs: The caller's own tensors (and SymInts), one per placeholder.
        bindings: Filled by bind-slices, in the order of the inputs it appends.
        rewritten: Layers that are elastic so far.
    """

    graph: str
    config: CompileConfig
    example_inputs: Sequence[Any]
    bindings: list[Binding] = field(default_factory=list)
    rewritten: list[str] = field(default_factory=list)

    def example(self, index: int) -> Tensor | None:
        """Return the example tensor of an original input, None where there is none."""
        if index >= len(self.example_inputs):
            return None
        value = self.example_inputs[index]
        return value if isinstance(value, Tensor) else None


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass did.

    Attributes:
        rewritten: How many places it changed.
        skipped: Candidates it declined, each with its reason.
    """

    rewritten: int = 0
    skipped: tuple[Skip, ...] = ()


class GraphPass(Protocol):
    """A pass: a frozen dataclass with a class-level name, edited graph in place, nothing but its options inside.

    Attributes:
        name: Kebab-case; the registry key and, with underscores, the file's name.
        after: Passes that must come before it where they run at all.
    """

    name: ClassVar[str]
    after: ClassVar[frozenset[str]]

    def run(self, gm: GraphModule, ctx: PassContext) -> PassResult:
        """Rewrite `gm` in place. Valid graph in, valid graph out; anything goes in between."""
        ...


def fingerprint(graph_pass: GraphPass) -> str:
    """Hash a pass's source and options: it moves when the pass or its options change, and only then."""
    module = inspect.getmodule(type(graph_pass))
    assert module is not None, "a pass lives in a module"
    text = inspect.getsource(module) + repr(graph_pass)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def layer_name(node: Node) -> str:
    """Return the name of the module call a node came from (`model.layers.0.mlp.up_proj`), or the node's own."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = str(next(reversed(stack.values()))[0])
    for prefix in ("L['self']", "L['fn']", "G['model']", "self"):
        path = path.removeprefix(prefix)
    return path.strip(".").replace("_modules.", "") or node.name
