"""Comparing two trees and profiling a kernel, without a GPU: what is asked, and what comes of the answers."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import compare_linear
import profile_linear
import pytest
from profile_linear import NoProfile

STUB = """
from types import SimpleNamespace
Case = lambda slices, counts: SimpleNamespace(slices=slices, counts=counts)
Weights = lambda n, k, layout, device: (n, k)
measure_case = lambda weights, case, x: SimpleNamespace(alone=SimpleNamespace(median_us={}))
"""
STALLS = '"stall_long_sb","stall_wait","stall_long_sb (Not Issued)"'
PAGE = f""""Kernel Name","sliced_mma",
"Address","Source","Warp Stall Sampling (All Samples)","Instructions Executed",{STALLS}
"0x10","  LDG R1, [R2]","1","8","0","1","0"
"0x20","  IMMA R4, R1, R3","6","8","5","1","4"
"0x30","  EXIT","1","8","","1","0"
"""
DETAILS = """    Duration                         us        68.77
    L1/TEX Hit Rate                   %        65.18
    DRAM Throughput                   %    no number
    Static Shared Memory Per Block       byte/block               0
"""


def tree(path: Path, code: str) -> Path:
    """Make a checkout whose benchmark code is a stand-in."""
    (path / "benchmarks").mkdir(parents=True)
    (path / "benchmarks" / "linear_ours.py").write_text(code, encoding="utf-8")
    return path


def rows(*times: float) -> list[dict]:
    """Return what a tree measured in a round."""
    return [{"n": 1, "k": 2, "tokens": 8, "slices": number, "time_us": us} for number, us in enumerate(times)]


@pytest.mark.parametrize("text", ["8", "8:5", "0:2", "8:2:full", "8:2:mixed:x", "1024:2:mixed", "x:1", ""])
def test_what_is_no_case(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tree(tmp_path / "other", "")
    with pytest.raises(SystemExit):
        compare_linear.arguments([str(other), "--cases", text])
    assert "is no case; wanted tokens:slices" in capsys.readouterr().err


def test_what_is_no_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare_linear.arguments([str(tmp_path)])
    assert "is no checkout" in capsys.readouterr().err


def test_medians_of_rounds_are_compared() -> None:
    before, between = [rows(10, 6), rows(12, 6), rows(10, 6)], [rows(20, 6)] * 3
    after = [rows(5, 6), rows(5, 9), rows(4, 6)]
    first, second = compare_linear.compared([("before", before), ("between", between), ("after", after)])
    assert first["times_us"] == {"before": 10, "between": 20, "after": 5}
    assert first["faster"] == {"before": 2, "between": 4, "after": 1}
    assert (first["spread"], second["spread"]) == (1.25, 1.5), "the slowest round over the fastest of a tree"
    assert set(second["faster"].values()) == {1}
    assert "time_us" not in first


def test_trees_are_measured_in_turn_once_all_are_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    one, two = (tree(tmp_path / name, "") for name in ("one", "two"))
    trees = [one, two, compare_linear.HERE]

    def measured_by(where: list[Path], given: list[str]) -> list[list[dict]]:
        asked.append((where, given))
        times = (trees.index(tree) + 1.0 for tree in where)
        return [[{"n": 4, "k": 2, "tokens": 8, "slices": 2, "counts": "mixed", "time_us": us}] for us in times]

    monkeypatch.setattr(compare_linear, "measured_by", measured_by)
    options = ["--device", "cpu", "--shapes", "4x2", "--cases", "8:2:mixed", "1:1:uniform"]
    given = [*options[:-1], "1:1", "--rounds", "2", "--json"]
    assert compare_linear.main([f"{one}/", str(two), *given]) == 0
    assert asked == [(where, options) for where in (trees, *([tree] for tree in trees * 2))]
    here = compare_linear.HERE.name
    assert json.loads(capsys.readouterr().out)[0]["times_us"] == {"one": 1, "two": 2, here: 3}
    assert compare_linear.main([str(one)]) == 0
    assert "0.333" in capsys.readouterr().out, "times as fast as the first"


def test_trees_of_one_name_are_told_apart(tmp_path: Path) -> None:
    trees = [tmp_path / "a" / "main", tmp_path / "b" / "main"]
    assert compare_linear.names_of(trees) == [str(path) for path in trees]
    assert compare_linear.names_of([*trees, trees[0]])[2] == f"{trees[0]} (2)"
    assert compare_linear.names_of([trees[0]] * 3) == ["main", "main (2)", "main (3)"]


def test_trees_measure_themselves_by_their_own_code_at_the_same_time(tmp_path: Path) -> None:
    """Each waits until the other has begun."""
    meet = f"""
import time
from pathlib import Path
own = Path(__file__).parent.parent.name
Path({str(tmp_path)!r}, own).with_suffix(".begun").touch()
for _ in range(600):
    if len(list(Path({str(tmp_path)!r}).glob("*.begun"))) == 2:
        break
    time.sleep(0.1)
else:
    raise RuntimeError("alone")
"""
    trees = [tree(tmp_path / str(us), meet + STUB.format(us)) for us in (7, 8)]
    found = compare_linear.measured_by(trees, ["--shapes", "4x2", "--device", "cpu"])
    assert [[row["time_us"] for row in rows] for rows in found] == [[7] * 3, [8] * 3]
    assert found[0][1] == {"n": 4, "k": 2, "tokens": 8, "slices": 2, "counts": "mixed", "time_us": 7}


def test_trees_that_fail_together_are_tried_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured_by(where: list[Path], given: list[str]) -> list[list[dict]]:
        if len(where) > 1:
            raise compare_linear.TreeFailed("out of memory")
        return [[{"n": 4, "k": 2, "tokens": 8, "slices": 2, "counts": "mixed", "time_us": 3.0}]]

    monkeypatch.setattr(compare_linear, "measured_by", measured_by)
    assert compare_linear.main([str(tree(tmp_path / "other", "")), "--shapes", "4x2"]) == 0
    said = capsys.readouterr()
    assert "out of memory" in said.err
    assert "3.00" in said.out


def test_a_tree_that_fails_is_named_with_what_it_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tree(tmp_path / "other", "raise RuntimeError('no such kernel')")
    assert compare_linear.main([str(other), "--shapes", "4x2", "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert str(other) in said
    assert "no such kernel" in said


def test_samples_become_shares_of_all_of_them() -> None:
    stalls, instructions = profile_linear.stalls_of(PAGE)
    assert stalls == {"long_sb": 0.625, "wait": 0.375}
    assert instructions[1] == {
        "number": 1,
        "instruction": "IMMA R4, R1, R3",
        "executed": "8",
        "samples": 0.75,
        "stalls": {"long_sb": 0.625, "wait": 0.125},
    }
    text = profile_linear.text_of({}, stalls, instructions, 1)
    assert "IMMA" in text
    assert "LDG" not in text


def test_figures_are_those_of_the_details_page() -> None:
    assert profile_linear.facts_of(DETAILS) == {"Duration": "68.77 us", "L1/TEX Hit Rate": "65.18 %"}


def test_a_page_without_samples() -> None:
    for page in ("", PAGE.replace('"6"', '"0"').replace('"1"', '"0"'), "==ERROR== no permission"):
        with pytest.raises(NoProfile, match="no samples"):
            profile_linear.stalls_of(page)


def test_a_machine_without_ncu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "")
    assert profile_linear.main(["4096x4096", "8:2"]) == 1
    assert "ncu is not on the PATH" in capsys.readouterr().err


@pytest.mark.parametrize("works", [True, False])
def test_one_launch_of_the_kernel_is_profiled(
    works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("page", PAGE), ("details", DETAILS)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    report = tmp_path / "kept"
    code = f"""#!/bin/sh
echo "$@" >> {tmp_path}/asked
case "$*" in
  *"--page source"*) cat {tmp_path}/page;;
  *"--page details"*) cat {tmp_path}/details;;
  *) {f"touch {report}.ncu-rep" if works else "echo no kernels were profiled"};;
esac
"""
    ncu = tmp_path / "ncu"
    ncu.write_text(code, encoding="utf-8")
    ncu.chmod(ncu.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    given = ["64x32", "8:2:mixed", "--kernel", "sliced_mma", "--report", str(report)]
    assert profile_linear.main([*given, "--json"]) == (0 if works else 1)
    asked = (tmp_path / "asked").read_text(encoding="utf-8").splitlines()
    assert "-k regex:sliced_mma --launch-skip 2 -c 1" in asked[0]
    assert asked[0].endswith("64x32 8:2:mixed --run")
    said = capsys.readouterr()
    if works:
        assert json.loads(said.out)["facts"]["Duration"] == "68.77 us"
    else:
        assert "no kernels were profiled" in said.err
