"""The command line as a user meets it: output, JSON, progress, and one clear line with exit code 2 on bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mobiquant_compiler.cli.console import _line_reporter, user_error
from mobiquant_compiler.errors import NotElastic

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--windows", "2", "--length", "32")


def test_long_stages_say_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([0.0, 10.0, 40.0, 80.0, 100.0])
    report = _line_reporter(lambda: next(times))
    for done in (3, 4, 5, 6):
        report("blocks", done, 6)
    assert capsys.readouterr().err.splitlines() == ["blocks: 5/6, 27 s left", "blocks: 6/6 in 100 s"]


class TestHelp:
    def test_lists_every_command(self, run: Run) -> None:
        code, out, _ = run("--help")
        assert code == 0
        used = ("demo", "quantize", "eval", "analyze", "generate", "bench", "inspect")
        for name in (*used, "tune", "dump", "emit", "explain", "passes"):
            assert f"\n  {name} " in out
        assert "--install-completion" in out

    def test_module_and_script_are_the_same_program(self) -> None:
        command = [sys.executable, "-m", "mobiquant_compiler", "inspect", "no-such-directory"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr == (
            "mobiquant: checkpoint no-such-directory: the directory is missing; wanted a directory written by "
            "`mobiquant quantize` or save().\n"
        )

    def test_help_imports_no_transformers(self) -> None:
        code = (
            "import sys\nfrom mobiquant_compiler.cli import main\n"
            "try:\n    main(['--help'])\nexcept SystemExit:\n    sys.exit('transformers' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0

    @pytest.mark.parametrize(
        "arguments", [["--no-such-option"], ["fly"], ["quantize"], ["eval", "m", "--windows", "x"]]
    )
    def test_usage_errors(self, run: Run, arguments: list[str]) -> None:
        assert run(*arguments)[0] == 2


class TestInspect:
    def test_table_and_totals(self, run: Run, elastic: str) -> None:
        code, out, _ = run("inspect", elastic)
        assert code == 0
        assert "model.layers.0.mlp.down_proj" in out
        assert "budget 5 of 2.4 to 8 bits" in out  # the floor of down_proj raises the least budget
        assert "calibrated table, 4 routers" in out

    def test_json_adds_up(self, run: Run, elastic: str) -> None:
        found = json.loads(run("inspect", elastic, "--json")[1])
        assert found["totals"]["bytes"] == sum(row["bytes"] for row in found["linears"])
        assert found["totals"]["linears"] == 7
        assert found["states"][0]["budget"] == 5

    def test_not_a_checkpoint(self, fails: Callable[..., str], plain: str) -> None:
        assert "quant_method is None" in fails("inspect", plain)


class TestEval:
    def test_default_budgets_that_the_model_can_give(self, run: Run, elastic: str) -> None:
        rows = json.loads(run("eval", elastic, *SMALL, "--json")[1])
        assert [row["budget"] for row in rows] == [8, 6, 5, 4, 3]
        assert rows[0]["achieved_bits"] == pytest.approx(8)
        assert all(row["tokens"] == 62 and row["perplexity"] > 1 for row in rows)

    def test_plain_model_and_own_text(self, run: Run, plain: str, tmp_path: Path) -> None:
        (tmp_path / "own.txt").write_text("All work and no play makes Jack a dull boy. " * 9)
        code, out, err = run("eval", plain, "--text", tmp_path / "own.txt", *SMALL)
        assert code == 0
        assert "perplexity" in out
        assert "2/2" in err

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--budgets", "4,x"], "--budgets"),
            (["--budgets", ""], "--budgets"),
            (["--budgets", "9"], "--budgets: budget 9.0 bits is out of range"),
            (["--budgets", "2"], "change floors and ceilings"),
            (["--batch", "0"], "--batch"),
            (["--text", "nowhere.raw"], "text nowhere.raw"),
        ],
    )
    def test_bad_options(self, fails: Callable[..., str], elastic: str, options: list[str], words: str) -> None:
        assert words in fails("eval", elastic, *options)

    def test_budget_of_a_plain_model_slices_it_first(self, run: Run, plain: str) -> None:
        code, out, err = run("eval", plain, "--budgets", "4", "--calibration-windows", "2", *SMALL, "--json")
        assert code == 0
        assert "has plain weights, sliced for this run" in err
        assert [(row["method"], row["budget"]) for row in json.loads(out)] == [("unquantized", None), ("mobiquant", 4)]

    def test_impossible_budget_of_a_plain_model(self, fails: Callable[..., str], plain: str) -> None:
        assert "out of range" in fails("eval", plain, "--budgets", "9", "--calibration", "none", *SMALL)


class TestGenerate:
    def test_streams_text(self, run: Run, elastic: str) -> None:
        code, out, err = run("generate", elastic, "Once", "--max-tokens", "6", "--budget", "8")
        assert code == 0
        assert out.endswith("\n")
        assert "6 tokens in" in err
        assert "8.00 bits" in err

    def test_schedule_changes_the_bits(self, run: Run, elastic: str) -> None:
        arguments = ("generate", elastic, "Once", "--max-tokens", "40", "--json", "--schedule")
        high = json.loads(run(*arguments, "0:8")[1])
        mixed = json.loads(run(*arguments, "0:8,4:3")[1])
        assert high["achieved_bits"] == pytest.approx(8)
        assert 2.3 < mixed["achieved_bits"] < 5
        assert mixed["tokens"] <= 40

    def test_text_is_what_the_tokens_say(self, run: Run, elastic: str) -> None:
        arguments = ("generate", elastic, "Once", "--max-tokens", "12", "--temperature", "1", "--seed", "3")
        assert run(*arguments)[1].rstrip("\n") == json.loads(run(*arguments, "--json")[1])["text"].rstrip("\n")

    def test_plain_model(self, run: Run, plain: str) -> None:
        code, _, err = run("generate", plain, "Once", "--max-tokens", "3")
        assert code == 0
        assert "bits" not in err

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--schedule", "8"], "--schedule '8': '8' has no colon"),
            (["--schedule", "0:8,5:11"], "--schedule: budget 11.0 bits is out of range"),
            (["--budget", "1"], "out of range"),
            (["--max-tokens", "0"], "--max-tokens"),
            (["--temperature", "-1"], "--temperature"),
            (["--chat"], "--chat"),
        ],
    )
    def test_bad_options(self, fails: Callable[..., str], elastic: str, options: list[str], words: str) -> None:
        assert words in fails("generate", elastic, "Once", *options)

    def test_empty_prompt(self, fails: Callable[..., str], elastic: str) -> None:
        assert "batch is empty" in fails("generate", elastic, "")

    def test_schedule_for_a_plain_model(self, fails: Callable[..., str], plain: str) -> None:
        assert "no elastic linear" in fails("generate", plain, "Once", "--schedule", "0:8")


class TestBench:
    def test_rows_of_every_eager_method(self, run: Run, plain: str) -> None:
        methods = "eager,bfloat16,mobiquant-eager"
        options = ["--methods", methods, "--budgets", "8,3", "--prompt", "8", "--tokens", "3", "--repeat", "1"]
        rows = json.loads(run("bench", plain, *options, "--json")[1])
        assert [row["method"] for row in rows] == ["eager float32", "eager bfloat16", *["mobiquant-eager"] * 2]
        assert all(row["decode_tokens_per_s"] > 0 and row["prefill_tokens_per_s"] > 0 for row in rows)
        assert rows[0]["linear_mb"] == 2 * rows[1]["linear_mb"] > rows[2]["linear_mb"] > rows[3]["linear_mb"]

    def test_checkpoint_has_no_plain_rows(self, run: Run, elastic: str) -> None:
        options = ["--methods", "eager,mobiquant-eager", "--budgets", "8", "--prompt", "8", "--tokens", "3"]
        code, out, err = run("bench", elastic, *options, "--json")
        assert code == 0
        assert len(json.loads(out)) == 1
        assert "no rows for eager" in err

    def test_bad_options(self, fails: Callable[..., str], elastic: str) -> None:
        assert "'--methods' got 'warp'" in fails("bench", elastic, "--methods", "warp")
        assert "--prompt" in fails("bench", elastic, "--prompt", "0")


class TestGraphs:
    def test_dump_writes_graphs_and_report(self, run: Run, elastic: str, tmp_path: Path) -> None:
        code, out, _ = run("dump", elastic, tmp_path / "d")
        assert code == 0
        (folder,) = (tmp_path / "d").iterdir()
        names = {p.name for p in folder.iterdir()}
        assert {"00-input.fx", "01-normalise-linears.fx", "01-normalise-linears.diff", "report.json"} <= names
        assert str(folder / "report.json") in out.replace("\n", "")
        kernels = {p.name.partition("__")[0] for p in (folder / "kernels").iterdir()}
        assert kernels == {"route_quantize", "sliced_mma"}
        assert len(json.loads((folder / "report.json").read_text())["coverage"]["rewritten"]) == 7

    def test_dump_leaves_a_directory_in_use_alone(
        self, fails: Callable[..., str], elastic: str, tmp_path: Path
    ) -> None:
        (tmp_path / "old").touch()
        assert "new or empty directory" in fails("dump", elastic, tmp_path)

    def test_dump_of_a_long_call_has_the_kernels_of_its_path(self, run: Run, plain: str, tmp_path: Path) -> None:
        assert run("dump", plain, tmp_path / "d", "--tokens", "65", "--target", "80")[0] == 0
        names = {p.name for p in (tmp_path / "d").glob("*/kernels/*")}
        assert {name.partition("__")[0] for name in names} == {"route_quantize", "sliced_mma", "dequantize"}
        assert not [name for name in names if "overlap" in name], "sm_80 launches nothing ahead"

    def test_dump_for_a_target_that_is_none(self, fails: Callable[..., str], elastic: str, tmp_path: Path) -> None:
        assert "option '--target' got 12; wanted one of 80," in fails("dump", elastic, tmp_path / "d", "--target", "12")
        assert not (tmp_path / "d").exists()

    def test_explain_names_what_is_left_alone(self, run: Run, plain: str) -> None:
        code, out, _ = run("explain", plain)
        assert code == 0
        assert "7 of 8 linears elastic" in out
        assert "lm_head" in out
        assert "fuse-elastic" in out

    def test_explain_json_with_chosen_passes(self, run: Run, elastic: str) -> None:
        (report,) = json.loads(
            run("explain", elastic, "-p", "normalise-linears,share-routing{min_linears=3}", "--json")[1]
        )
        assert [p["name"] for p in report["passes"]] == ["normalise-linears", "share-routing"]

    def test_unknown_pass(self, fails: Callable[..., str], elastic: str) -> None:
        assert "no pass is named 'polish'" in fails("explain", elastic, "-p", "polish")
        assert "option 'grit'" in fails("explain", elastic, "-p", "share-routing{grit=3}")

    def test_passes_in_order_with_what_they_do(self, run: Run) -> None:
        from mobiquant_compiler.passes import DEFAULT_PIPELINE

        rows = json.loads(run("passes", "--json")[1])
        assert [row["name"] for row in rows[: len(DEFAULT_PIPELINE)]] == list(DEFAULT_PIPELINE)
        assert all(row["about"] for row in rows)


class TestErrors:
    def test_compilers_wrap_what_a_backend_raises(self) -> None:
        inner = NotElastic(where="here", model="M")
        wrapped = RuntimeError("backend failed")
        wrapped.__cause__ = inner
        assert user_error(wrapped) == str(inner)

    def test_a_file_that_may_not_be_written(self) -> None:
        assert (
            user_error(PermissionError(13, "Permission denied", "out/config.json"))
            == "out/config.json: Permission denied"
        )

    def test_our_faults_stay_loud(self) -> None:
        assert user_error(ZeroDivisionError("x")) is None
        assert user_error(OSError("no file in it")) is None

    def test_interrupt(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def stop(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("mobiquant_compiler.checkpoint.summary.summarize", stop)
        assert run("inspect", "x")[0] == 130
