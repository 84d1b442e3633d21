"""benchmarks/bench_migration.py on a tiny model, and the figure that scripts/plot_migration.py draws from its file."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import bench_migration
import bench_migration_methods
import pytest
import torch

from tests.model_dirs import save_plain

ROOT = Path(__file__).resolve().parent.parent.parent


def plot_script(name: str = "plot_migration") -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("router", ["energy", "trained"])
def test_measures_and_draws(
    router: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    text = "Some plain words, and more of them. " * 40
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "wiki.test.raw").write_text(text + "\n")
    (tmp_path / "wikitext2" / "wiki.train.head.txt").write_text(text.upper())
    model, out = save_plain(tmp_path / "model"), tmp_path / "r.json"
    arguments = [
        "--model",
        model,
        "--data",
        tmp_path,
        "--texts",
        "wikitext2",
        "--windows",
        1,
        "--calibration-windows",
        1,
        *(("--state", tmp_path / "state") if router == "trained" else ()),
    ]
    monkeypatch.setattr(sys, "argv", ["bench_migration.py", *map(str, arguments), "--device", "cpu", "--out", str(out)])
    bench_migration.main()
    result = json.loads(out.read_text(encoding="utf-8"))
    assert f"{router} router" in result["calibration"]
    assert len(result["rows"]) == 2 * len(bench_migration.PAIRS)
    assert [row["method"] for row in result["rows"][:2]] == ["one count a linear", "routing"]

    plot = plot_script()
    found = plot.migration(result["tokens"])
    assert len(found.low[0].tokens) == 512
    for row, measured in zip(found.summary(), result["rows"][:2], strict=True):
        assert row["overlap"] == pytest.approx(measured["overlap"], abs=0.05)  # errors are kept to three digits
        assert row["high_mean_error"] == pytest.approx(measured["high_mean_error"], rel=1e-2)
    picture = tmp_path / "images" / "a.png"
    assert plot.main(["--results", str(out), "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert plot.main(["--results", str(tmp_path / "none.json")]) == 2
    assert "measure first: benchmarks/bench_migration.py" in capsys.readouterr().err


def test_methods_are_measured_against_the_unquantized_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    text = "Some plain words, and more of them. " * 40
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "wiki.test.raw").write_text(text + "\n")
    (tmp_path / "wikitext2" / "wiki.train.head.txt").write_text(text.upper())
    given = ["--model", save_plain(tmp_path / "model"), "--data", tmp_path, "--texts", "wikitext2", "--windows", 1]
    given += ["--calibration-windows", 1, "--device", "cpu", "--out", tmp_path / "r.json"]
    monkeypatch.setattr(sys, "argv", ["bench_migration_methods.py", *map(str, given)])
    bench_migration_methods.main()
    result = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    methods = ["gptq", "rtn", "one count a linear", "routing"]
    wanted = [(*pair, method) for pair in bench_migration_methods.PAIRS for method in methods]
    assert [(row["low_bits"], row["high_bits"], row["method"]) for row in result["rows"]] == wanted
    for row in result["rows"]:
        assert row["low_mean_error"] > row["high_mean_error"] > 0, "more bits, less error"
        assert 0 <= row["overlap"] <= 1

    plot = plot_script("plot_migration_methods")
    assert set(plot.METHODS) == set(methods), "a bar each"
    assert plot.heights(result, (2, 3), "gptq", "overlap") == {"wikitext2": result["rows"][0]["overlap"]}
    pictures = [tmp_path / "images" / name for name in ("a.svg", "b.svg")]
    for picture in pictures:
        assert plot.main(["--results", str(tmp_path / "r.json"), "--out", str(picture)]) == 0
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert plot.main(["--results", str(tmp_path / "none.json")]) == 2
    assert "measure first: benchmarks/bench_migration_methods.py" in capsys.readouterr().err


def test_rows_compare_sets_and_one_scale() -> None:
    """Ten tokens: by the first method the worst stays, by the second another one is the worst, below the first's."""
    stays, moves = torch.arange(10.0), torch.arange(10.0) / 100
    errors = {("t", "a", bits): stays for bits in (2, 3, 4)}
    errors |= {("t", "b", bits): moves.roll(bits) for bits in (2, 3, 4)}
    rows = bench_migration_methods.rows_of(errors, ["t"], ["a", "b"], "a")
    found = [(row["method"], row["overlap"], row["migrated_share"] > 0, row["migrated_tokens"]) for row in rows[:2]]
    assert found == [("a", 1.0, False, 0.0), ("b", 0.0, True, 0.0)]
