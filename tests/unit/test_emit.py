"""`mobiquant emit`: readable kernels of a spec or a model, and what they take of a target that need not be there."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mobiquant_compiler as mq
from mobiquant_compiler import checkpoint
from mobiquant_compiler.cli import main
from mobiquant_compiler.codegen import cache, compiling, resources, toolchain
from mobiquant_compiler.codegen.configs import Target, TokenClass, kernel_spec
from mobiquant_compiler.codegen.specialise import template_digest
from mobiquant_compiler.errors import TritonMissing
from mobiquant_compiler.spec import Family, SliceSpec
from tests.model_dirs import byte_llama, byte_tokenizer, save_plain

Run = Callable[..., tuple[int, str, str]]
# Kernels of two slices and 64 columns are small: a second to compile.
SMALL = ("--widths", "2,2", "--group", "32", "--k", "64", "--n", "16")
KIND = {"route_quantize": 3, "sliced_mma": 1, "dequantize": 2, "gather_tokens": 1, "sliced_wgmma": 2}
LISTING = """
Resource usage:
 Function dequantize:
  REG:64 STACK:8 SHARED:0 LOCAL:4 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
        /*0000*/                   LDC R1, c[0x0][0x28] ;            /* 0x00000a00ff017b82 */
                                                                     /* 0x000e220000000800 */
        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;           /* 0x00000000000a7919 */
        /*0020*/              @UPT IMMA.16832.U8.S8 R4, R4, R8, RZ ; /* 0x00000000000a7919 */
        /*0030*/                   NOP ;                             /* 0x00000000000a7919 */
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBIQUANT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as info:
            main(["emit", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(info.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record what would be compiled: tests that look at files need no binaries."""
    seen: list[Any] = []

    def measured(*args: Any) -> resources.Resources:
        seen.append(args)
        return resources.Resources(registers=7, ptx="// ptx")

    monkeypatch.setattr(resources, "measure", measured)
    monkeypatch.setattr(compiling, "compile_all", lambda jobs, asked, progress: progress(len(jobs)) or 0)
    return seen


class TestSpec:
    def test_a_family_that_serves_no_such_launch_says_so(self, run: Run, tmp_path: Path) -> None:
        code, out, err = run(tmp_path, *SMALL, "--family", "sliced_wgmma", "--target", "80", "--json")
        assert (code, json.loads(out)) == (0, [])
        words = "no sliced_wgmma kernel serves this on sm_80: that depends on --tokens, --n, --k and the slices; "
        assert words + "--family all shows which kernels do" in " ".join(err.split())

    @pytest.mark.usefixtures("uncompiled")
    def test_every_family_by_default(self, run: Run, tmp_path: Path) -> None:
        code, out, err = run(tmp_path / "out", *SMALL, "--json")
        assert code == 0
        rows = json.loads(out)
        assert {f: [row["family"] for row in rows].count(f) for f in KIND} == KIND
        assert {Path(row["file"]) for row in rows} == set((tmp_path / "out").iterdir())
        for row in rows:
            text = Path(row["file"]).read_text(encoding="utf-8")
            assert row["family"] in {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
            assert row["template"] == template_digest(Family(row["family"]))
            assert f"sha256 {row['template']}" in text
            assert f"sha256 {row['modules']}" in text
            assert (row["registers"], row["target"], row["x_dtype"], row["ptx"]) == (7, "sm_90", "bf16", None)
        assert "kernels: 9/9" in err

    def test_options_reach_the_kernel(self, run: Run, uncompiled: list[Any], tmp_path: Path) -> None:
        options = ["--family", "sliced_mma", "--tokens", "9", "--activation", "a8", "--bias", "--parts", "3"]
        options += ["--widths", "3,3", "--layout", "bit_major", "--group", "64", "--k", "100", "--n", "9999"]
        assert run(tmp_path, *options, "--target", "80", "--dtype", "float16")[0] == 0
        ((spec, cc, dtypes),) = uncompiled
        weight = SliceSpec((3, 3), 64, "bit_major")  # type: ignore[arg-type]
        facts = {"n": 9999, "activation": "a8", "has_bias": True, "parts": 3}
        assert spec == kernel_spec(Family.SLICED_MMA, weight, 100, TokenClass.of(9), Target.of(80), **facts)
        assert (cc, dtypes.x, dtypes.scale) == (80, "fp16", "fp16")

    def test_binaries_are_compiled_beforehand(
        self, run: Run, uncompiled: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[compiling.Job] = []
        monkeypatch.setattr(compiling, "compile_all", lambda jobs, asked, progress: seen.extend(jobs) or 0)
        assert run(tmp_path, *SMALL, "--target", "80")[0] == 0
        assert seen == uncompiled
        assert {cc for _, cc, _ in seen} == {80}

    def test_a_trained_router(self, run: Run, uncompiled: list[Any], tmp_path: Path) -> None:
        assert run(tmp_path, *SMALL, "--family", "route_quantize", "--hidden", "12")[0] == 0
        routing = [spec for spec, *_ in uncompiled if spec.route]
        assert {(spec.hidden, spec.block_m, spec.quantize) for spec in routing} == {
            (12, m, quantize) for m in (1, 4) for quantize in (False, True)
        }
        assert len(uncompiled) == len(routing) + 1

    @pytest.mark.usefixtures("uncompiled")
    def test_ptx_lies_beside(self, run: Run, tmp_path: Path) -> None:
        code, out, _ = run(tmp_path, *SMALL, "--family", "sliced_mma", "--ptx", "--json")
        (row,) = json.loads(out)
        assert Path(row["ptx"]).read_text() == "// ptx"
        assert Path(row["ptx"]).name == f"{row['name']}.sm90.bf16.fp16.ptx"
        assert code == 0

    def test_a_table_of_what_is_compiled(self, run: Run, tmp_path: Path) -> None:
        pytest.importorskip("triton")
        code, out, _ = run(tmp_path, *SMALL, "--family", "dequantize", "--ptx")
        assert code == 0
        assert all(word in out for word in ("registers", "spilled bytes", "dequantize", "yes"))
        assert ".target sm_90" in next(tmp_path.glob("*.ptx")).read_text()

    @pytest.mark.usefixtures("uncompiled")
    def test_a_directory_in_use_is_added_to(self, run: Run, tmp_path: Path) -> None:
        for family in KIND:
            assert run(tmp_path / "out", *SMALL, "--family", family)[0] == 0
        assert len(list((tmp_path / "out").iterdir())) == sum(KIND.values())

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (
                ["--family", "gemv"],
                "'--family' got 'gemv'; wanted one of route_quantize, sliced_mma, dequantize, gather_tokens, ",
            ),
            (["--widths", "2;2"], "'--widths' got '2;2'"),
            (["--widths", "2,7"], "widths (slice_major) got (2, 7)"),
            (["--widths", "4,4,4"], "widths got (4, 4, 4)"),
            (["--group", "48"], "group got 48"),
            (["--layout", "sideways"], "layout got 'sideways'"),
            (["--k", "0"], "'--k' got 0"),
            (["--k", "100000000"], "'--k' got 100000000; wanted 1 to 1048576"),
            (["--n", "-1"], "'--n' got -1"),
            (["--n", "99999999999"], "'--n' got 99999999999; wanted 1 to 16777216"),
            (["--n", "3", "--parts", "4"], "'--n' got 3; wanted 4 to 16777216"),
            (["--tokens", "0"], "'--tokens' got 0"),
            (["--hidden", "-1"], "'--hidden' got -1; wanted at least 0"),
            (["--parts", "5"], "parts got 5; wanted 1 to 4"),
            (["--activation", "a4"], "'--activation' got 'a4'"),
            (["--dtype", "int8"], "command line: option '--dtype' got 'int8'"),
            (["--target", "75"], "'--target' got 75; wanted one of 80,"),
            (["one", "more"], "wanted one or two arguments"),
        ],
    )
    def test_bad_options_cost_one_line(self, run: Run, tmp_path: Path, options: list[str], words: str) -> None:
        code, out, err = run(tmp_path / "out", *options)
        assert (code, out) == (2, "")
        assert words in err
        assert err.startswith("mobiquant: ")
        assert len(err.splitlines()) == 1
        assert not (tmp_path / "out").exists()

    def test_a_model_in_the_way(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "config.json").touch()
        for places in ((tmp_path,), (tmp_path, tmp_path)):
            code, _, err = run(*places)
            assert code == 2
            assert "to emit the kernels of one give MODEL OUTPUT" in err
        assert [path.name for path in tmp_path.iterdir()] == ["config.json"]

    def test_a_file_in_the_way(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "out").touch()
        code, _, err = run(tmp_path / "out")
        assert code == 2
        assert "wanted a directory" in err


class TestModel:
    def test_all_kernels_of_a_checkpoint(self, run: Run, uncompiled: list[Any], tmp_path: Path) -> None:
        model = byte_llama()
        mq.quantize_(model, calibration=torch.arange(64).view(2, 32))
        checkpoint.save(model, tmp_path / "c", tokenizer=byte_tokenizer())
        assert run(tmp_path / "c", tmp_path / "out")[0] == 0
        of_others = {Family.GATHER_TOKENS, Family.SLICED_WGMMA, Family.RESIDENT_MMA}  # half precision, or many rows
        assert {spec.family for spec, *_ in uncompiled} == set(Family) - of_others
        products = [spec for spec, *_ in uncompiled if spec.family is Family.SLICED_MMA]
        assert {spec.parts for spec in products} == {1, 2, 3}
        assert {spec.block_m for spec in products} == {1, 8, 16, 32}
        assert {dtypes.x for _, _, dtypes in uncompiled} == {"fp32"}

    def test_a_plain_model_is_sliced_as_the_backend_would(
        self, run: Run, uncompiled: list[Any], tmp_path: Path
    ) -> None:
        source = save_plain(tmp_path / "m")
        options = ["--activation", "a8", "--tokens", "1", "--dtype", "bfloat16"]
        assert run(source, tmp_path / "out", *options)[0] == 0
        assert {spec.family for spec, *_ in uncompiled} == {Family.ROUTE_QUANTIZE, Family.SLICED_MMA}
        assert {spec.activation for spec, *_ in uncompiled if spec.family is Family.SLICED_MMA} == {"a8"}
        assert {(dtypes.x, dtypes.scale) for _, _, dtypes in uncompiled} == {("bf16", "fp32")}

    @pytest.mark.parametrize("option", [("--k", "64"), ("--widths", "2,2"), ("--bias",), ("--hidden", "3")], ids=str)
    def test_a_spec_beside_a_model_is_refused(self, run: Run, tmp_path: Path, option: tuple[str, ...]) -> None:
        code, _, err = run("smollm2", tmp_path / "out", *option)
        assert code == 2
        assert f"option '{option[0]}' got" in err
        assert "wanted no such option beside MODEL" in err

    def test_a_model_that_is_not_there(self, run: Run, tmp_path: Path) -> None:
        code, _, err = run(tmp_path / "nothing", tmp_path / "out")
        assert code == 2
        assert "no such directory" in err


class TestResources:
    SPEC = kernel_spec(Family.DEQUANTIZE, SliceSpec((2, 2), 32), 64, TokenClass.MANY, Target.of(90))

    @pytest.fixture
    def binary(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        """Let a binary be there that nothing compiled."""
        found = SimpleNamespace(
            metadata=SimpleNamespace(shared=96, num_warps=8), asm={"ptx": "// ptx", "cubin": b"cubin"}
        )
        monkeypatch.setattr(cache, "compile_for", lambda spec, cc, dtypes: found)
        monkeypatch.setattr(toolchain, "interpreting", lambda: False)
        return found

    @pytest.fixture
    def tool(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
        """Let cuobjdump print a text."""

        def prints(text: str) -> None:
            path = tmp_path / "cuobjdump"
            path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
            path.chmod(0o755)
            monkeypatch.setattr(toolchain, "cuobjdump", lambda: str(path))

        return prints

    @pytest.mark.usefixtures("binary")
    def test_what_the_disassembler_says(self, tool: Callable[[str], None]) -> None:
        tool(LISTING)
        wanted = resources.Resources(96, 64, 12, instructions=3, loads=1, products=1, ptx="// ptx")
        assert resources.measure(self.SPEC, 90) == wanted

    @pytest.mark.usefixtures("binary")
    def test_what_does_not_fit(self, binary: SimpleNamespace, tool: Callable[[str], None]) -> None:
        tool(LISTING.replace("REG:64", "REG:1000"))
        assert not resources.measure(self.SPEC, 90).fits
        tool(LISTING)
        binary.metadata.shared = 10**6
        assert not resources.measure(self.SPEC, 90).fits

    @pytest.mark.usefixtures("binary")
    def test_a_disassembler_that_cannot_read_the_target(self, tool: Callable[[str], None]) -> None:
        tool("cuobjdump fatal: unknown architecture")
        found = resources.measure(self.SPEC, 90)
        assert (found.registers, found.instructions, found.shared_bytes) == (None, None, 96)
        assert "cannot read binaries of sm_90" in found.note

    @pytest.mark.usefixtures("binary")
    @pytest.mark.parametrize("path", [None, "/nowhere/cuobjdump"], ids=["unknown", "gone"])
    def test_no_disassembler(self, path: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(toolchain, "cuobjdump", lambda: path)
        found = resources.measure(self.SPEC, 90)
        assert (found.registers, found.shared_bytes, found.fits) == (None, 96, True)
        assert "cuobjdump" in found.note

    def test_no_triton(self, monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path) -> None:
        def missing() -> None:
            raise TritonMissing(reason="not installed")

        monkeypatch.setattr(toolchain, "triton", missing)
        code, out, err = run(tmp_path / "out", *SMALL, "--json")
        assert code == 0
        assert {(row["registers"], row["fits"]) for row in json.loads(out)} == {(None, True)}
        assert err.count("CUDA kernels need triton (not installed)") == 1
        assert len(list((tmp_path / "out").iterdir())) == 9
        assert toolchain.version() == "absent"

    def test_a_triton_without_tools(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(toolchain, "triton", lambda: SimpleNamespace(knobs=SimpleNamespace(nvidia=None)))
        assert toolchain.cuobjdump() is None

    def test_the_interpreter_compiles_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(toolchain, "interpreting", lambda: True)
        assert "TRITON_INTERPRET=1" in resources.measure(self.SPEC, 90).note

    def test_binaries_for_targets_do_not_count_as_launched(self) -> None:
        pytest.importorskip("triton")
        before = cache.compiled_kernels()
        found = resources.measure(self.SPEC, 90)
        assert cache.compiled_kernels() == before
        assert found.registers
        assert found.registers <= 255
        assert found.local_bytes == 0
        assert found.instructions
        assert found.loads
        assert (found.products, found.fits, found.note) == (0, True, "")
