"""Graphs as text, dumps of a compilation, and its report.

A dump directory holds one folder a graph: ``00-input.fx``, then ``NN-<pass>.fx`` and ``NN-<pass>.diff`` for each pass,
``kernels/`` and ``report.json``. The same texts go to torch's structured trace, where ``tlparse`` shows them.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mobiquant_compiler.passes import PassReport
from mobiquant_compiler.passes.edit import ORIGIN, value_of
from mobiquant_compiler.report import Coverage


@dataclass(frozen=True, slots=True)
class GraphReport:
    """What the backend did to one graph.

    Attributes:
        graph: Name, ``graph-0`` and so on in the order of compilation.
        coverage: Linears made elastic and linears left alone.
        passes: One report a pass.
        nodes_before: Count of each op in the graph as it came.
        nodes_after: The same as it went to Inductor.
        dump: Where its dump is, if it was asked for.
    """

    graph: str
    coverage: Coverage
    passes: Sequence[PassReport]
    nodes_before: dict[str, int]
    nodes_after: dict[str, int]
    dump: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "graph": self.graph,
            "coverage": self.coverage.to_dict(),
            "passes": [p.to_dict() for p in self.passes],
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "torch": torch.__version__,
        }


def render(gm: GraphModule) -> str:
    """Write a graph as text that two runs agree on: one line a node, symbols renamed in the order they appear."""
    symbols: dict[str, str] = {}
    lines = [_line(node, symbols) for node in gm.graph.nodes]
    return "\n".join(lines) + "\n"


def _line(node: Node, symbols: dict[str, str]) -> str:
    value = _describe(value_of(node), symbols)
    origin = node.meta.get(ORIGIN)
    name = _symbolic(node.name, symbols)  # sizes are inputs named after their symbols
    made = f"  # from {origin[0]} by {origin[-1]}" if origin and len(origin) > 1 else ""
    if node.op == "placeholder":
        return f"%{name}: {value} = input"
    if node.op == "output":
        return f"return {_argument(node.args[0], symbols)}"
    if node.op == "get_attr":
        return f"%{name}: {value} = self.{node.target}"
    args = [_argument(a, symbols) for a in node.args]
    args += [f"{key}={_argument(a, symbols)}" for key, a in node.kwargs.items()]
    return f"%{name}: {value} = {_target(node)}({', '.join(args)}){made}"


def _target(node: Node) -> str:
    if isinstance(node.target, str):
        return f".{node.target}"
    schema = getattr(node.target, "_schema", None)
    return schema.name.replace("::", ".") if schema else getattr(node.target, "__name__", str(node.target))


def _argument(value: Any, symbols: dict[str, str]) -> str:
    if isinstance(value, Node):
        return f"%{_symbolic(value.name, symbols)}"
    if isinstance(value, list | tuple):
        inner = ", ".join(_argument(v, symbols) for v in value)
        return f"[{inner}]"
    return _symbolic(str(value), symbols)


def _describe(value: Any, symbols: dict[str, str]) -> str:
    if isinstance(value, Tensor):
        shape = ", ".join(_symbolic(str(d), symbols) for d in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{shape}]"
    if isinstance(value, list | tuple):
        return f"({', '.join(_describe(v, symbols) for v in value)})"
    if isinstance(value, torch.SymInt):
        return f"Sym({_symbolic(str(value), symbols)})"
    return type(value).__name__


def _symbolic(text: str, symbols: dict[str, str]) -> str:
    """Rename ``s77``-like symbols: their numbers come from the user's variable names."""

    def rename(match: re.Match[str]) -> str:
        return symbols.setdefault(match.group(0), f"s_{len(symbols)}")

    return re.sub(r"\b[su]\d+\b", rename, text)


@dataclass(slots=True)
class DumpObserver:
    """Writes the graph after each pass to a folder (if there is one) and to torch's structured trace.

    Attributes:
        graph: Name of the graph.
        folder: Where to write, None for the trace alone.
    """

    graph: str
    folder: Path | None
    _last: str = field(default="", repr=False)

    def __call__(self, step: int, name: str, gm: GraphModule) -> None:
        """See `passes.manager.Observer`."""
        if self.folder is None and not _tracing():
            return  # rendering a large graph costs milliseconds: only where somebody reads it
        text = render(gm)
        trace_artifact(f"mobiquant_{self.graph}_{step:02d}_{name}", text)
        if self.folder is not None:
            self._write(step, name, text)
        self._last = text

    def _write(self, step: int, name: str, text: str) -> None:
        assert self.folder is not None, "asked for by the caller"
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = f"{step:02d}-{name}"
        (self.folder / f"{stem}.fx").write_text(text, encoding="utf-8")
        if step:
            lines = difflib.unified_diff(
                self._last.splitlines(True), text.splitlines(True), "before", f"after {name}", n=2
            )
            (self.folder / f"{stem}.diff").write_text("".join(lines), encoding="utf-8")


def _tracing() -> bool:
    return bool(torch._logging._internal.trace_log.handlers)


def trace_artifact(name: str, text: str) -> None:
    """Put a text beside torch's own artifacts in the TORCH_TRACE log."""
    torch._logging.trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: text
    )


def write_report(report: GraphReport, folder: Path) -> None:
    """Write ``report.json`` of a graph."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
