"""`mobiquant tune`: the search over faked timings, how calls are timed, and the command as a user meets it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path as FilePath
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mobiquant_compiler as mq
from mobiquant_compiler import checkpoint, tuning, wiring
from mobiquant_compiler.cli import main
from mobiquant_compiler.cli.tune import parse_shapes, shapes_of
from mobiquant_compiler.codegen.crossover import NEVER, Row, load, read, tuned_path
from mobiquant_compiler.errors import BadOption, CannotTune, NothingToQuantize
from mobiquant_compiler.runtime import prefill as workspace
from mobiquant_compiler.spec import PREFILL_TOKENS, Activation, Path, Prefill, SliceSpec
from mobiquant_compiler.tuning import COMPARISONS, destination, find_gpu, first_faster, keep, token_counts, tune
from tests.model_dirs import byte_llama, byte_tokenizer, save_plain

H100 = "NVIDIA H100 80GB HBM3"
CPU = torch.device("cpu")
Asked = list[tuple[Path, int, int, int, Prefill]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBIQUANT_CACHE", str(tmp_path / "cache"))


def crossing_at(
    tokens: float, asked: Asked | None = None, fused: Callable[[int, Prefill], float] = lambda tokens, prefill: math.inf
) -> tuning.Timer:
    """Return a timer whose ways cross at `tokens`.

    Integers take as long as there are tokens, the workspace nearly always `tokens`; there are no weights in registers
    unless `fused` says what they take.
    """

    def timer(path: Path, got: int, n: int, k: int, prefill: Prefill) -> float:
        if asked is not None:
            asked.append((path, got, n, k, prefill))
        if path is Path.FUSED:
            return fused(got, prefill)
        return float(got) if path is Path.INTEGER else tokens - 0.5

    return timer


class TestSearch:
    def test_counts_are_a_geometric_series_of_blocks_above_routed_calls(self) -> None:
        counts = token_counts()
        assert (counts[0], counts[-1], len(counts)) == (80, 4096, 2**COMPARISONS - 1)
        assert counts[0] > PREFILL_TOKENS
        assert all(tokens % 8 == 0 for tokens in counts)
        assert all(1.05 < after / before < 1.25 for before, after in pairwise(counts))

    @pytest.mark.parametrize(
        ("crossing", "tokens"), [(1, 65), (80, 65), (81, 88), (300, 336), (4096, 4096), (4097, NEVER)]
    )
    def test_finds_the_first_number_for_which_the_workspace_is_faster(self, crossing: int, tokens: int) -> None:
        assert tune([(512, 256)], crossing_at(crossing)) == (Row(512, 256, tokens, NEVER, 65, 65),)

    def test_weights_in_registers_have_crossings_of_their_own(self) -> None:
        def fused(tokens: int, prefill: Prefill) -> float:
            return 100.5 + tokens / (4 if prefill is Prefill.ROUTED else 2)

        (row,) = tune([(512, 256)], crossing_at(1000, fused=fused))
        counts = token_counts()
        assert row.tokens == next(t for t in counts if t >= 1000)
        assert row.fused == next(t for t in counts if t > 100.5 + t / 4)
        assert row.routed == next(t for t in counts if 100.5 + t / 4 > 999.5)
        assert row.full == next(t for t in counts if 100.5 + t / 2 > 999.5)

    @given(st.integers(1, 5000))
    def test_bisection_agrees_with_trying_all(self, crossing: int) -> None:
        counts = token_counts()
        assert first_faster(lambda t: t >= crossing, counts) == next((t for t in counts if t >= crossing), NEVER)

    def test_a_tie_stays_on_the_integer_path(self) -> None:
        assert tune([(8, 32)], lambda *call: 1.0) == (Row(8, 32, NEVER, NEVER, NEVER, NEVER),)

    @pytest.mark.parametrize("crossing", [1, 500, math.inf])
    def test_measures_little_and_says_how_far_it_is(self, crossing: float) -> None:
        asked: Asked = []
        told: list[tuple[str, int, int]] = []
        shapes = [(512, 256), (64, 1024)]
        rows = tune(shapes, crossing_at(crossing, asked), lambda *news: told.append(news))
        assert [(row.n, row.k) for row in rows] == shapes
        total = 2 * len(tuning.PAIRS) * COMPARISONS
        assert told == [("tuning", done, total) for done in range(1, total + 1)]
        assert len(asked) == 2 * total

    def test_every_shape_has_its_own_crossing(self) -> None:
        def timer(path: Path, tokens: int, n: int, k: int, prefill: Prefill) -> float:
            return crossing_at(n)(path, tokens, n, k, prefill)

        rows = tune([(80, 32), (4096, 32), (9999, 32)], timer)
        assert [row.tokens for row in rows] == [65, 4096, NEVER]

    def test_a_shape_that_does_not_fit_is_named(self) -> None:
        def timer(path: Path, tokens: int, n: int, k: int, prefill: Prefill) -> float:
            raise torch.OutOfMemoryError("CUDA out of memory")

        with pytest.raises(CannotTune, match="shape 900000x900000 does not fit the free memory of the GPU; wanted"):
            tune([(900000, 900000)], timer)


class TestGpu:
    def test_none_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(CannotTune, match="tune: torch finds no CUDA device; wanted a CUDA device with a choice"):
            find_gpu()

    def test_one_without_a_choice_of_paths_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pretend(monkeypatch, "torch._grouped_mm waits for the device on sm_80")
        with pytest.raises(CannotTune, match=r"all calls take the integer path: .* on sm_80; wanted"):
            find_gpu()

    def test_one_with_a_choice_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pretend(monkeypatch, None)
        assert find_gpu() == (torch.device("cuda", 1), H100)

    @staticmethod
    def pretend(monkeypatch: pytest.MonkeyPatch, refusal: str | None) -> None:
        """Let there be two GPUs, the second one present."""
        empty = torch.empty
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: H100)
        monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device: empty(*shape, dtype=dtype))
        monkeypatch.setattr(workspace, "supports", lambda x, n, k: refusal)


class TestTimer:
    @pytest.fixture(autouse=True)
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
        """Record calls of both paths in place of running them; events are as many milliseconds apart as calls."""
        seen: list[tuple] = []

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                self.at = -1

            def record(self) -> None:
                self.at = len(seen)

            def elapsed_time(self, end: Event) -> float:
                return float(end.at - self.at)

        class Graph:
            def replay(self) -> None:
                assert captured.count(self) == 1, "one call is captured"
                seen.append(("replayed",))

        captured: list[Graph] = []

        @contextmanager
        def capture(graph: Graph, stream: object) -> Iterator[None]:
            before = len(seen)
            yield
            captured.extend([graph] * (len(seen) - before))

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(tuning, "FLUSH_BYTES", 16)
        monkeypatch.setattr(workspace, "supports", lambda x, n, k: "too wide" if k > 4096 else None)
        monkeypatch.setattr(wiring, "by_workspace", lambda *args: seen.append(("workspace", *args)))
        monkeypatch.setattr(wiring, "fused_refusal", lambda x, spec: "too wide" if x.shape[1] > 4096 else None)
        monkeypatch.setattr(wiring, "by_fused", lambda *args: seen.append(("fused", *args)))
        monkeypatch.setattr(wiring, "by_integers", lambda *args: seen.append(("integer", *args)))
        return seen

    @pytest.mark.parametrize(
        ("path", "last"),
        [(Path.INTEGER, Activation.A16), (Path.WORKSPACE, Prefill.ROUTED), (Path.FUSED, Prefill.ROUTED)],
        ids=str,
    )
    def test_calls_have_mixed_counts_and_bfloat16(self, calls: list[tuple], path: Path, last: object) -> None:
        assert tuning.device_timer(CPU)(path, 10, 48, 576, Prefill.ROUTED) == 1e-3
        times = tuning.WARM_UPS + 1
        assert calls[times:] == [("replayed",)] * tuning.REPEATS, "what Python takes for a launch is not timed"
        name, x, counts, weights, spec, choice = calls[times - 1]
        assert (name, choice) == (str(path), last)
        assert (x.shape, x.dtype) == ((10, 576), torch.bfloat16)
        assert counts.tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
        assert counts.dtype is torch.int32
        assert spec == SliceSpec((2, 2, 2, 2), 64)
        (weight,) = weights
        assert (weight.slices.shape, weight.slices.dtype) == (spec.packed_shape(48, 576), torch.int32)
        assert weight.scale.shape == weight.zero.shape == spec.scale_shape(48, 576)
        assert weight.bias is None

    @pytest.mark.parametrize("path", [Path.WORKSPACE, Path.FUSED], ids=str)
    def test_full_calls_have_all_slices(self, calls: list[tuple], path: Path) -> None:
        tuning.device_timer(CPU)(path, 10, 48, 576, Prefill.FULL)
        assert calls[0][2].tolist() == [4] * 10
        assert calls[0][-1] is Prefill.FULL

    def test_all_paths_multiply_by_one_weight(self, calls: list[tuple]) -> None:
        timer = tuning.device_timer(CPU)
        for path in (Path.INTEGER, Path.WORKSPACE, Path.FUSED):
            timer(path, 80, 16, 64, Prefill.ROUTED)
        weights = [call[3][0] for call in calls if call != ("replayed",)]
        assert all(weight is weights[0] for weight in weights)
        before = len(calls)
        timer(Path.INTEGER, 80, 32, 64, Prefill.ROUTED)
        assert calls[before][3][0].rows == 32

    def test_a_way_that_cannot_be_taken_takes_for_ever(self, calls: list[tuple]) -> None:
        for path in (Path.WORKSPACE, Path.FUSED):
            assert tuning.device_timer(CPU)(path, 80, 16, 8192, Prefill.ROUTED) == math.inf
        assert not calls
        assert tuning.device_timer(CPU)(Path.WORKSPACE, 80, 16, 8192, Prefill.FULL) == 1e-3


class TestKeep:
    def test_the_table_is_what_calls_look_at_from_then_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: H100)
        wiring._crossover.cache_clear()
        try:
            device, rows = torch.device("cuda", 0), (Row(4096, 4096, 123), Row(64, 64, NEVER))
            assert wiring._crossover(device).rows != rows
            keep(H100, rows, destination(H100))
            assert wiring._crossover(device).rows == load(H100).rows == rows
        finally:
            wiring._crossover.cache_clear()

    def test_another_file(self, tmp_path: FilePath) -> None:
        path = tmp_path / "new" / "a10g.json"
        assert destination("NVIDIA A10G", path) == path
        keep("NVIDIA A10G", (Row(1, 2, 3),), path)
        assert (read(path).gpu, read(path).rows) == ("a10g", (Row(1, 2, 3),))
        assert not tuned_path("a10g").exists()


class TestCommand:
    @pytest.fixture
    def run(self, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
        def call(*arguments: object) -> tuple[int, str, str]:
            with pytest.raises(SystemExit) as info:
                main(["tune", *map(str, arguments)])
            captured = capsys.readouterr()
            return int(info.value.code or 0), captured.out, captured.err

        return call

    @pytest.fixture
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        """Let there be a GPU where the workspace pays from as many tokens on as a weight has rows."""
        asked: Asked = []
        monkeypatch.setattr(tuning, "find_gpu", lambda: (CPU, H100))
        monkeypatch.setattr(
            tuning, "device_timer", lambda device: lambda path, t, n, k, how: crossing_at(n, asked)(path, t, n, k, how)
        )
        return SimpleNamespace(asked=asked)

    @pytest.mark.usefixtures("gpu")
    def test_default_shapes_make_the_users_table(self, run: Callable[..., tuple[int, str, str]]) -> None:
        code, out, err = run()
        assert code == 0
        assert H100 in out
        assert "never" in out
        assert "tuning: 120/120" in err
        assert f"saved {tuned_path('h100')}" in err
        table = load(H100)
        assert table.origin == str(tuned_path("h100"))
        assert tuple((row.n, row.k) for row in table.rows) == tuning.SHAPES
        assert [row.tokens for row in table.rows] == [4096, NEVER, 4096, NEVER, NEVER, NEVER]

    @pytest.mark.usefixtures("gpu")
    def test_json_and_another_file(self, run: Callable[..., tuple[int, str, str]], tmp_path: FilePath) -> None:
        path = tmp_path / "t.json"
        code, out, _ = run("--shapes", "80x64, 9999x32,80x64", "--json", "--output", path)
        assert code == 0
        rest = {"fused": "never", "routed": 65, "full": 65}
        assert json.loads(out) == [
            {"n": 80, "k": 64, "tokens": 65} | rest,
            {"n": 9999, "k": 32, "tokens": "never"} | rest,
        ]
        assert read(path).rows == (Row(80, 64, 65, NEVER, 65, 65), Row(9999, 32, NEVER, NEVER, 65, 65))
        assert not tuned_path("h100").exists()

    @pytest.mark.parametrize("name", [".", "taken/t.json"])
    def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
        self, run: Callable[..., tuple[int, str, str]], gpu: SimpleNamespace, tmp_path: FilePath, name: str
    ) -> None:
        (tmp_path / "taken").touch()
        code, out, err = run("--output", tmp_path / name)
        assert (code, out, gpu.asked) == (2, "", [])
        assert err.startswith("mobiquant: ")
        assert len(err.splitlines()) == 1

    @pytest.mark.usefixtures("gpu")
    def test_a_table_that_cannot_be_kept_is_shown(
        self, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device", "t.json")

        monkeypatch.setattr(tuning, "keep", full)
        code, out, err = run("--shapes", "80x64")
        assert code == 2
        assert "80" in out
        assert "t.json: No space left on device" in err

    def test_linears_of_a_checkpoint(
        self, run: Callable[..., tuple[int, str, str]], gpu: SimpleNamespace, tmp_path: FilePath
    ) -> None:
        model = byte_llama()
        mq.quantize_(model, mq.SliceConfig(exclude=["*.q_proj"]))
        shapes = {(m.out_features, m.in_features) for m in mq.linear.elastic_linears(model).values()}
        checkpoint.save(model, tmp_path / "c", tokenizer=byte_tokenizer())
        assert run(tmp_path / "c")[0] == 0
        assert {(n, k) for _, _, n, k, _ in gpu.asked} == shapes
        assert len(read(tuned_path("h100")).rows) == len(shapes)

    def test_linears_of_a_plain_model(
        self, run: Callable[..., tuple[int, str, str]], gpu: SimpleNamespace, tmp_path: FilePath
    ) -> None:
        assert run(save_plain(tmp_path / "m"))[0] == 0
        model = byte_llama()
        mq.quantize_(model)
        assert {(n, k) for _, _, n, k, _ in gpu.asked} == set(shapes_of(model))

    def test_a_model_without_linears(self) -> None:
        with pytest.raises(NothingToQuantize, match=r"no nn\.Linear or Conv1D in it"):
            shapes_of(torch.nn.ReLU())

    @pytest.mark.parametrize("shapes", ["", "4096", "4096x", "4096x4096,", "0x64", "-1x64", "64x1.5", "axb", "9x9x9"])
    def test_bad_shapes_are_refused_by_name(self, run: Callable[..., tuple[int, str, str]], shapes: str) -> None:
        with pytest.raises(BadOption, match="--shapes"):
            parse_shapes(shapes)
        code, out, err = run("--shapes", shapes)
        assert (code, out) == (2, "")
        assert err == (
            f"mobiquant: command line: option '--shapes' got {shapes!r}; wanted output rows by input columns, NxK,NxK, "
            "as in 4096x4096,14336x4096.\n"
        )

    def test_shapes_and_a_model_are_too_much(self, run: Callable[..., tuple[int, str, str]]) -> None:
        code, _, err = run("smollm2", "--shapes", "64x64")
        assert code == 2
        assert "'--shapes' got '64x64'; wanted no MODEL beside it" in err

    def test_no_gpu_costs_one_line(
        self, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        code, out, err = run()
        assert (code, out) == (2, "")
        assert err.startswith("mobiquant: tune: torch finds no CUDA device; wanted ")
        assert len(err.splitlines()) == 1
        assert not tuned_path("h100").exists()
