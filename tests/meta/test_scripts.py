"""The scripts that check and describe the project do find what they should."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

from tests import linear_results

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
RESULT = {
    "device": "a processor",
    "versions": {"torch": "2.13.0", "triton": None},
    "commit": "0123456789abcdef",
    "date": "2026-01-02",
    "rows": [{"text": "a", "bits": 4, "ppl": 38.123456}, {"text": "b", "bits": None, "ppl": 12345.6}],
}

PACKED = "calibrated slices, trained router per input"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


style, tables, suites = script("check_style"), script("readme_tables"), script("run_tests")
variants = script("run_variants")


class TestStyle:
    def test_sizes(self) -> None:
        long_function = "def f():\n" + "    x = 1\n" * 61
        assert list(style.check_sizes("a.py", long_function)) == ["a.py:1: f has 62 lines; at most 60"]
        assert not list(style.check_sizes("a.py", "@triton.jit\n" + long_function))
        assert list(style.check_sizes("a.py", "x = 1\n" * 401)) == ["a.py: 401 lines; at most 400"]

    def test_names(self) -> None:
        assert list(style.check_names("pkg/utils.py", '"""Doc."""')) == [
            "pkg/utils.py: name the file after what is in it"
        ]
        assert list(style.check_names("a.py", "x = 1")) == ["a.py: no module docstring"]

    def test_wording(self) -> None:
        home = "/" + "root/x"
        (found,) = style.check_wording("a.md", f"fine\nsee {home}\n")
        assert found.startswith("a.md:2: ")
        assert not list(style.check_wording("a.md", "docs/root/x, https://example.org/home/x and /proc/cpuinfo"))


class TestTables:
    def test_documents_are_fresh(self) -> None:
        assert {"README.md", "analysis.md"} <= {path.name for path in tables.documents()}
        for path in tables.documents():
            text = path.read_text(encoding="utf-8")
            assert tables.redraw(text) == text, path.name

    def test_draws_matching_rows_with_their_origin(self, tmp_path: Path) -> None:
        (tmp_path / "r.json").write_text(json.dumps(RESULT))
        text = "before\n<!-- table: r.json text=a columns=bits,ppl -->\nstale\n<!-- end table -->\nafter"
        drawn = tables.redraw(text, tmp_path)
        assert "| bits | ppl |\n| --- | --- |\n| 4 | 38.12 |\n" in drawn
        assert "a processor; torch 2.13.0; commit 0123456789, 2026-01-02" in drawn
        assert "stale" not in drawn
        assert tables.redraw(drawn, tmp_path) == drawn
        assert (tables.cell(12345.6), tables.cell(None)) == ("12346", "-")

    def test_draws_another_list_of_the_file(self, tmp_path: Path) -> None:
        summary = [{"goal": "fast", "got": 1.23456, "met": True}, {"goal": "small", "got": None, "met": False}]
        (tmp_path / "r.json").write_text(json.dumps({**RESULT, "summary": summary}))
        text = "<!-- table: r.json list=summary columns=goal,got,met -->\n<!-- end table -->"
        drawn = tables.redraw(text, tmp_path)
        assert "| fast | 1.235 | yes |\n| small | - | no |\n" in drawn

    def test_rows_in_the_order_of_a_column(self, tmp_path: Path) -> None:
        rows = [{"tokens": None}, {"tokens": 8}, {"tokens": 64}, {"tokens": None}, {"tokens": 1}]
        (tmp_path / "r.json").write_text(json.dumps(RESULT | {"rows": rows}))
        text = "<!-- table: r.json sort=tokens columns=tokens -->\n<!-- end table -->"
        assert "| 1 |\n| 8 |\n| 64 |\n| - |\n| - |\n" in tables.redraw(text, tmp_path)

    def test_ablation_by_text_budget_and_way(self, tmp_path: Path) -> None:
        def row(text: str, way: str, budget: float | None, perplexity: float, **more: object) -> dict[str, object]:
            bits = None if budget is None else budget + 0.014
            return {
                "text": text,
                "method": way,
                "budget": budget,
                "achieved_bits": bits,
                "perplexity": perplexity,
                **more,
            }

        static, trained = (
            "calibrated slices, best static count per linear",
            "calibrated slices, trained router per input",
        )
        rows = [
            row("wiki", "unquantized", None, 29.0),
            *(row("wiki", trained, bits, 30.0 + bits) for bits in (3.0, 8.0, 3.25)),
            row("c4", trained, 3.0, 50.0),
            *(row("wiki", static, bits, 40.0 + bits) for bits in (3.0, 8.0)),
        ]
        (tmp_path / "r.json").write_text(json.dumps(RESULT | {"rows": rows}))
        text = "<!-- ablation: r.json -->\nstale\n<!-- end table -->"
        drawn = tables.redraw(text, tmp_path)
        assert "| text | budget | best static count per linear | trained router, per input |" in drawn
        assert "| wiki | 8 | 48 (8.01) | 38 (8.01) |\n| wiki | 3 | 43 (3.01) | 33 (3.01) |\n\n<sub>a proc" in drawn
        assert "c4" not in drawn, "one way alone compares nothing"
        assert tables.redraw(drawn, tmp_path) == drawn
        rows.append(row("wiki", static, 3.0, 42.0, followed=True))
        with pytest.raises(ValueError, match=r"two rows of .* at 3\.0 on wiki; say which"):
            tables.draw_ablation(RESULT | {"rows": rows}, {})
        with pytest.raises(ValueError, match="no two ways to route"):
            tables.draw_ablation(RESULT | {"rows": rows}, {"followed": "True"})

    def test_ways_of_the_ablation_are_those_of_the_benchmark(self) -> None:
        source = (ROOT / "benchmarks" / "bench_quality.py").read_text(encoding="utf-8")
        assert not [method for method in (*tables.ABLATION, *tables.RIVALS) if f'"{method}"' not in source]

    def test_rivals_stand_beside_the_packed_model_at_whole_and_half_bits(self, tmp_path: Path) -> None:
        rows = [
            {"text": "c4", "method": "GPTQ", "budget": 3, "achieved_bits": 3, "perplexity": 50.0},
            {"text": "c4", "method": "unquantized", "budget": None, "achieved_bits": None, "perplexity": 29.0},
            *(
                {"text": "c4", "method": PACKED, "budget": bits, "achieved_bits": bits - 0.004, "perplexity": 30 + bits}
                for bits in (3.0, 3.25, 3.5)
            ),
        ]
        (tmp_path / "r.json").write_text(json.dumps(RESULT | {"rows": rows}))
        drawn = tables.redraw("<!-- rivals: r.json -->\n<!-- end table -->", tmp_path)
        wanted = "| c4 | - | 29 | - | - |\n| c4 | 3.5 | - | 33.5 (3.50) | - |\n| c4 | 3 | - | 33 (3.00) | 50 |\n\n<sub>"
        assert "| text | budget | unquantized | one packed model | GPTQ |\n" in drawn
        assert wanted in drawn
        with pytest.raises(ValueError, match="no row of unquantized"):
            tables.draw_rivals(RESULT | {"rows": rows}, {"text": "ptb"})
        one = f'<!-- table: r.json method="{PACKED}" columns=budget -->\n<!-- end table -->'
        assert "| 3.25 |\n| 3.5 |\n\n" in tables.redraw(one, tmp_path), "a value in quotes may hold spaces"

    def test_a_column_that_no_row_has(self) -> None:
        with pytest.raises(ValueError, match=r"no row has speed where \{\}; columns there are text, bits, ppl$"):
            tables.draw(RESULT, ["speed"], {})

    @pytest.mark.parametrize("options", [[], ["--check"]], ids=["draw", "check"])
    @pytest.mark.parametrize(
        ("marker", "wanted"),
        [
            ("table: none.json columns=ppl", "none.json: No such file or directory; measure first: benchmarks/bench_"),
            ("table: broken.json columns=ppl", "broken.json is no JSON (Expecting value: line 1"),
            ("table: list.json columns=ppl", "list.json: it holds no facts by name but a list; wanted a result file"),
            ("table: bare.json columns=ppl", "bare.json: it has no versions, commit, date; there are device, rows"),
            ("table: r.json columns=ppl,speed", "no row has speed where {}; columns there are text, bits, ppl"),
            ("table: r.json text=c columns=ppl", "none of 2 rows is one where {'text': 'c'}; columns there are text,"),
            ("table: r.json sort=speed columns=ppl", "rows: not every entry has speed; there are text, bits, ppl"),
            ("table: r.json list=summary columns=ppl", "it has no list named summary of entries with columns; lists"),
            ("table: r.json text=a", "the marker names no columns; wanted columns=a,b of a list's rows"),
            ("ablation: r.json", "rows: not every entry has method, budget, perplexity; there are text, bits, ppl"),
        ],
    )
    def test_a_table_that_cannot_be_drawn_is_named(
        self,
        marker: str,
        wanted: str,
        options: list[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        written = {"r": json.dumps(RESULT), "broken": "", "list": "[]", "bare": '{"device": "a", "rows": []}'}
        for name, content in written.items():
            (tmp_path / f"{name}.json").write_text(content)
        pages = {
            "a.md": "<!-- table: r.json columns=ppl -->\nstale\n<!-- end table -->",
            "b.md": f"<!-- {marker} -->\n<!-- end table -->",
        }
        for name, text in pages.items():
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(tables, "ROOT", tmp_path)
        monkeypatch.setattr(tables, "RESULTS", tmp_path)
        monkeypatch.setattr(tables, "documents", lambda: [tmp_path / name for name in pages])
        assert tables.main(options) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith(f"b.md: <!-- {marker} -->: ")
        assert wanted in said.err
        assert said.err.count("\n") == 1
        assert {name: (tmp_path / name).read_text() for name in pages} == pages, "nothing is written"

    def test_unknown_arguments(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(tables, "documents", list)
        for wrong in ("--chekc", "README.md"):
            with pytest.raises(SystemExit) as stopped:
                tables.main([wrong])
            assert stopped.value.code == 2
            assert f"unrecognized arguments: {wrong}" in capsys.readouterr().err


class TestPicture:
    def test_the_same_results_give_the_same_picture(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("matplotlib")
        plot = script("plot_linear")
        source = tmp_path / "linear.json"
        source.write_text(json.dumps(linear_results.result()), encoding="utf-8")
        pictures = [tmp_path / "images" / "a.svg", tmp_path / "images" / "b.svg"]
        for picture in pictures:
            assert plot.main(["--results", str(source), "--out", str(picture)]) == 0
        first, second = (picture.read_bytes() for picture in pictures)
        assert first == second
        assert first.startswith(b"<?xml")
        assert b"<dc:date>" not in first
        assert plot.main(["--results", str(tmp_path / "none.json")]) == 2
        assert "No such file or directory; measure first" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["plot_linear", "plot_quality", "plot_migration_methods"])
    def test_pictures_of_the_documents_are_fresh(self, name: str, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if f"matplotlib=={version('matplotlib')}" not in pinned:
            pytest.skip(f"matplotlib {version('matplotlib')} is not that of constraints.txt, which drew the pictures")
        plot, drawn = script(name), tmp_path / "a.svg"
        assert plot.main(["--out", str(drawn)]) == 0
        same = drawn.read_bytes() == plot.PICTURE.out.read_bytes()
        assert same, f"{plot.PICTURE.out.name} differs from {plot.PICTURE.results}; run scripts/{name}.py"

    @pytest.mark.parametrize(
        ("out", "wanted"),
        [
            ("", "is a folder; wanted the name of a file, as {path}/linear_h100.svg"),
            ("picture", "names no kind of picture; wanted .svg or .png or .pdf at its end"),
            ("picture.xyz", "names no kind of picture; wanted .svg or .png or .pdf at its end"),
            ("file/a.svg", "{path.parent} cannot be made or written to: File exists"),
        ],
    )
    def test_where_no_picture_can_be_written(
        self, out: str, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("matplotlib")
        (tmp_path / "file").touch()
        path = tmp_path / out
        with pytest.raises(SystemExit) as stopped:
            script("plot_linear").main(["--out", str(path)])
        assert stopped.value.code == 2
        said = capsys.readouterr()
        assert f"argument --out: {path}" in " ".join(said.err.split())
        assert wanted.format(path=path) in " ".join(said.err.split())
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
        assert not tmp_path.with_suffix(".png").exists()

    @pytest.mark.parametrize(
        ("content", "wanted"),
        [
            ("{", " is no JSON (Expecting property name"),
            ('{"rows": []}', ": it has no device, versions, date; there are rows; wanted a result file of benchmarks/"),
            (json.dumps(RESULT), ": rows: not every entry has n, k, tokens"),
            (json.dumps(RESULT | {"rows": []}), ": it has no rows, so there is nothing to draw"),
            (
                json.dumps(RESULT | {"rows": [linear_results.row(8, 4, 1, 2) | {"time_us": None}]}),
                ": no row of 8 x 4 has a time; wanted some of activation a16",
            ),
        ],
        ids=["broken", "facts", "columns", "no-rows", "no-times"],
    )
    def test_what_is_no_result_to_draw(
        self, content: str, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("matplotlib")
        source, out = tmp_path / "linear.json", tmp_path / "a.svg"
        source.write_text(content)
        assert script("plot_linear").main(["--results", str(source), "--out", str(out)]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith(f"{source}{wanted}")
        assert said.err.count("\n") == 1
        assert not out.exists()

    def test_quality_is_drawn_from_whatever_texts_there_are(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("matplotlib")
        plot = script("plot_quality")
        row = {"text": "wiki", "budget": 2.0, "achieved_bits": 2.0, "perplexity": 40.0}
        rows = [{**row, "method": method} for method in ("unquantized", plot.PACKED, "GPTQ")]
        rows.append({**row, "method": "HQQ", "perplexity": 4e5})
        assert plot.series({"rows": rows}, "wiki", "GPTQ") == [(2.0, 40.0)]
        source = tmp_path / "quality.json"
        source.write_text(json.dumps({"rows": rows}), encoding="utf-8")
        pictures = [tmp_path / "images" / name for name in ("a.svg", "b.svg")]
        for picture in pictures:
            assert plot.main(["--results", str(source), "--out", str(picture)]) == 0
        assert pictures[0].read_bytes() == pictures[1].read_bytes()
        text = pictures[0].read_text(encoding="utf-8")
        assert "GPTQ, a model a width" in text
        assert "HQQ" not in text, "what is broken is left out"
        assert plot.main(["--results", str(tmp_path / "none.json")]) == 2
        assert "measure first" in capsys.readouterr().err

    def test_what_was_not_measured_is_left_out(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        result = linear_results.result()
        for row in result["rows"]:
            row["gemlite2_us"] = None
            row["time_us"] = None if row["slices"] == 3 else row["time_us"]
        script("plot_linear").draw(result, tmp_path / "a.svg")
        assert (tmp_path / "a.svg").stat().st_size > 10_000


def test_a_run_that_crashed_counts_as_a_failure(tmp_path: Path) -> None:
    report = tmp_path / "r.xml"
    report.write_text('<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"/></testsuites>')
    assert suites.count(report) == (5, 2, 2)
    assert suites.count(tmp_path / "none.xml") == (0, 1, 0)


class TestProject:
    def test_measuring_one_linear_redraws_what_shows_it(self) -> None:
        command = ["make", "--dry-run", "--assume-old=.venv/.ready", "bench-gpu"]
        own = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "DATA")}
        said = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=True).stdout
        ran = [word for word in said.split() if word.startswith(("scripts/", "benchmarks/"))]
        assert ran == ["benchmarks/bench_linear.py", "scripts/plot_linear.py", "scripts/readme_tables.py"]

    def test_every_dependency_is_pinned_for_ci(self) -> None:
        lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        pinned = {line.partition("==")[0].replace("_", "-") for line in lines if "==" in line}
        extras = PROJECT["project"]["optional-dependencies"].values()
        wanted = [*PROJECT["project"]["dependencies"], *(name for extra in extras for name in extra)]
        assert {requirement.partition(";")[0].partition(">")[0].strip() for requirement in wanted} <= pinned

    def test_entry_points_lead_somewhere(self) -> None:
        points = PROJECT["project"]["entry-points"]["torch_dynamo_backends"] | PROJECT["project"]["scripts"]
        for target in points.values():
            module, _, name = target.partition(":")
            assert callable(getattr(import_module(module), name))

    def test_version_is_said_once(self) -> None:
        import mobiquant_compiler

        assert mobiquant_compiler.__version__ == PROJECT["project"]["version"]
        assert f"## {mobiquant_compiler.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


class TestVariants:
    def test_names_of_parts(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert variants.main(["fuse"]) == 2
        assert "no part is named fuse; there are blocks, resident, fused," in capsys.readouterr().out

    def test_no_gpu_is_said(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(variants.torch.cuda, "is_available", lambda: False)
        assert variants.main(["fused"]) == 2
        assert capsys.readouterr().out.startswith("torch finds no CUDA device; wanted one of sm_80 or later.")
