"""What users may set: `SliceConfig` for weights, `CompileConfig` for the backend; only here the environment is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

from mobiquant_compiler.errors import BadOption, UnknownOption
from mobiquant_compiler.spec import GROUPS, Activation, Layout, Prefill, SliceSpec, choose_group

SCOPES = ("input", "linear")
SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ENV_PREFIX = "MOBIQUANT_"


def _patterns(name: str, given: Any) -> tuple[str, ...]:
    """Return name patterns as a tuple; one may stand alone.

    Raises:
        BadOption: they are no strings.
    """
    found = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    patterns = tuple(pattern for pattern in found if isinstance(pattern, str))
    if len(patterns) < len(found):
        raise BadOption(where="SliceConfig", name=name, got=given, wanted="name patterns, as ('*.q_proj', 'lm_head')")
    return patterns


@dataclass(frozen=True, slots=True)
class SliceConfig:
    """How the linear layers of a model become slices.

    Attributes:
        widths: Bits of each slice, the base first.
        group: 32, 64, 128, or "auto": per layer the largest that divides K, else the one that pads least.
        layout: "slice_major" (fast) or "bit_major" (the paper's).
        scope: "input" (linears with the same input share a router) or "linear".
        scale_dtype: Storage of scale and zero point: "float16", "bfloat16" or "float32".
        include: Name patterns (`fnmatch`) of linears to quantize.
        exclude: Name patterns left alone; the output head is, by default.
        floor: Least slice count of linears by name pattern, whatever the budget.
        ceiling: Greatest slice count, likewise.

    Raises:
        BadSliceSpec: `widths` or `layout`.
        BadOption: another field; the message names it.
    """

    widths: tuple[int, ...] = (2, 2, 2, 2)
    group: int | str = "auto"
    layout: str = Layout.SLICE_MAJOR.value
    scope: str = "input"
    scale_dtype: str = "float16"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ("lm_head", "*.lm_head")
    floor: Mapping[str, int] = field(default_factory=dict)
    ceiling: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        if self.group != "auto" and self.group not in GROUPS:
            raise BadOption(where="SliceConfig", name="group", got=self.group, wanted=f"'auto' or one of {GROUPS}")
        if self.scope not in SCOPES:
            raise BadOption(where="SliceConfig", name="scope", got=self.scope, wanted=f"one of {SCOPES}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise BadOption(
                where="SliceConfig", name="scale_dtype", got=self.scale_dtype, wanted=f"one of {tuple(SCALE_DTYPES)}"
            )
        object.__setattr__(self, "widths", self.spec_for(GROUPS[0]).widths)  # checked there, and so is the layout
        for name in ("floor", "ceiling"):
            for pattern, count in getattr(self, name).items():
                if not isinstance(count, Integral) or not 1 <= int(count) <= len(self.widths):
                    wanted = f"slice counts from 1 to {len(self.widths)}"
                    raise BadOption(where="SliceConfig", name=f"{name}[{pattern!r}]", got=count, wanted=wanted)

    def spec_for(self, k: int) -> SliceSpec:
        """Return the slice spec of a linear with `k` input columns."""
        group = choose_group(k) if self.group == "auto" else int(self.group)
        return SliceSpec(self.widths, group, self.layout)  # type: ignore[arg-type]  # checks and converts the layout

    def selects(self, name: str) -> bool:
        """Say whether the linear `name` is included and not excluded."""
        return matches(name, self.include) and not matches(name, self.exclude)

    def is_too_narrow(self, k: int) -> bool:
        """Say whether a linear with `k` input columns is narrower than a group."""
        return k < (GROUPS[-1] if self.group == "auto" else int(self.group))

    def limits(self, name: str) -> tuple[int, int]:
        """Return the floor and ceiling of slice counts for the linear `name`."""
        floors = [count for pattern, count in self.floor.items() if fnmatchcase(name, pattern)]
        ceilings = [count for pattern, count in self.ceiling.items() if fnmatchcase(name, pattern)]
        low, high = max(floors, default=1), min(ceilings, default=len(self.widths))
        if low > high:
            raise BadOption(
                where=f"SliceConfig for {name}", name="floor/ceiling", got=(low, high), wanted="floor <= ceiling"
            )
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON data."""
        plain = asdict(self)
        return {
            k: list(v) if isinstance(v, tuple) else dict(v) if isinstance(v, Mapping) else v for k, v in plain.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "SliceConfig") -> SliceConfig:
        """Build from plain data.

        Raises:
            UnknownOption: a key that is not a field.
        """
        check_keys(values, cls, where)
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)


@dataclass(frozen=True, slots=True)
class CompileConfig:
    """Options of the backend, ``torch.compile(model, backend="mobiquant", options={...})``.

    Attributes:
        budget: Average weight bits to start with: set when a model's first graph is compiled, not by later ones; None
            leaves the model's own.
        checkpoint: Directory whose slices are used for a plain model's weights.
        strict: Make a linear that is not rewritten an error.
        activation: "a16" or "a8", see `set_execution`; None leaves what the modules say ("a16" for plain models).
        prefill: "routed", "full" or "exact", likewise ("routed" for plain models).
        passes: Names of the passes to run, in order; None is the default pipeline.
        dump: Directory for graphs before and after each pass, kernels and report.json.
        slices: How weights of a plain model become slices.
        inductor: Options handed to Inductor.
    """

    budget: float | None = None
    checkpoint: str | None = None
    strict: bool = False
    activation: str | None = None
    prefill: str | None = None
    passes: tuple[str, ...] | None = None
    dump: str | None = None
    slices: SliceConfig = field(default_factory=SliceConfig)
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.slices, Mapping):
            object.__setattr__(self, "slices", SliceConfig.from_dict(self.slices, where="options['slices']"))
        if isinstance(self.passes, str):
            object.__setattr__(self, "passes", (self.passes,))
        elif isinstance(self.passes, Sequence):
            object.__setattr__(self, "passes", tuple(self.passes))
        paths = (self.checkpoint, self.dump)
        checks = (
            ("budget", self.budget is None or (is_number(self.budget) and self.budget > 0), "a number of bits above 0"),
            ("strict", isinstance(self.strict, bool), "True or False"),
            ("activation", self.activation is None or self.activation in tuple(Activation), Activation.wanted()),
            ("prefill", self.prefill is None or self.prefill in tuple(Prefill), Prefill.wanted()),
            ("slices", isinstance(self.slices, SliceConfig), "a SliceConfig or its fields"),
            ("passes", self.passes is None or _are_names(self.passes), "names of passes"),
            ("inductor", isinstance(self.inductor, Mapping), "a dict of Inductor options"),
            ("checkpoint", paths[0] is None or isinstance(paths[0], str | os.PathLike), "a directory"),
            ("dump", paths[1] is None or isinstance(paths[1], str | os.PathLike), "a directory"),
        )
        for name, legal, wanted in checks:
            if not legal:
                raise BadOption(where="backend 'mobiquant'", name=name, got=getattr(self, name), wanted=wanted)
        if self.checkpoint is not None and not Path(self.checkpoint).is_dir():
            wanted = "an existing directory"
            raise BadOption(where="backend 'mobiquant'", name="checkpoint", got=str(self.checkpoint), wanted=wanted)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> CompileConfig:
        """Build from torch.compile's `options`, over what the environment says.

        Raises:
            UnknownOption: a key that is no field, by name.
            BadOption: a value of the wrong kind.
        """
        options = dict(options or {})
        check_keys(options, cls, "backend 'mobiquant'")
        return replace(cls.from_env(), **options)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> CompileConfig:
        """Read MOBIQUANT_DUMP (a directory), MOBIQUANT_PASSES (names, comma-separated) and MOBIQUANT_STRICT (0/1)."""
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        if dump := environ.get(ENV_PREFIX + "DUMP"):
            values["dump"] = dump
        if passes := environ.get(ENV_PREFIX + "PASSES"):
            values["passes"] = passes
        if strict := environ.get(ENV_PREFIX + "STRICT"):
            if strict not in ("0", "1"):
                raise BadOption(where="environment", name=ENV_PREFIX + "STRICT", got=strict, wanted="0 or 1")
            values["strict"] = strict == "1"
        return cls(**values)


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """Settings of the process, read once from the environment.

    Attributes:
        cache_dir: Where emitted kernels are kept (MOBIQUANT_CACHE).
        log: Level of the package's logger (MOBIQUANT_LOG), None to leave logging alone.
    """

    cache_dir: Path
    log: str | None = None

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> RuntimeConfig:
        """Read MOBIQUANT_CACHE and MOBIQUANT_LOG."""
        environ = os.environ if environ is None else environ
        base = environ.get(ENV_PREFIX + "CACHE")
        default = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mobiquant"
        return cls(Path(base) if base else default, environ.get(ENV_PREFIX + "LOG"))


def environment_with(**changes: str) -> dict[str, str]:
    """Return the environment for a child process: that of this one with `changes`, values by name."""
    return {**os.environ, **changes}


def is_number(value: object) -> bool:
    """Say whether a value is a real number, NumPy's included; booleans are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _are_names(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) for name in value)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Say whether `name` matches any of the `fnmatch` patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_keys(values: Mapping[str, Any], cls: type, where: str) -> None:
    """Refuse keys that are not fields of the dataclass `cls`.

    Raises:
        UnknownOption: names the first unknown key and the known ones.
    """
    known = [f.name for f in fields(cls)]
    for name in values:
        if name not in known:
            raise UnknownOption(where=where, name=name, known=", ".join(known))
