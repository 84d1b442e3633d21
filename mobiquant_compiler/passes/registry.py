"""Names to passes, lazily: built-in ones here, others by the entry point group ``mobiquant_compiler.passes``."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from mobiquant_compiler.errors import BadOption, BrokenPass, DuplicatePass, UnknownPass
from mobiquant_compiler.passes.base import GraphPass

ENTRY_POINTS = "mobiquant_compiler.passes"
PASSES: dict[str, str] = {
    "normalise-linears": "mobiquant_compiler.passes.normalise_linears:NormaliseLinears",
    "bind-slices": "mobiquant_compiler.passes.bind_slices:BindSlices",
    "set-execution": "mobiquant_compiler.passes.set_execution:SetExecution",
    "share-routing": "mobiquant_compiler.passes.share_routing:ShareRouting",
    "expand-elastic": "mobiquant_compiler.passes.expand_elastic:ExpandElastic",
    "fuse-elastic": "mobiquant_compiler.passes.fuse_elastic:FuseElastic",
    "fuse-siblings": "mobiquant_compiler.passes.fuse_siblings:FuseSiblings",
}
DEFAULT_PIPELINE = (
    "normalise-linears",
    "bind-slices",
    "set-execution",
    "share-routing",
    "expand-elastic",
    "fuse-elastic",
    "fuse-siblings",
)


@lru_cache(maxsize=1)
def all_passes() -> dict[str, str]:
    """Return every known pass as ``name -> "module:Class"``.

    Raises:
        DuplicatePass: a plugin took a name that is in use.
    """
    known = dict(PASSES)
    for point in entry_points(group=ENTRY_POINTS):
        if known.get(point.name, point.value) != point.value:
            raise DuplicatePass(name=point.name, first=known[point.name], second=point.value)
        known[point.name] = point.value
    return known


def pass_names() -> list[str]:
    """Return the known names, built-in ones first."""
    return list(all_passes())


def load_pass(text: str) -> GraphPass:
    """Build a pass from ``name`` or ``name{option=value,other-option=value}``.

    Raises:
        UnknownPass: no such name.
        BrokenPass: what a plugin registered under it is no pass.
        BadOption: an option that the pass does not have.
    """
    name, brace, options = text.strip().partition("{")
    target = all_passes().get(name)
    if target is None:
        raise UnknownPass(name=name, known=", ".join(pass_names()))
    cls = _class_of(name, target)
    if brace and not options.endswith("}"):
        raise BadOption(where=f"pass {name}", name="options", got=text, wanted=f"{name}{{option=value}}")
    values = _options(options.removesuffix("}"))
    known = [field.name for field in fields(cls)]
    for option, value in values.items():
        if option not in known:
            raise BadOption(where=f"pass {name}", name=option, got=value, wanted=f"one of {known}")
    return cls(**values)


def _class_of(name: str, target: str) -> Any:
    """Import a pass that a plugin may have registered: whatever it does wrong is named with its name."""
    module, _, attribute = target.partition(":")
    try:
        cls: Any = getattr(import_module(module), attribute)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise BrokenPass(name=name, target=target, reason=reason) from error
    lacks = [part for part in ("name", "after", "run") if not hasattr(cls, part)]
    if not isinstance(cls, type) or not is_dataclass(cls) or lacks:
        reason = f"it has no {', '.join(lacks)}" if lacks else "it is no dataclass"
        raise BrokenPass(name=name, target=target, reason=reason)
    return cls


def _options(text: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = item.partition("=")
        values[key.strip().replace("-", "_")] = _literal(value.strip())
    return values


def _literal(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def split_pipeline(text: str) -> list[str]:
    """Split ``a,b{x=1,y=2},c`` at the commas outside braces."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char == "{") - (char == "}")
        if char == "," and not depth:
            parts.append(current)
            current = ""
        else:
            current += char
    return [p.strip() for p in [*parts, current] if p.strip()]
