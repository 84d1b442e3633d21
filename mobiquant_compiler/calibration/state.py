"""The state of a calibration on disk: one file a finished step, each there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mobiquant_compiler.errors import CalibrationStateCorrupt, CalibrationStateMismatch

VERSION = 1
IDENTITY = "calibration.json"


class CalibrationState:
    """Steps that are done, by name; kept nowhere when there is no directory.

    Args:
        directory: Where to keep them: new, empty, or of an earlier run of the same calibration.
        identity: Plain JSON data that a run must share with the one it goes on from.

    Raises:
        CalibrationStateMismatch: the directory belongs to another calibration, or holds something else.
    """

    def __init__(self, directory: str | Path | None, identity: Mapping[str, Any]) -> None:
        self.directory = None if directory is None else Path(directory)
        if self.directory is None:
            return
        wanted = {"version": VERSION, **json.loads(json.dumps(identity))}
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / IDENTITY
        if path.exists():
            _compare(self.directory, self._read(path), wanted)
        elif held := sorted(n for n in os.listdir(self.directory) if not n.endswith(".partial")):
            raise CalibrationStateMismatch(
                path=self.directory, what="files of another kind", got=held[0], wanted="none"
            )
        else:
            temporary = self._temporary(IDENTITY)
            temporary.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
            _publish(temporary, path)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return dict(values)
        except (OSError, ValueError, TypeError) as err:
            raise CalibrationStateCorrupt(path=path, reason=err) from err

    def _temporary(self, name: str) -> Path:
        assert self.directory is not None, "only called with a directory"
        return self.directory / f"{name}.{uuid4().hex[:8]}.partial"

    def has(self, step: str) -> bool:
        """Say whether a step is done."""
        return self.directory is not None and (self.directory / f"{step}.safetensors").exists()

    def load(self, step: str) -> dict[str, Tensor] | None:
        """Return the tensors of a step, None where it is not done.

        Raises:
            CalibrationStateCorrupt: the file cannot be read.
        """
        if self.directory is None or not self.has(step):
            return None
        path = self.directory / f"{step}.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError) as err:
            raise CalibrationStateCorrupt(path=path, reason=err) from err

    def save(self, step: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a step; an interruption leaves the file as it was."""
        if self.directory is None:
            return
        name = f"{step}.safetensors"
        temporary = self._temporary(name)
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, temporary)
        _publish(temporary, self.directory / name)


def _publish(temporary: Path, path: Path) -> None:
    """Put a finished file in place, on disk before it has its name."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _compare(directory: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key, value in wanted.items():
        other = found.get(key)
        if other == value:
            continue
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            parts = ((f"{key} {k}", other.get(k), v) for k, v in value.items() if other.get(k) != v)
            key, other, value = next(parts, (key, other, value))
        raise CalibrationStateMismatch(path=directory, what=f"a run with another {key}", got=other, wanted=value)
