"""`mobiquant quantize` as a user meets it: what it writes, says, and refuses, and before what."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mobiquant_compiler as mq
from mobiquant_compiler import checkpoint
from mobiquant_compiler.linear import elastic_linears
from tests.model_dirs import byte_tokenizer

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--windows", "2", "--length", "32")


def test_quantize_can_calibrate_and_go_on(run: Run, plain: str, tmp_path: Path) -> None:
    options = (*SMALL, "--calibrate", "--steps", "2", "--state", tmp_path / "state", "--offload", "--json")
    code, out, err = run("quantize", plain, tmp_path / "out", *options)
    assert code == 0, err
    assert len(json.loads(out)["rewritten"]) == len(elastic_linears(checkpoint.load(tmp_path / "out")))
    assert all(f"{stage}: " in err for stage in ("sensitivity", "blocks", "scales", "budget table"))
    code, _, err = run("quantize", plain, tmp_path / "out", *options)
    assert code == 0
    assert "sensitivity: " not in err
    assert run("quantize", plain, tmp_path / "free", *SMALL)[0] == 0
    free, chosen = (elastic_linears(checkpoint.load(tmp_path / name)) for name in ("free", "out"))
    assert not any(torch.equal(linear.slices, chosen[name].slices) for name, linear in free.items())


def test_calibrating_takes_windows_spread_over_the_text_and_says_where_there_are_fewer(
    run: Run, plain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("".join(chr(97 + i % 26) for i in range(5 * 16 + 3)))
    ids = torch.tensor(byte_tokenizer()(text.read_text()).input_ids)
    seen: dict[str, torch.Tensor] = {}
    inner = {name: getattr(mq, name) for name in ("calibrate_", "quantize_")}
    monkeypatch.setattr(
        mq, "calibrate_", lambda m, t, *a, **o: seen.update(chosen=t) or inner["calibrate_"](m, t, *a, **o)
    )
    monkeypatch.setattr(
        mq, "quantize_", lambda m, *a, **o: seen.update(free=o["calibration"]) or inner["quantize_"](m, *a, **o)
    )
    options = ("--calibration", text, "--length", "16", "--check-windows", "0")
    code, _, err = run("quantize", plain, tmp_path / "c", *options, "--calibrate", "--steps", "0")
    assert code == 0, err
    assert f"{text} holds 5 windows of 16 tokens, not 64: calibrating on 5" in err
    assert seen["chosen"].shape == (5, 16)
    assert torch.equal(seen["chosen"][-1], ids[-16:])
    code, _, err = run("quantize", plain, tmp_path / "c", *options, "--calibrate", "--steps", "0", "--windows", "2")
    assert (code, "calibrating on" in err) == (0, False)
    assert torch.equal(seen["chosen"], torch.stack([ids[:16], ids[-16:]]))
    assert run("quantize", plain, tmp_path / "f", *options, "--windows", "2")[0] == 0
    assert torch.equal(seen["free"], ids[:32].view(2, 16)), "data-free slices take the start of the text"


def test_calibration_options_need_calibrate_and_a_text(fails: Callable[..., str], plain: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "'--state' got" in fails("quantize", plain, out, "--state", tmp_path / "s")
    assert "'--offload' got" in fails("quantize", plain, out, "--offload")
    for given in (("--steps", "5"), ("--router", "mlp"), ("--seed", "3")):
        assert f"'{given[0]}' got '{given[1]}'; wanted --calibrate with it" in fails("quantize", plain, out, *given)
    assert "'--calibration' got 'none'" in fails("quantize", plain, out, "--calibrate", "--calibration", "none")
    assert "'tune_steps' got -1" in fails("quantize", plain, out, "--calibrate", "--steps", "-1")
    assert not out.exists()


class TestQuantize:
    def test_writes_a_checkpoint_and_says_what_it_did(self, run: Run, plain: str, tmp_path: Path) -> None:
        code, out, err = run("quantize", plain, tmp_path / "c", "--budget", "4.5", *SMALL)
        assert code == 0
        assert out == f"saved {tmp_path / 'c'}\n"
        assert "7 of 8 linears elastic; skipped: lm_head (tied" in err
        assert "budget table" in err
        model, tokenizer = checkpoint.load(tmp_path / "c"), byte_tokenizer()
        assert mq.get_budget(model) == 4.5
        assert model(torch.tensor([tokenizer("x").input_ids])).logits.isfinite().all()

    def test_options_reach_the_slices(self, run: Run, plain: str, tmp_path: Path) -> None:
        options = ["--widths", "2,3,3", "--layout", "bit_major", "--group", "32", "--scope", "linear"]
        options += ["--exclude", "*.q_proj", "--floor", "*.o_proj=2", "--ceiling", "*.down_proj=2"]
        code, out, _ = run("quantize", plain, tmp_path / "c", *options, "--calibration", "none", "--json")
        assert code == 0
        found = json.loads(out)
        assert {"name": "model.layers.0.self_attn.q_proj", "reason": "excluded by name", "detail": ""} in found[
            "skipped"
        ]
        rows = {
            r["name"].rpartition(".")[2]: r for r in json.loads(run("inspect", tmp_path / "c", "--json")[1])["linears"]
        }
        assert "q_proj" not in rows
        assert rows["k_proj"]["widths"] == "2+3+3"
        assert (rows["k_proj"]["layout"], rows["k_proj"]["group"]) == ("bit_major", 32)
        assert (rows["o_proj"]["counts"], rows["down_proj"]["counts"]) == ("2 to 3", "1 to 2")

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--widths", "2;2"], "--widths"),
            (["--widths", "2,7"], "widths"),
            (["--group", "100"], "group"),
            (["--layout", "sideways"], "layout"),
            (["--scope", "galaxy"], "scope"),
            (["--floor", "down_proj"], "'--floor' got 'down_proj'; wanted PATTERN=COUNT"),
            (["--ceiling", "*=9"], "ceiling"),
            (["--budget", "1"], "option '--budget' got 1.0; wanted 2 to 8 bits"),
            (["--dtype", "int8"], "dtype"),
            (["--device", "abacus"], "--device"),
            (["--windows", "0"], "--windows"),
            (["--calibration", "nowhere.txt"], "text nowhere.txt: cannot be read"),
            (["--windows", "9999"], "the text gives"),
            (["--windows", "2", "--calibrate", "--length", "9999999"], "wanted at least 9999999"),
            (["--strict"], "strict: 1 linears"),
            (["--include", "nothing"], "no linear layer to quantize"),
        ],
    )
    def test_bad_options(
        self, fails: Callable[..., str], plain: str, tmp_path: Path, options: list[str], words: str
    ) -> None:
        given = ["--calibration", "none"] if "--windows" not in options else []
        assert words in fails("quantize", plain, tmp_path / "c", *given, *options)
        assert not (tmp_path / "c").exists()

    def test_output_that_holds_something_else(self, fails: Callable[..., str], plain: str, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").touch()
        assert "thesis.tex" in fails("quantize", plain, tmp_path, "--calibration", "none")
        assert "it is a file" in fails("quantize", plain, tmp_path / "thesis.tex", "--calibration", "none")

    @pytest.mark.parametrize("budget", ["9", "1.9", "nan"])
    def test_mistakes_are_found_before_anything_is_loaded(
        self, fails: Callable[..., str], tmp_path: Path, budget: str
    ) -> None:
        said = fails("quantize", "no-such-model", tmp_path / "c", "--budget", budget)
        assert f"'--budget' got {budget}" in said
        assert "wanted 2 to 8 bits" in said
        assert "'--length' got 1; wanted at least 2" in fails("quantize", "none", tmp_path / "c", "--length", "1")
        (tmp_path / "thesis.tex").touch()
        assert "thesis.tex" in fails("quantize", "no-such-model", tmp_path)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--floor", "nothing.*=2"], "floor"),
            (["--ceiling", "nothing.*=2"], "ceiling"),
            (["--include", "nothing"], "no linear layer to quantize"),
            (["--strict"], "strict: 1 linears"),
        ],
    )
    def test_what_linears_refuse_is_found_before_anything_is_measured(
        self,
        fails: Callable[..., str],
        plain: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        options: list[str],
        words: str,
    ) -> None:
        monkeypatch.setattr("mobiquant_compiler.analysis.quality.plain_rows", lambda *_, **__: pytest.fail("measured"))
        monkeypatch.setattr("mobiquant_compiler.cli.quantize._calibration", lambda *_, **__: pytest.fail("a text read"))
        assert words in fails("quantize", plain, tmp_path / "c", *options)

    def test_what_is_elastic_already(self, fails: Callable[..., str], elastic: str, tmp_path: Path) -> None:
        for command in (("quantize", elastic, tmp_path / "c"), ("demo", "--model", elastic)):
            assert "wanted a model that was not quantized yet" in fails(*command)
