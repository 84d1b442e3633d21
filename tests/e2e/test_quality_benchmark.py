"""`bench_quality --calibrate`: every method a row, side by side as one after another."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import quality_jobs

from tests.model_dirs import save_plain

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("trained-input", "static", "uniform", "rtn", "gptq")


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, texts under the names that the benchmark knows, and a place for results."""
    directory = tmp_path_factory.mktemp("quality")
    save_plain(directory / "model")
    draw = random.Random(0)
    for name in ("wikitext2/wiki.test.raw", "ptb/ptb.test.txt", "wikitext2/wiki.train.head.txt"):
        path = directory / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join("".join(draw.choices("etaoinsh", k=4)) for _ in range(1200)) + "\n", encoding="utf-8")
    return directory


def measured(where: Path, *options: str, out: Path | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what it wrote."""
    out = out or where / f"{len(list(where.iterdir()))}.json"
    fixed = ["--model", str(where / "model"), "--data", str(where / "data"), "--device", "cpu", "--eager"]
    short = ["--windows", "1", "--calibration-windows", "2", "--steps", "2", "--group", "32", "--budgets", "4", "2"]
    command = [sys.executable, str(ROOT / "benchmarks/bench_quality.py"), *fixed, *short, "--calibrate", *options]
    subprocess.run([*command, "--out", str(out)], check=True, timeout=500)
    return dict(json.loads(out.read_text(encoding="utf-8")))


@pytest.mark.slow
def test_side_by_side_as_one_after_another(where: Path) -> None:
    options = ("--texts", "wikitext2", "ptb", "--methods", *METHODS, "--static-bits", "4", "--follow")
    first = where / "first.json"
    one = measured(where, "--state", str(where / "state-a"), *options, out=first)
    two = measured(where, "--state", str(where / "state-b"), *options, "--jobs", "3")
    for found in (one, two):
        assert set(found["made"]) == {row["method"] for row in found["rows"]} - {"unquantized"}
        assert found["made"]["calibrated slices, trained router per input"]["steps_that_the_state_held"] == 0
    rows = [{(r["text"], r["method"], r["budget"]): r for r in found["rows"]} for found in (one, two)]
    assert len(rows[0]) == 2 * (1 + 2 + 2 + 2 + 1 + 1)
    assert rows[0] == rows[1]
    told = {row["method"]: row.get("followed") for row in one["rows"]}
    assert told.pop("calibrated slices, trained router per input") is True
    ours = [name for name in told if name.startswith("calibrated slices")]
    assert [told.pop(name) for name in ours] == [False, False], "fixed counts have nothing to follow"
    assert set(told.values()) == {None}
    again = (*options, "--methods", "rtn", "--no-unquantized", "--jobs", "2", "--keep")
    kept = measured(where, "--state", str(where / "state-a"), *again, out=first)
    assert {(r["text"], r["method"], r["budget"]): r for r in kept["rows"]} == rows[0], "what was there stays"
    assert kept["made"].keys() == one["made"].keys()


def test_a_method_that_fails_is_named_and_the_others_are_joined() -> None:
    program = "import json, sys; a = sys.argv[1:]; m, o = a[-3], a[-1]; m == 'hqq' and sys.exit(3); "
    program += "json.dump({'rows': [m]}, open(o, 'w'))"
    joined: list[Any] = []
    with pytest.raises(SystemExit, match="hqq failed"):
        quality_jobs.run(["rtn", "hqq", "gptq"], 2, ["-c", program], joined.append)
    assert joined[-1] == [{"rows": ["rtn"]}, {"rows": ["gptq"]}]
