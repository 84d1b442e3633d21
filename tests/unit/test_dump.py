"""Dumps: a folder a graph, a text and a diff a pass, a report that is plain data."""

from __future__ import annotations

import json

import torch

from mobiquant_compiler.backend import REPORTS, dry_run
from mobiquant_compiler.passes import DEFAULT_PIPELINE
from tests.models_tiny import tiny_lm, tokens


def test_dry_run_reports_every_graph_without_compiling():
    before = len(REPORTS)
    (report,) = dry_run(tiny_lm(1), tokens(1, 8))
    assert len(REPORTS) == before + 1
    assert len(report.coverage.rewritten) == 7
    assert [skip.name for skip in report.coverage.skipped] == ["lm_head"]
    assert [p.name for p in report.passes] == list(DEFAULT_PIPELINE)
    assert report.nodes_before["linear"] == 8
    assert report.nodes_after["linear"] == 1
    assert report.nodes_after["mobiquant.elastic_linear"] == 7
    assert report.dump is None


def test_dumps_hold_texts_diffs_and_a_report(tmp_path):
    (report,) = dry_run(tiny_lm(1), tokens(1, 8), options={"dump": str(tmp_path)})
    folder = tmp_path / report.graph
    assert report.dump == str(folder)
    names = {f.name for f in folder.iterdir()}
    steps = [f"{number:02d}-{name}" for number, name in enumerate(["input", *DEFAULT_PIPELINE])]
    assert names == {f"{s}.fx" for s in steps} | {f"{s}.diff" for s in steps[1:]} | {"report.json"}
    diff = (folder / "02-bind-slices.diff").read_text()
    assert diff.startswith("--- before\n+++ after bind-slices\n")
    assert "+%mq_mask: int32[65537] = input" in diff
    assert (folder / "01-normalise-linears.diff").read_text() == ""
    data = json.loads((folder / "report.json").read_text())
    assert data["graph"] == report.graph
    assert data["torch"] == torch.__version__
    assert data["coverage"]["skipped"][0]["reason"] == "excluded by name"
    assert data["passes"][1]["rewritten"] == 7


def test_a_failing_pass_leaves_the_graphs_before_it(tmp_path):
    import pytest

    from mobiquant_compiler.errors import NonFiniteWeight

    model = tiny_lm(1)
    with torch.no_grad():
        model.layers[0].q_proj.weight[0, 0] = torch.nan
    with pytest.raises(Exception, match=r"layers\.0\.q_proj: weight has 1 non-finite") as caught:
        dry_run(model, tokens(1, 8), options={"dump": str(tmp_path)})
    assert isinstance(caught.value.inner_exception, NonFiniteWeight)
    assert list(tmp_path.glob("*/06-fuse-elastic.fx"))
