"""The benchmark of one linear, without a GPU: cases, rows, checks before times, time budget, promises, picture."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_linear
import linear_accuracy
import linear_ours
import linear_summary
import linear_timing
import linear_warm
import pytest
import record
import torch
from linear_ours import Case, cases, counts_of, traffic
from linear_timing import Sample, WrongResult, check, copies_for
from torch import Tensor

from mobiquant_compiler import reference
from mobiquant_compiler.wiring import Order
from tests import linear_results

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Prepared:
    """Tokens, not quantized."""

    x: Tensor
    counts: Tensor
    placed: Tensor | None


class Wiring:
    """What the benchmark calls of `mobiquant_compiler.wiring`, by the reference; `wrong` adds to every result."""

    wrong = 0.0

    Order = Order

    def order_of(self, x, weights, spec):
        tokens = x.shape[0]
        return Order.LANES if tokens < 9 else Order.ROWS if tokens <= 32 else Order.SORTED

    def prepare_for(self, weights, x, router, thresholds, hist, mask, kind, spec, activation):
        counts = reference.route(x, router, thresholds, hist, mask, kind)
        return self.prepared(x, counts, self.order_of(x, weights, spec))

    def prepared(self, x, counts, order):
        tokens = torch.arange(len(counts))
        placed = None if order is Order.LANES else torch.stack((counts, tokens))
        return Prepared(x, counts, placed)

    def quantize(self, x, counts, spec, activation, *, token_rows):
        assert token_rows
        return self.prepared(x, counts, Order.SORTED)

    def multiply(self, prepared, slices, scale, zero, bias, spec, activation):
        if prepared.placed is not None:
            assert torch.equal(prepared.placed[0], prepared.counts[prepared.placed[1]])
        return self.routed_linear(prepared.x, prepared.counts, slices, scale, zero, bias, spec, activation, "routed")

    def routed_linear(self, x, counts, slices, scale, zero, bias, spec, activation, prefill):
        return reference.routed_linear(x, counts, slices, scale, zero, bias, spec) + self.wrong


@pytest.fixture
def wiring(monkeypatch: pytest.MonkeyPatch) -> Wiring:
    """Let the benchmark run on the CPU, over small weights."""
    stand_in = Wiring()
    monkeypatch.setattr(linear_ours, "wiring", stand_in)
    monkeypatch.setattr(linear_timing, "WORKING_SET", 1e4)
    return stand_in


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    """Run the script on the CPU and return what it wrote."""
    out = tmp_path / "linear.json"
    given = ["bench_linear.py", "--device", "cpu", "--shapes", "128x256", "--out", str(out), *arguments]
    monkeypatch.setattr("sys.argv", given)
    bench_linear.main()
    return json.loads(out.read_text(encoding="utf-8"))


class TestCases:
    def test_small_batches(self):
        found = cases(4096, 4096, 8, (1, 2, 3, 4))
        assert found[:6] == [Case(1), Case(2), Case(3), Case(4), Case(2, "mixed"), Case(4, "mixed")]
        assert {(c.activation, c.layout) for c in found[6:]} == {("a8", "slice_major"), ("a16", "bit_major")}
        assert cases(8192, 8192, 16, (1, 2, 3, 4)) == found[:6]
        assert Case(4, "mixed") not in cases(8192, 8192, 2, (1, 2, 3, 4))
        assert not [c for c in cases(8192, 8192, 1, (1, 2, 3, 4)) if c.counts == "mixed"]

    @pytest.mark.parametrize(
        ("shape", "tokens", "slices", "wanted"),
        [
            ((4096, 4096), 1, (1, 2, 3, 4), [1, 2, 3, 4]),
            ((4096, 4096), 8, (1, 2, 3, 4), [1, 2, 3, 4]),
            ((4096, 4096), 16, (1, 2, 3, 4), []),
            ((28672, 8192), 1, (1, 2, 3, 4), [2, 4]),
            ((28672, 8192), 1, (1, 4), [4]),
            ((28672, 8192), 8, (1, 2, 3, 4), []),
        ],
    )
    def test_the_other_layout(self, shape, tokens, slices, wanted):
        found = [case for case in cases(*shape, tokens, slices) if case.layout == "bit_major"]
        assert found == [Case(count, layout="bit_major") for count in wanted]

    def test_what_is_measured_is_compiled_before(self, monkeypatch, wiring):
        calls_of, compiled = linear_ours.calls_of, []
        monkeypatch.setattr(linear_ours, "calls_of", lambda *given: compiled.append(given[1]) or calls_of(*given))
        linear_warm._warm_ours(linear_warm.Job("ours", 128, 256, (1,)), (1, 2, 3, 4), CPU)
        assert compiled == cases(128, 256, 1, (1, 2, 3, 4))
        assert {case.layout for case in compiled} == {"slice_major", "bit_major"}

    def test_prefill(self):
        assert cases(8192, 8192, 256, (1, 2, 3, 4)) == [Case(2), Case(4, "mixed"), Case(4, "full")]
        assert cases(8192, 8192, 256, (2,)) == [Case(2)]

    def test_counts(self):
        assert counts_of(Case(3), 2, CPU).tolist() == [3, 3]
        assert counts_of(Case(4, "mixed"), 6, CPU).tolist() == [1, 2, 3, 4, 1, 2]
        shuffled = counts_of(Case(4, "mixed"), 1000, CPU)
        assert shuffled.dtype is torch.int32
        assert shuffled.bincount().tolist() == [0, 400, 300, 200, 100]
        assert shuffled.tolist() != sorted(shuffled.tolist())

    def test_bytes_that_must_move(self):
        weight, both = 4096 * 4096 // 4, 4 * 4096 * 4096 // 128
        assert traffic(Case(2), 4096, 4096, 8) == 2 * weight + both + 8 * 2 * (4096 + 4096)
        assert traffic(Case(2, activation="a8"), 4096, 4096, 8) == 2 * weight + both + 8 * (4096 + 2 * 4096)

    def test_copies_outsize_the_cache(self):
        assert copies_for(5e6, 50 << 20) == 50
        assert copies_for(5e6, 100 << 20) == 84
        assert copies_for(1e9, 50 << 20) == 2

    def test_plan_starts_with_what_matters(self):
        groups = bench_linear.plan([(8, 4), (16, 4)], [256, 64, 8, 1, 100])
        assert groups[:4] == [(8, 4, 1), (8, 4, 8), (16, 4, 1), (16, 4, 8)]
        assert [tokens for _, _, tokens in groups[4:]] == [64, 64, 256, 256, 100, 100]

    def test_kernels_are_compiled_once_for_numbers_that_share_them(self):
        found = linear_warm.jobs([(8, 4)], [1, 16, 32, 100], ["bf16", "ours", "gemlite2"])
        assert [(j.method, j.tokens) for j in found if j.method == "ours"] == [
            ("ours", (1,)),
            ("ours", (16, 32)),
            ("ours", (100,)),
        ]
        assert {j.method for j in found} == {"ours", "gemlite2"}


class TestChecks:
    def test_elements_that_nothing_writes(self):
        sample = Sample.of(4, 8, CPU)
        expected = torch.ones(4, 8, dtype=torch.float64)
        with pytest.raises(WrongResult, match="32 of 32 elements are not finite"):
            check(lambda: torch.empty(4, 8), expected, sample, 0.1)
        assert not torch.are_deterministic_algorithms_enabled()

    def test_a_wrong_result(self):
        sample = Sample.of(4, 8, CPU)
        expected = torch.ones(4, 8, dtype=torch.float64)
        assert check(lambda: torch.ones(4, 8), expected, sample, 0.1) == 0
        with pytest.raises(WrongResult, match=r"relative error 0\.5 is above 0\.1"):
            check(lambda: torch.full((4, 8), 1.5), expected, sample, 0.1)

    def test_samples_hold_both_ends(self):
        sample = Sample.of(1000, 5000, CPU)
        assert (len(sample.tokens), len(sample.rows)) == (64, 96)
        assert {0, 4999} <= set(sample.rows.tolist())
        assert Sample.of(1, 1, CPU).tokens.tolist() == [0]


class TestRun:
    def test_rows_and_notes(self, tmp_path, monkeypatch, wiring):
        monkeypatch.setattr(linear_ours, "BIT_MAJOR_SHAPE", (128, 256))
        result = run(tmp_path, monkeypatch, "--tokens", "1", "8", "16", "256", "--seed", "3")
        assert result["seed"] == 3
        assert result["skipped"] == []
        assert {"protocol", "bandwidth", "summary", "prepare", "rivals", "seconds", "device"} <= result.keys()
        assert not [row for row in result["rows"] if "error" in row]
        assert {row["layout"] for row in result["rows"]} == {"slice_major", "bit_major"}
        (row,) = linear_summary.find(result["rows"], tokens=8, slices=2, counts="mixed")
        assert (row["n"], row["k"], row["mean_slices"], row["path"]) == (128, 256, 1.5, "prepare, multiply")
        assert row["total_us"] > 0
        assert row["over_bf16"] == pytest.approx(row["bf16_us"] / row["time_us"], rel=0.05)
        assert 0 < row["relative_error"] < 0.01
        (rows,) = linear_summary.find(result["rows"], tokens=16, slices=2, counts="mixed")
        assert 0 < rows["relative_error"] < 0.01
        (full,) = linear_summary.find(result["rows"], tokens=256, counts="full")
        assert full["time_us"] == full["total_us"]
        assert [(e["k"], e["tokens"]) for e in result["prepare"]] == [(256, 1), (256, 8)]
        assert all(e["trained_us"] > 0 and e["trained_width"] == 12 for e in result["prepare"])
        assert result["prepare"][0]["hidden_us"] == pytest.approx(
            result["prepare"][0]["time_us"] - result["prepare"][0]["added_us"], abs=0.01
        )

    def test_a_rival_that_cannot_run_is_null_with_its_reason(self, tmp_path, monkeypatch, wiring):
        result = run(tmp_path, monkeypatch, "--tokens", "1", "--slices", "2")
        (entry,) = linear_summary.find(result["rivals"], method="tinygemm4")
        assert entry["time_us"] is None
        assert "_convert_weight_to_int4pack" in entry["error"]
        assert result["rows"][0]["tinygemm4_us"] is None

    def test_a_wrong_result_is_a_row_without_a_time(self, tmp_path, monkeypatch, wiring):
        wiring.wrong = 1.0
        result = run(tmp_path, monkeypatch, "--tokens", "1", "1024", "--methods", "ours", "bf16")
        assert len(result["rows"]) == 13
        for row in result["rows"]:
            assert row["error"].startswith("WrongResult: relative error")
            assert row["time_us"] is row["total_us"] is row["bandwidth_tb_s"] is None
            assert row["bf16_us"] > 0
        assert {row["met"] for row in result["summary"]} == {None}

    def test_a_trained_router_that_is_not_followed_has_no_time(self, tmp_path, monkeypatch, wiring):
        route = reference.route

        def wrong(x, router, thresholds, hist, mask, kind):
            counts = route(x, router, thresholds, hist, mask, kind)
            return counts if kind == "energy" else counts + 1

        monkeypatch.setattr(reference, "route", wrong)
        (entry,) = run(tmp_path, monkeypatch, "--tokens", "8", "--slices", "2", "--methods", "ours")["prepare"]
        assert entry["error"].startswith("WrongResult: 8 of 8 tokens")
        assert entry["time_us"] is entry["trained_us"] is None

    def test_a_lost_device_ends_the_run_and_keeps_what_there_is(self, tmp_path, monkeypatch, wiring):
        def lose(*args: Any) -> None:
            raise bench_linear.DeviceLost("gone")

        monkeypatch.setattr(bench_linear, "measure_prepare", lose)
        attempt = bench_linear.attempt
        monkeypatch.setattr(bench_linear, "attempt", lambda w, f, *a: lose() if f is lose else attempt(w, f, *a))
        result = run(tmp_path, monkeypatch, "--tokens", "1", "8", "--methods", "ours")
        assert result["stopped"] == "DeviceLost: gone"
        assert {row["tokens"] for row in result["rows"]} == {1}

    def test_what_does_not_fit_the_time_is_named(self, tmp_path, monkeypatch, wiring):
        result = run(tmp_path, monkeypatch, "--tokens", "1", "8", "--budget-s", "0")
        assert result["rows"] == []
        assert result["skipped"] == [
            {"n": 128, "k": 256, "tokens": tokens, "reason": "time budget"} for tokens in (1, 8)
        ]

    def test_the_time_budget_counts_the_longest_of_the_last_groups(self):
        clock = [10.0]
        done = []

        def act(group):
            done.append(group)
            clock[0] -= 4.0

        assert bench_linear.run_within(["a", "b", "c", "d"], act, lambda: clock[0]) == ["c", "d"]
        assert done == ["a", "b"]

    @pytest.mark.parametrize("text", ["4096", "4096x", "0x64", "axb"])
    def test_a_shape_that_is_none(self, text, capsys):
        with pytest.raises(SystemExit) as stopped:
            bench_linear.arguments(["--shapes", text, "--device", "cpu"])
        assert stopped.value.code == 2
        assert f"'{text}' is no shape; wanted NxK" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("given", "wanted"),
        [
            (("--tokens", "8", "0"), "'0' is no number of tokens; wanted 1 or more"),
            (("--tokens", "-3"), "'-3' is no number of tokens; wanted 1 or more"),
            (("--tokens", "2.5"), "'2.5' is no number of tokens; wanted 1 or more"),
            (("--device", "tpu"), "argument --device: invalid choice: 'tpu' (choose from"),
        ],
    )
    def test_what_cannot_be_measured_is_refused_first(self, given, wanted, capsys):
        with pytest.raises(SystemExit) as stopped:
            bench_linear.arguments(["--device", "cpu", *given])
        assert stopped.value.code == 2
        assert wanted in capsys.readouterr().err

    def test_defaults(self):
        args = bench_linear.arguments(["--device", "cpu"])
        assert (len(args.shapes), len(args.tokens)) == (6, 10)
        assert bench_linear.arguments(["--device", "cpu", "--quick"]).tokens == [1, 8, 32, 1024]


def promises(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the summary of rows by goal."""
    result = linear_results.result()
    return {row["goal"]: row for row in linear_summary.summarize(rows, result["prepare"], result["bandwidth"])}


class TestAccuracy:
    def test_every_way_with_float32_activations(self, monkeypatch, wiring):
        monkeypatch.setattr(linear_accuracy, "SHAPES", {(128, 256): (1, 3, 8)})
        found = linear_accuracy.accuracies(CPU)
        places = {(row["tokens"], row["layout"], row["activation"], row["counts"], row["slices"]) for row in found}
        assert len(places) == len(found) == 2 * (4 + 4 + 5) + 2 * (4 + 5)  # mixed counts of four want tokens for each
        assert {layout for tokens, layout, *_ in places if tokens == 3} == {"slice_major"}
        goals = linear_summary.summarize([], [], {}, found)[-2:]
        assert [goal["met"] for goal in goals] == [True, True]
        assert json.loads(json.dumps(found)) == found

    def test_wrong_results_are_recorded(self, monkeypatch, wiring):
        monkeypatch.setattr(linear_accuracy, "SHAPES", {(128, 256): (1,)})
        wiring.wrong = 1.0
        assert min(row["relative_error"] for row in linear_accuracy.accuracies(CPU)) > 0.1


class TestSummary:
    def test_figures(self):
        rows = linear_results.rows()
        found = promises(rows)
        one = linear_summary.find(rows, tokens=1, slices=1)
        product = 1.0
        for row in one:
            product *= row["bf16_us"] / row["time_us"]
        goal = found["one token, 1 slices: times as fast as bf16"]
        assert goal["got"] == pytest.approx(product ** (1 / 6), abs=1e-3)
        assert (goal["wanted"], goal["met"]) == (">= 4.5", True)
        assert goal["with_prepare"] < goal["got"]
        share = found["one token, from 2 slices on, two largest shapes: share of the read bandwidth"]
        assert (share["got"], share["met"]) == (0.95, True)
        assert found["one token: us to route and quantize"]["got"] == 3.0
        assert len(found) == 18

    def test_the_other_layout_counts_for_no_promise(self):
        rows = linear_results.rows()
        others = [{**row, "layout": "bit_major", "time_us": 9 * row["time_us"]} for row in rows]
        assert promises([*others, *rows]) == promises(rows)

    def test_a_miss_names_the_shape(self):
        rows = linear_results.rows()
        slow = linear_summary.find(rows, n=8192, k=8192, tokens=8, slices=4, counts="mixed")[0]
        rows[rows.index(slow)] = linear_results.row(8192, 8192, 8, 4, "mixed", slower=1.5)
        goal = promises(rows)["8 tokens of 1 to 4 slices: time over one token's"]
        assert (goal["met"], goal["where"]) == (False, "8192x8192, tokens: 8")
        assert goal["got"] > 1.25
        written = linear_summary.lines([goal])
        assert written[0].startswith("MISS    8 tokens of 1 to 4 slices")
        assert written[1] == "0 of 1 promises kept"

    def test_prefill_slower_than_promised(self):
        rows = [linear_results.row(64, 64, 4096, 4, "mixed", slower=1.2)]
        goal = promises(rows)["4096 tokens, 2 slices on average: speed over bf16, each shape"]
        assert (goal["met"], goal["got"]) == (False, 0.833)

    def test_small_errors_keep_their_digits(self):
        rows = [{"n": 8, "k": 64, "tokens": t, "activation": "a16", "relative_error": t * 1.3e-5} for t in (1, 9, 2)]
        goal, missing = linear_summary.summarize([], [], {}, rows)[-2:]
        assert (goal["got"], goal["met"], goal["where"]) == (1.17e-4, False, "8x64, tokens: 9")
        assert (missing["goal"], missing["met"]) == ("float32 outputs, a8: largest relative error", None)

    def test_what_was_not_measured_is_no_promise_kept(self):
        rows = copy.deepcopy(linear_results.rows())
        linear_summary.find(rows, tokens=1, slices=2, n=4096, k=4096)[0]["time_us"] = None
        found = promises(rows)
        assert found["one token, 2 slices: times as fast as bf16"]["met"] is None
        assert found["one token, 3 slices: times as fast as bf16"]["met"] is True
        empty = linear_summary.summarize([], [], {})
        assert {row["met"] for row in empty} == {None}

    def test_from_a_file(self, tmp_path, monkeypatch, capsys):
        path = tmp_path / "linear.json"
        path.write_text(json.dumps(linear_results.result()), encoding="utf-8")
        monkeypatch.setattr("sys.argv", ["linear_summary.py", str(path)])
        linear_summary.main()
        assert capsys.readouterr().out.endswith("of 18 promises kept\n")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "4090"),
    ],
)
def test_results_lie_under_the_model_of_the_gpu(name, wanted, monkeypatch):
    monkeypatch.setattr(record, "device_name", lambda device: name)
    assert record.folder("cuda").name == wanted
