"""Result files: what cannot be written is refused before anything is measured, what is none of ours in one line."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import bench_linear
import bench_migration
import linear_summary
import pytest
import result_files
from result_files import BadResult

from tests import linear_results

ROWS = [{"n": 4, "before_us": 2.0}]  # of a comparison of trees


@pytest.mark.parametrize(
    ("place", "wanted"),
    [
        ("", "is a folder; wanted the name of a file, as {path}/results.json"),
        ("file/linear.json", "{path.parent} cannot be made or written to: File exists; wanted"),
        ("file/deep/linear.json", "{path.parent} cannot be made or written to: Not a directory; wanted"),
        (f"{'x' * 300}.json", "cannot be made or written to: File name too long; wanted"),
        ("device", "is no file that can be replaced; wanted"),
    ],
    ids=["folder", "file", "below-a-file", "long", "device"],
)
@pytest.mark.parametrize(
    "read", [bench_linear.arguments, bench_migration.parser_of("").parse_args], ids=["linear", "migration"]
)
def test_an_output_that_cannot_be_written(
    read: Any, place: str, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "device").symlink_to("/dev/null")
    path = tmp_path / place
    with pytest.raises(SystemExit) as stopped:
        read(["--device", "cpu", "--out", str(path)])
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"error: argument --out: {path}" in said
    assert wanted.format(path=path) in said


def test_an_output_leaves_no_trace_but_its_folder(tmp_path: Path) -> None:
    out = tmp_path / "new" / "linear.json"
    assert bench_linear.arguments(["--device", "cpu", "--out", str(out)]).out == out
    assert list(out.parent.iterdir()) == []
    with pytest.raises(argparse.ArgumentTypeError, match=r"new/a\.svg"):
        result_files.output(str(out.parent), "a.svg")


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (None, "linear.json: No such file or directory; measure first: benchmarks/bench_linear.py"),
        ("{", "linear.json is no JSON (Expecting property name"),
        (b"\xff", "linear.json is no JSON ('utf-8' codec can't decode"),
        ("[]", "linear.json: it holds no facts by name but a list; wanted a result file of benchmarks/bench_linear.py"),
        ('{"rows": [], "device": "a"}', "linear.json: it has no bandwidth; there are rows, device; wanted a result"),
        (json.dumps({"rows": ROWS, "bandwidth": {}}), "rows: not every entry has k, tokens"),
        (json.dumps({"rows": linear_results.rows(), "bandwidth": {}}), "it has no list named prepare"),
        (json.dumps({"rows": [1], "bandwidth": {}}), "it has no list named rows"),
    ],
    ids=["missing", "broken", "binary", "list", "facts", "columns", "prepare", "numbers"],
)
def test_the_summary_of_what_is_no_result_of_the_benchmark(
    content: str | bytes | None, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "linear.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert linear_summary.main([str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(str(path))
    assert wanted in said.err
    assert said.err.count("\n") == 1


def test_the_summary_wants_one_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["linear_summary.py"])
    with pytest.raises(SystemExit) as stopped:
        linear_summary.main()
    assert stopped.value.code == 2
    assert "required: FILE" in capsys.readouterr().err


def test_entries_name_the_columns_there_are() -> None:
    assert result_files.entries({"rows": ROWS}, "rows", ["n"]) == ROWS
    assert result_files.columns_of([{"n": 1}, {"k": 2, "n": 3}]) == ["n", "k"]
    with pytest.raises(BadResult, match=r"rows: not every entry has k; there are n, before_us$"):
        result_files.entries({"rows": ROWS}, "rows", ["n", "k"])
