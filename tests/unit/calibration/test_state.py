"""The state of a calibration on disk: whole or absent, and only ever of one calibration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mobiquant_compiler.calibration.state import IDENTITY, CalibrationState
from mobiquant_compiler.errors import CalibrationStateCorrupt, CalibrationStateMismatch

WHO = {"model": "abc", "config": {"seed": 0, "widths": (2, 2)}}


def test_steps_are_found_again(tmp_path: Path) -> None:
    state = CalibrationState(tmp_path / "new" / "state", WHO)
    assert state.load("block-0000") is None
    state.save("block-0000", {"a": torch.arange(6).view(2, 3).t(), "b": torch.tensor(1.5, dtype=torch.float64)})
    found = CalibrationState(tmp_path / "new" / "state", WHO).load("block-0000")
    assert found is not None
    assert torch.equal(found["a"], torch.arange(6).view(2, 3).t())
    assert found["b"].item() == 1.5
    assert sorted(p.name for p in (tmp_path / "new" / "state").iterdir()) == ["block-0000.safetensors", IDENTITY]


def test_without_a_directory_nothing_is_kept() -> None:
    state = CalibrationState(None, WHO)
    state.save("block-0000", {"a": torch.ones(1)})
    assert state.load("block-0000") is None


def test_an_interrupted_write_leaves_the_step_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = CalibrationState(tmp_path, WHO)
    state.save("tuning", {"step": torch.tensor(1)})

    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            state.save("tuning", {"step": torch.tensor(2)})
    found = CalibrationState(tmp_path, WHO).load("tuning")
    assert found is not None
    assert int(found["step"]) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "xyz"}, "a run with another model; got abc, wanted xyz"),
        ({"config": {"seed": 1, "widths": (2, 2)}}, "another config seed; got 0, wanted 1"),
        ({"config": {"seed": 0, "widths": (4, 4)}}, r"another config widths; got \[2, 2\], wanted \[4, 4\]"),
        ({"config": {"seed": 0}}, "another config; got"),
    ],
)
def test_another_calibration_is_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    CalibrationState(tmp_path, WHO)
    with pytest.raises(CalibrationStateMismatch, match=words):
        CalibrationState(tmp_path, WHO | change)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(CalibrationStateMismatch, match=r"files of another kind; got thesis\.tex"):
        CalibrationState(tmp_path, WHO)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    state = CalibrationState(tmp_path, WHO)
    (tmp_path / "block-0001.safetensors").write_bytes(b"short")
    with pytest.raises(CalibrationStateCorrupt, match=r"block-0001\.safetensors: cannot be read"):
        state.load("block-0001")
    (tmp_path / IDENTITY).write_text(json.dumps(WHO)[:-3])
    with pytest.raises(CalibrationStateCorrupt, match=r"calibration\.json: cannot be read"):
        CalibrationState(tmp_path, WHO)
