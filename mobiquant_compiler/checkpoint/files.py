"""The files of a checkpoint: what config.json says of it, and its safetensors shards.

Nothing here trusts the files: each number, name, shape and dtype is checked before data is read, and every message
names the file. `checkpoint` turns what is read into modules.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mobiquant_compiler.errors import (
    BadSliceSpec,
    CheckpointCorrupt,
    CheckpointForeign,
    CheckpointMissing,
    CheckpointTensor,
    CheckpointTooNew,
)
from mobiquant_compiler.linear import SCORE_TENSORS
from mobiquant_compiler.reference import SCORES
from mobiquant_compiler.spec import Layout, SliceSpec

METHOD = "mobiquant"
FORMAT_VERSION = 2
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 4 << 30
TABLE_KEYS = ("anchors", "quantiles")
FLOATS = ("float64", "float32", "bfloat16", "float16")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")


def table_prefix(number: int) -> str:
    """Return the prefix of the tensors of a budget table."""
    return f"mobiquant.table.{number}"


@dataclass(frozen=True, slots=True)
class LinearFacts:
    """One elastic linear as config.json describes it.

    Attributes:
        in_features: K.
        out_features: N.
        widths: Bits of each slice.
        group: Columns per scale.
        layout: "slice_major" or "bit_major".
        scale_dtype: Dtype of scale and zero point.
        dtype: Dtype of the weight it was made from.
        bias: Dtype of the bias, None without one.
        fingerprint: Hash of the weight it was made from (`quantize.fingerprint`), None where it is not known.
    """

    in_features: int
    out_features: int
    widths: tuple[int, ...]
    group: int
    layout: str
    scale_dtype: str
    dtype: str
    bias: str | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        for name in ("in_features", "out_features"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, not a number above 0")
        for name in ("scale_dtype", "dtype", "bias"):
            value = getattr(self, name)
            if value not in FLOATS and not (name == "bias" and value is None):
                raise ValueError(f"{name} is {value!r}, not one of {FLOATS}")
        _ = self.spec

    @property
    def spec(self) -> SliceSpec:
        """The slice spec of the linear."""
        return SliceSpec(self.widths, self.group, Layout(self.layout))


@dataclass(frozen=True, slots=True)
class RouterFacts:
    """One router: its score function, its limits, and the linears that share it; the first names its tensors.

    `measured` says that its gain is stored; otherwise it follows from the widths (as in all files of format 1).
    """

    linears: tuple[str, ...]
    kind: str = "energy"
    floor: int = 1
    ceiling: int = 1
    measured: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "linears", tuple(self.linears))
        if not self.linears or self.kind not in SCORES or (self.kind == "mlp" and not self.measured):
            raise ValueError(f"a router of kind {self.kind!r} with {len(self.linears)} linears")
        if not (isinstance(self.floor, int) and isinstance(self.ceiling, int) and 1 <= self.floor <= self.ceiling):
            raise ValueError(f"router floor {self.floor!r} and ceiling {self.ceiling!r}")

    @property
    def prefix(self) -> str:
        """Prefix of the router's tensors."""
        return f"{self.linears[0]}.router"

    @property
    def keys(self) -> tuple[str, ...]:
        """Last parts of the names of its tensors; thresholds follow from the budget."""
        return SCORE_TENSORS[self.kind] if self.measured else ("energy",)


@dataclass(frozen=True, slots=True)
class StateFacts:
    """Routers that share one budget, in the order of the budget table's rows."""

    budget: float
    table: str
    routers: tuple[RouterFacts, ...]

    def __post_init__(self) -> None:
        if self.table not in ("static", "calibrated"):
            raise ValueError(f"budget table {self.table!r}, not 'static' or 'calibrated'")
        if not isinstance(self.budget, int | float) or isinstance(self.budget, bool):
            raise ValueError(f"budget {self.budget!r}, not a number")


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that config.json says beside the model's own configuration.

    Attributes:
        linears: Facts by name.
        states: Budget states with their routers.
        tied: Parameter names that are another name of a stored tensor.
        model: The model's own configuration, without ours.
    """

    linears: Mapping[str, LinearFacts]
    states: tuple[StateFacts, ...]
    tied: Mapping[str, str] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)

    def elastic_names(self) -> set[str]:
        """Return the names of the tensors that elastic linears, routers and budget tables are stored in."""
        names = {f"{name}.{key}" for name in self.linears for key in ("slices", "scale", "zero")}
        names |= {f"{name}.bias" for name, facts in self.linears.items() if facts.bias is not None}
        names |= {f"{router.prefix}.{key}" for state in self.states for router in state.routers for key in router.keys}
        calibrated = [i for i, state in enumerate(self.states) if state.table == "calibrated"]
        return names | {f"{table_prefix(i)}.{key}" for i in calibrated for key in TABLE_KEYS}

    def to_json(self) -> dict[str, Any]:
        """Return config.json: the model's configuration with ours in `quantization_config`."""
        facts = asdict(self)
        facts.pop("model")
        return {
            **self.model,
            "quantization_config": {"quant_method": METHOD, "format_version": FORMAT_VERSION, **facts},
        }


def is_checkpoint(directory: Path) -> bool:
    """Say whether a directory holds a checkpoint of ours, sound or not."""
    try:
        values = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        return values["quantization_config"]["quant_method"] == METHOD
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointMissing: no such file.
        CheckpointCorrupt: not a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointMissing(path=path.parent, what=path.name) from None
    except (OSError, ValueError) as err:
        raise CheckpointCorrupt(path=path.parent, what=path.name, reason=err) from err
    if not isinstance(values, dict):
        raise CheckpointCorrupt(path=path.parent, what=path.name, reason="it is not a JSON object")
    return values


def read_manifest(directory: Path) -> Manifest:
    """Read and check config.json.

    Raises:
        CheckpointError: missing, unreadable, foreign, or of a newer format.
    """
    config = read_json(directory / CONFIG)
    ours = config.pop("quantization_config", None)
    if not isinstance(ours, dict) or ours.get("quant_method") != METHOD:
        got = ours.get("quant_method") if isinstance(ours, dict) else None
        raise CheckpointForeign(path=directory / CONFIG, got=got)
    version = ours.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointTooNew(path=directory / CONFIG, got=version, wanted=f"up to {FORMAT_VERSION}")
    try:
        if version not in range(1, FORMAT_VERSION + 1) or isinstance(version, bool):
            raise ValueError(f"format_version is {version!r}")
        manifest = _parse(ours, config)
    except (KeyError, TypeError, ValueError, AttributeError, BadSliceSpec) as err:
        raise CheckpointCorrupt(path=directory, what=CONFIG, reason=f"{type(err).__name__}: {err}") from err
    return manifest


def _parse(ours: Mapping[str, Any], config: dict[str, Any]) -> Manifest:
    linears = {name: LinearFacts(**facts) for name, facts in ours["linears"].items()}
    states = tuple(
        StateFacts(s["budget"], s["table"], tuple(RouterFacts(**r) for r in s["routers"])) for s in ours["states"]
    )
    routed = [name for state in states for router in state.routers for name in router.linears]
    if sorted(routed) != sorted(linears):
        raise ValueError("its routers and its linears do not name the same layers")
    for state in states:
        _check_routers(state, linears)
    return Manifest(linears, states, dict(ours.get("tied", {})), config)


def _check_routers(state: StateFacts, linears: Mapping[str, LinearFacts]) -> None:
    """Linears of one router read one input with one set of slices, and one table needs one number of slices."""
    for router in state.routers:
        members = {(linears[name].in_features, linears[name].widths) for name in router.linears}
        if len(members) > 1:
            raise ValueError(f"the linears of router {router.prefix} differ in inputs or slices")
        if router.ceiling > len(linears[router.linears[0]].widths):
            raise ValueError(f"router {router.prefix} has ceiling {router.ceiling}, above its number of slices")
    if len({len(linears[r.linears[0]].widths) for r in state.routers}) > 1:
        raise ValueError("routers of one budget differ in their number of slices")


class Shards:
    """The tensors of a checkpoint, read one at a time straight from the mapped files."""

    def __init__(self, directory: Path, device: torch.device | str = "cpu") -> None:
        self.directory, self.device = directory, str(device)
        self._handles: dict[str, Any] = {}
        self.files = self._index()

    def _index(self) -> dict[str, str]:
        """Return the file of each tensor; every shard is opened, so that a damaged one is found at once."""
        if not (self.directory / INDEX).exists():
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        wanted = read_json(self.directory / INDEX).get("weight_map")
        if not isinstance(wanted, dict):
            raise CheckpointCorrupt(path=self.directory, what=INDEX, reason="it has no weight_map")
        held = {file: set(self._open(file).keys()) for file in sorted(set(wanted.values()))}
        for name, file in wanted.items():
            if name not in held[file]:
                raise CheckpointMissing(path=self.directory / file, what=f"tensor {name}")
        return wanted

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            path = self.directory / file
            if Path(file).name != file or not path.is_file():
                raise CheckpointMissing(path=self.directory, what=f"shard {file}")
            try:
                self._handles[file] = safe_open(path, framework="pt", device=self.device)
            except (SafetensorError, OSError) as err:
                raise CheckpointCorrupt(path=self.directory, what=file, reason=err) from err
        return self._handles[file]

    def path(self, name: str) -> Path:
        """Return the file that holds a tensor.

        Raises:
            CheckpointMissing: none does.
        """
        if name not in self.files:
            raise CheckpointMissing(path=self.directory, what=f"tensor {name}")
        return self.directory / self.files[name]

    def facts(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and dtype of a tensor without reading it."""
        path = self.path(name)
        view = self._open(path.name).get_slice(name)
        dtype = _DTYPES.get(view.get_dtype())
        if dtype is None:
            wanted = f"one of {sorted(_DTYPES)}"
            raise CheckpointTensor(path=path, tensor=name, name="dtype", got=view.get_dtype(), wanted=wanted)
        return tuple(view.get_shape()), dtype

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor on the device.

        Args:
            name: Its name.
            shape: Its shape; -1 matches any size.
            dtype: Its dtype; None takes any floating-point one.

        Raises:
            CheckpointMissing: there is none of that name.
            CheckpointTensor: it has another shape or dtype.
        """
        got_shape, got_dtype = self.facts(name)
        path = self.path(name)
        if len(got_shape) != len(shape) or any(w not in (-1, g) for g, w in zip(got_shape, shape, strict=True)):
            raise CheckpointTensor(path=path, tensor=name, name="shape", got=got_shape, wanted=shape)
        if dtype is None and not got_dtype.is_floating_point:
            raise CheckpointTensor(path=path, tensor=name, name="dtype", got=got_dtype, wanted="a floating-point one")
        if dtype is not None and got_dtype != dtype:
            raise CheckpointTensor(path=path, tensor=name, name="dtype", got=got_dtype, wanted=dtype)
        try:
            return self._open(path.name).get_tensor(name)
        except (SafetensorError, OSError) as err:
            raise CheckpointCorrupt(path=self.directory, what=path.name, reason=err) from err


def write_shards(tensors: Mapping[str, Tensor], directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as model.safetensors, or as shards of at most `shard_bytes` with an index."""
    parts = list(_split(tensors, shard_bytes))
    names = (
        [SINGLE] if len(parts) == 1 else [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    )
    for file, part in zip(names, parts, strict=True):
        save_file(_own_storage({name: tensors[name] for name in part}), directory / file, {"format": "pt"})
    if len(parts) == 1:
        return
    weight_map = {name: file for file, part in zip(names, parts, strict=True) for name in part}
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _own_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the host, each with storage of its own: parts of one storage cannot be stored."""
    seen: set[int] = set()
    host = {}
    for name, tensor in tensors.items():
        part = tensor.detach().cpu().contiguous()
        storage = part.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != part.nbytes:
            part = part.clone()
        seen.add(storage.data_ptr())
        host[name] = part
    return host


def _split(tensors: Mapping[str, Tensor], shard_bytes: int) -> Iterator[list[str]]:
    """Yield names by shard, in order, each shard within the limit unless one tensor alone exceeds it."""
    part: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        bytes_ = tensor.numel() * tensor.element_size()
        if part and size + bytes_ > shard_bytes:
            yield part
            part, size = [], 0
        part.append(name)
        size += bytes_
    yield part


def check_finite(shards: Shards, name: str, tensor: Tensor, least: float = -torch.inf) -> None:
    """Refuse values of a tensor that are not finite, or below `least`.

    Raises:
        CheckpointTensor: names the file, the tensor and the first wrong value.
    """
    wrong = ~torch.isfinite(tensor) | (tensor < least)
    if bool(wrong.any()):
        wanted = "finite ones" if least == -torch.inf else f"finite ones, at least {least:g}"
        got = f"{int(wrong.sum())} wrong ones, the first {float(tensor[wrong][0])}"
        raise CheckpointTensor(path=shards.path(name), tensor=name, name="values", got=got, wanted=wanted)
