"""`analyze`, `eval --against` and the warnings of `eval` and `quantize`, as a user meets them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mobiquant_compiler.analysis import figures
from mobiquant_compiler.errors import NotADirectory

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--windows", "2", "--length", "32")
CALIBRATION = ("--calibration-windows", "2")


class TestEvalAgainst:
    def test_plain_model_against_every_method(self, run: Run, plain: str) -> None:
        options = ("--against", "rtn,hqq,gptq", "--against-bits", "3,4", "--budgets", "4", *CALIBRATION)
        code, out, err = run("eval", plain, *options, *SMALL, "--json")
        assert code == 0
        rows = json.loads(out)
        static = [(method, bits) for method in ("rtn", "hqq", "gptq") for bits in (3, 4)]
        assert [(r["method"], r["budget"]) for r in rows] == [("unquantized", None), *static, ("mobiquant", 4)]
        assert {r["implementation"] for r in rows if r["method"] in ("rtn", "gptq")} == {"mobiquant_compiler"}
        assert len({r["tokens"] for r in rows}) == 1, "the same windows"
        assert rows[0]["ratio"] == 1
        assert all(r["reference"] == "unquantized" for r in rows)
        assert rows[-1]["ratio"] == pytest.approx(rows[-1]["perplexity"] / rows[0]["perplexity"])
        assert "gptq at 4 bits" in err

    def test_table_names_the_implementation(self, run: Run, plain: str) -> None:
        out = run("eval", plain, "--against", "rtn", "--calibration", "none", *SMALL)[1]
        assert "implementation" in out
        assert "mobiquant_compiler" in out
        assert "implementation" not in run("eval", plain, *SMALL)[1]

    def test_checkpoint_with_its_reference(self, run: Run, elastic: str, plain: str) -> None:
        options = ("--against", "rtn", "--against-bits", "4", "--reference", plain, "--budgets", "8")
        rows = json.loads(run("eval", elastic, *options, *SMALL, "--json")[1])
        assert [r["method"] for r in rows] == ["unquantized", "rtn", "mobiquant"]
        assert rows[-1]["ratio"] == pytest.approx(1, rel=0.05)

    def test_thresholds_that_follow(self, run: Run, elastic: str, plain: str) -> None:
        options = ("--reference", plain, "--budgets", "4", *SMALL)
        rows = [json.loads(run("eval", elastic, *options, *more, "--json")[1]) for more in ((), ("--follow",))]
        assert [[row["followed"] for row in found] for found in rows] == [[False, False], [False, True]]
        assert "followed" in run("eval", elastic, *options, "--follow")[1]
        assert "followed" not in run("eval", elastic, *options)[1]

    def test_own_implementation_is_said(self, run: Run, plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mobiquant_compiler.baselines.compare.library_version", lambda: None)
        options = ("--against", "hqq", "--against-bits", "4", "--calibration", "none")
        code, out, err = run("eval", plain, *options, *SMALL, "--json")
        assert code == 0
        assert "hqq is measured with our own implementation; for its library: pip install --no-deps hqq" in err
        assert json.loads(out)[1]["implementation"] == "mobiquant_compiler"

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--against", "awq"], "--against: option 'method' got 'awq'"),
            (["--against", "rtn", "--against-bits", "9"], "'bits' got 9"),
            (["--against-bits", "a"], "--against-bits"),
            (["--against", "gptq", "--calibration", "none"], "'--calibration' got 'none'; wanted a text, for gptq"),
            (["--group", "99"], "group"),
            (["--calibration-windows", "0"], "--calibration-windows"),
            (["--warn-ratio", "-1"], "--warn-ratio"),
        ],
    )
    def test_bad_options(self, fails: Callable[..., str], plain: str, options: list[str], words: str) -> None:
        assert words in fails("eval", plain, *options, *SMALL)

    def test_checkpoint_without_a_plain_model(self, fails: Callable[..., str], elastic: str) -> None:
        assert "as --reference the one that the checkpoint was made from" in fails(
            "eval", elastic, "--against", "rtn", *SMALL
        )
        assert "'--against' got 'rtn'" in fails("eval", elastic, "--against", "rtn", "--reference", elastic, *SMALL)


class TestWarnings:
    def test_eval_warns_and_refuses_nothing(self, run: Run, elastic: str, plain: str) -> None:
        options = ("--budgets", "8,3", "--reference", plain, "--warn-ratio", "0.0001")
        code, out, err = run("eval", elastic, *options, *SMALL, "--json")
        assert code == 0
        assert len(json.loads(out)) == 3
        ratio = json.loads(out)[1]["ratio"]
        assert f"warning: budget 8 makes perplexity {ratio:.2f} times that of the unquantized model" in err
        assert "warning: budget 3 makes" in err

    def test_a_checkpoint_alone_is_compared_with_all_slices(self, run: Run, elastic: str) -> None:
        code, out, err = run("eval", elastic, "--budgets", "3", "--warn-ratio", "0.0001", *SMALL, "--json")
        (row,) = json.loads(out)
        assert (code, row["reference"]) == (0, "all slices")
        assert "times that of the model with all slices" in err
        assert "perplexity at 8 bits" in err, "measured though it was not asked for"

    def test_no_warning_below_the_ratio_or_with_0(self, run: Run, elastic: str) -> None:
        for ratio in ("1000", "0"):
            code, _, err = run("eval", elastic, "--budgets", "8,3", "--warn-ratio", ratio, *SMALL)
            assert code == 0
            assert "warning" not in err

    def test_quantize_checks_on_few_windows(self, run: Run, plain: str, tmp_path: Path) -> None:
        options = ("--budget", "4.5", "--check-windows", "1", "--warn-ratio", "0.0001", *SMALL)
        code, out, err = run("quantize", plain, tmp_path / "c", *options, "--json")
        assert code == 0
        assert (tmp_path / "c" / "config.json").is_file()
        check = json.loads(out)["check"]
        assert (check["text"], check["windows"], check["length"]) == ("pydoc", 1, 32)
        assert [row["budget"] for row in check["rows"]] == [8, 6, 5, 4.5, 4, 3]
        assert all(row["reference"] == "unquantized" and row["tokens"] == 31 for row in check["rows"])
        assert err.count("warning: budget") == 6

    def test_the_check_can_be_skipped(self, run: Run, plain: str, tmp_path: Path) -> None:
        options = ("--calibration", "none", "--check-windows", "0", "--warn-ratio", "0.0001")
        code, out, err = run("quantize", plain, tmp_path / "c", *options, "--json")
        assert code == 0
        assert json.loads(out)["check"] is None
        assert "warning" not in err
        assert "perplexity" not in err

    def test_no_tokenizer_no_check_and_it_says_so(self, run: Run, plain: str, tmp_path: Path) -> None:
        import shutil

        bare = Path(shutil.copytree(plain, tmp_path / "bare"))
        for file in bare.glob("tokenizer*"):
            file.unlink()
        code, _, err = run("quantize", bare, tmp_path / "c", "--calibration", "none")
        assert code == 0
        assert "the budgets are not checked: the directory has no tokenizer" in err

    def test_bad_options(self, fails: Callable[..., str], plain: str, tmp_path: Path) -> None:
        for option in ("--check-windows", "--warn-ratio"):
            assert option in fails("quantize", plain, tmp_path / "c", option, "-1")


class TestAnalyze:
    def test_all_analyses_of_a_checkpoint(self, run: Run, elastic: str, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        code, out, err = run("analyze", elastic, tmp_path / "a", "--budgets", "8,4", *SMALL, "--json")
        assert code == 0
        names = {path.name for path in (tmp_path / "a").iterdir()}
        parts = ("curve", "migration", "precision", "tokens")
        assert names == {f"{part}.{kind}" for part in parts for kind in ("png", "csv", "json")} | {
            "migration_linears.csv",
            "tokens.html",
        }
        found = json.loads(out)
        assert {part["analysis"] for part in found["analyses"]} == set(parts)
        listed = {Path(file).name for part in found["analyses"] for file in part["files"]}
        assert listed == names
        for part in found["analyses"]:
            written = json.loads((tmp_path / "a" / f"{part['analysis']}.json").read_text(encoding="utf-8"))
            assert written["summary"] == part["summary"]
            assert (written["model"], written["windows"]) == (elastic, 2)
        assert "outlier migration: 4/4" in err
        with (tmp_path / "a" / "tokens.csv").open(encoding="utf-8", newline="") as file:
            assert len(list(csv.DictReader(file))) == 32
        with (tmp_path / "a" / "precision.csv").open(encoding="utf-8", newline="") as file:
            assert len(list(csv.DictReader(file))) == 2 * 7

    def test_plain_model_is_measured_then_sliced(self, run: Run, plain: str, tmp_path: Path) -> None:
        options = ("--against", "rtn", "--against-bits", "4", "--budgets", "4", "--no-png", *CALIBRATION, *SMALL)
        code, out, err = run("analyze", plain, tmp_path / "a", "--what", "precision,curve", *options)
        assert code == 0
        assert "sliced for this run" in err
        assert "perplexity, rtn at 4 bits" in out
        assert out.index("curve.csv") < out.index("precision.csv")
        assert not list((tmp_path / "a").glob("*.png"))
        rows = json.loads((tmp_path / "a" / "curve.json").read_text(encoding="utf-8"))["summary"]
        assert [row["method"] for row in rows] == ["unquantized", "rtn", "mobiquant"]

    def test_without_matplotlib(
        self, fails: Callable[..., str], run: Run, elastic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(figures, "find_spec", lambda name: None)
        line = fails("analyze", elastic, tmp_path / "a", *SMALL)
        assert "install it with `pip install 'mobiquant-compiler[plots]'`" in line
        assert not (tmp_path / "a").exists()
        code, _, _ = run("analyze", elastic, tmp_path / "a", "--what", "tokens", "--no-png", *SMALL)
        assert code == 0
        assert "tokens.html" in {path.name for path in (tmp_path / "a").iterdir()}

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--what", "weather"], "'--what' got 'weather'; wanted some of curve, migration, precision, tokens"),
            (["--what", ""], "--what"),
            (["--pair", "4"], "--pair"),
            (["--pair", "4,3"], "a lower and a higher budget"),
            (["--pair", "1,3"], "--pair: budget 1.0 bits is out of range"),
            (["--pair", "3,8"], "budgets below 8"),
            (["--share", "0.9"], "--share"),
            (["--token-budget", "9"], "--token-budget: budget 9.0 bits is out of range"),
            (["--budgets", "9"], "--budgets: budget 9.0 bits is out of range"),
            (["--windows", "0"], "--windows"),
            (["--text", "nowhere.txt"], "text nowhere.txt"),
            (["--against", "rtn"], "--reference"),
        ],
    )
    def test_bad_options(
        self, fails: Callable[..., str], elastic: str, tmp_path: Path, options: list[str], words: str
    ) -> None:
        given = [] if "--windows" in options else SMALL
        assert words in fails("analyze", elastic, tmp_path / "a", "--no-png", *given, *options)

    def test_output_that_is_a_file(self, fails: Callable[..., str], elastic: str, tmp_path: Path) -> None:
        (tmp_path / "a").touch()
        assert str(NotADirectory(path=tmp_path / "a")) in fails("analyze", elastic, tmp_path / "a", "--no-png")
