"""Binding of templates, tile configurations, emission and cache: all without a GPU."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mobiquant_compiler.codegen import boxes, cache, configs, specialise, toolchain
from mobiquant_compiler.codegen.configs import (
    Target,
    TokenClass,
    choose,
    fits,
    kernel_spec,
    shared_bytes,
)
from mobiquant_compiler.codegen.signature import Dtypes, parameter_type
from mobiquant_compiler.errors import BadKernelSpec, KernelDoesNotFit, TritonMissing
from mobiquant_compiler.spec import PREFILL_TOKENS, Activation, Family, Layout, SliceSpec
from tests.chosen_specs import spec_of

H100 = Target.of(90)
MMA, FIRST, DEQUANTIZE = Family.SLICED_MMA, Family.ROUTE_QUANTIZE, Family.DEQUANTIZE
GATHER, WGMMA, BATCH = Family.GATHER_TOKENS, Family.SLICED_WGMMA, Family.BATCH_WGMMA
RESIDENT = Family.RESIDENT_MMA
IN_TABLE = [family for family in Family if family not in (WGMMA, BATCH, RESIDENT)]  # which have choosers of their own


def parameters(source: str, function: str) -> list[str]:
    """Return the parameter names of a function of emitted source."""
    found = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == function)
    return [a.arg for a in found.args.args]


# --- specialise --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(Family))
def test_no_bound_name_is_left(family: Family) -> None:
    spec = spec_of(family)
    source = specialise.specialise(spec)
    names = {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)}
    assert not names & set(specialise.bindings(spec))
    assert "static_assert" not in source
    for name in parameters(source, family):
        if boxes.is_described(name):
            assert len(boxes.box_of(name, spec).shape) in (2, 3)
        else:
            parameter_type(name, family, Dtypes())


@pytest.mark.parametrize("family", list(Family))
def test_every_constexpr_of_a_template_is_bound(family: Family) -> None:
    tree = ast.parse(specialise.template_path(family).read_text(encoding="utf-8"))
    kernel = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == family)
    wanted = {a.arg for a in kernel.args.args if a.annotation is not None}
    assert wanted <= set(specialise.bindings(spec_of(family)))
    assert ast.get_docstring(kernel)
    assert isinstance(kernel.body[1], ast.Expr)
    assert "static_assert" in ast.unparse(kernel.body[1])


def test_the_header_says_what_was_bound() -> None:
    spec = spec_of(MMA)
    header = [line for line in specialise.specialise(spec).splitlines() if line.startswith("#")]
    for name, value in spec.describe().items():
        assert f"# {name}: {value}" in header
    assert f"# template: templates/sliced_mma.py, sha256 {specialise.template_digest(MMA)}" in header


@pytest.mark.parametrize("changed", ["sliced_mma.py", "one_token.py", "resident_layout.py"])
def test_files_that_run_differently_look_different(monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    spec, source = spec_of(MMA), specialise._source
    before, key = specialise.specialise(spec), cache.cache_key(spec)
    monkeypatch.setattr(specialise, "_source", lambda path: source(path) + "\n# more" * (path.name == changed))
    assert specialise.specialise(spec) != before
    assert cache.cache_key(spec) != key


def test_dead_branches_and_their_parameters_are_gone() -> None:
    plain = parameters(specialise.specialise(spec_of(MMA)), "sliced_mma")
    full = parameters(specialise.specialise(spec_of(MMA, has_bias=True)), "sliced_mma")
    assert "bias_ptr" not in plain
    assert "bias_ptr" in full
    assert len(full) == len(plain) + 1


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("family", "own"), [(MMA, ("slices{}_ptr", "n{}_rows")), (BATCH, ("slices{}_desc", "row{}_units"))], ids=str
)
def test_a_launch_has_parameters_for_its_weights_and_no_others(
    family: Family, own: tuple[str, ...], parts: int
) -> None:
    source = specialise.specialise(spec_of(family, parts=parts, has_bias=True))
    found = parameters(source, family)
    for stem in (*own, "scale{}_ptr", "zero{}_ptr", "bias{}_ptr", "y{}_ptr"):
        names = [stem.format(mark) for mark in ("", "1", "2", "3")]
        assert [name in found for name in names] == [number < parts for number in range(4)]


def test_either_half_of_the_first_kernel_can_stand_alone() -> None:
    routing = {"energy_ptr", "gain_ptr", "thresholds_ptr", "hist_ptr", "mask_ptr", "counts_ptr", "capacity"}
    bytes_ = {"high_ptr", "low_ptr", "affine_ptr"}

    def found(**options) -> set[str]:
        return set(parameters(specialise.specialise(spec_of(FIRST, **options)), "route_quantize"))

    assert routing | bytes_ <= found()
    assert found(quantize=False) == found() - bytes_
    assert found(route=False) == found() - routing
    assert found(activation=Activation.A8) == found() - {"low_ptr"}
    assert found(route=False, token_rows=True) == found(route=False) | {"counts_ptr", "placed_ptr", "sums_ptr"}
    assert found(hidden=12) == found() | {"hidden_ptr", "hidden_bias_ptr", "out_ptr", "out_bias_ptr"}


def test_waiting_is_for_kernels_that_overlap() -> None:
    for family in (MMA, FIRST):
        spec = spec_of(family)
        assert specialise.specialise(spec).count("gdc_wait()") == 1
        assert "gdc_wait()" not in specialise.specialise(replace(spec, overlap=False))
    assert "gdc_wait()" not in specialise.specialise(spec_of(DEQUANTIZE))


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (MMA, {"block_m": 4}, "a program has one token, or blocks of eight"),
        (MMA, {"block_n": 8}, "a warp has tiles of 16 rows"),
        (MMA, {"block_m": 1, "block_n": 32, "row_tiles": 2}, "a warp has tiles of 16 rows"),
        (MMA, {"block_n": 128, "num_warps": 8}, "2 to 8 warps share"),
        (MMA, {"block_n": 16, "num_warps": 16}, "2 to 8 warps share"),
        (FIRST, {"block_w": 64}, "a program quantizes whole groups"),
        (FIRST, {"block_m": 4}, "a data-free router has a program for every token"),
        (FIRST, {"hidden": 12, "block_r": 64}, "a step gives two columns to each thread"),
        (DEQUANTIZE, {"block_w": 64}, "a run has whole groups"),
    ],
)
def test_a_static_assert_that_fails_is_an_error_of_ours(family: Family, change: dict[str, int], message: str) -> None:
    with pytest.raises(BadKernelSpec, match=rf"kernel {family}: .*{message}"):
        specialise.specialise(replace(spec_of(family), **change))


@pytest.mark.parametrize(
    ("name", "value"),
    [("block_n", 3), ("num_warps", 0), ("num_stages", 0), ("block_r", 3), ("k", 100), ("parts", 0), ("parts", 5)],
)
def test_a_spec_that_cannot_be_is_refused(name: str, value: int) -> None:
    with pytest.raises(BadKernelSpec, match=f"kernel sliced_mma: {name} got {value}"):
        replace(spec_of(MMA), **{name: value})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a = 1 if FLAG else 2", "a = 1"),
        ("if FLAG and x:\n    y()", "if x:\n    y()"),
        ("if not FLAG or x:\n    y()", "if x:\n    y()"),
        ("if FLAG or x:\n    y()\nelse:\n    z()", "y()"),
        ("if COUNT == 3:\n    y()\nelif x:\n    z()", "if x:\n    z()"),
        ("a = SIZES[1] * COUNT + x", "a = 6 + x"),
        ("tl.static_assert(x > COUNT, 'left to triton')", "tl.static_assert(x > 2, 'left to triton')"),
    ],
)
def test_folding(text: str, wanted: str) -> None:
    values = {"FLAG": True, "COUNT": 2, "SIZES": (5, 3)}
    tree = specialise._Bind(spec_of(FIRST), values, set()).visit(ast.parse(text))
    assert ast.unparse(ast.fix_missing_locations(tree)) == wanted


# --- configurations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cc", [75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("tokens", list(TokenClass))
@pytest.mark.parametrize("group", [32, 64, 128])
def test_there_is_a_tile_for_every_class_and_target(cc: int, tokens: TokenClass, group: int) -> None:
    target = Target.of(cc)
    for family in IN_TABLE:
        for widths in ((2, 2, 2, 2), (1,) * 8, (4, 2)):
            spec = kernel_spec(family, SliceSpec(widths, group), 4096, tokens, target)
            assert fits(spec, target)
            assert spec.overlap == (cc >= 90 and family in (FIRST, MMA))
            if cc == H100.cc:
                specialise.specialise(spec)


def test_the_estimate_grows_with_the_tile() -> None:
    first, many = spec_of(FIRST), spec_of(DEQUANTIZE)
    assert shared_bytes(replace(many, block_n=2 * many.block_n)) == 2 * shared_bytes(many)
    assert shared_bytes(replace(many, block_w=2 * many.block_w)) == 2 * shared_bytes(many)
    assert shared_bytes(replace(first, num_warps=2 * first.num_warps)) == 2 * shared_bytes(first)


def test_the_next_tile_is_taken_where_the_best_does_not_fit() -> None:
    best = spec_of(DEQUANTIZE)
    half = replace(best, block_n=best.block_n // 2)
    for limit, wanted in ((shared_bytes(best), best), (shared_bytes(best) - 1, half)):
        assert choose((best, half), Target(75, limit)) is wanted


def test_no_tile_at_all_is_an_error_that_says_by_how_much() -> None:
    with pytest.raises(KernelDoesNotFit, match=r"kernel dequantize: .* sm_75 .* limit 1000\)"):
        kernel_spec(DEQUANTIZE, SliceSpec(), 4096, TokenClass.MANY, Target(75, 1000))


def test_an_unknown_target_is_taken_for_the_next_older_one() -> None:
    assert Target.of(91).shared_bytes == Target.of(90).shared_bytes
    assert Target.of(60).shared_bytes == Target.of(75).shared_bytes


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 32, 33, 64, 65, 10000])
def test_token_classes_cover_all_numbers(tokens: int) -> None:
    found = TokenClass.of(tokens)
    assert TokenClass.of(found.sample) is found
    low, _, high = found.value.partition("..")
    assert int(low) <= tokens <= int(high or (low if tokens == 1 else tokens))


@pytest.mark.parametrize("k", [32, 100, 576, 1536, 4096, 11008, 40000])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_programs_quantize_whole_groups_and_few_columns_too_many(k: int, group: int) -> None:
    spec = kernel_spec(FIRST, SliceSpec(group=group), k, TokenClass.ONE, H100)
    assert spec.block_w % group == 0
    assert spec.block_w <= max(group, 256 * spec.num_warps), "16 bytes of bfloat16 a thread"
    for block in (spec.block_w, spec.block_r):
        assert block < 2 * spec.k
    assert spec.columns == k
    for family in IN_TABLE:
        weight = SliceSpec(group=group)
        assert kernel_spec(family, weight, k, TokenClass.MANY, H100).k == weight.padded(k)


def test_every_number_of_tokens_on_the_integer_path_has_one_kernel() -> None:
    """A kernel serves a class, so that warming up a class leaves nothing to compile."""
    for tokens in range(1, 2 * PREFILL_TOKENS):
        spec = spec_of(MMA, tokens=tokens)
        assert spec == spec_of(MMA, tokens=TokenClass.of(tokens).sample)
        assert spec.block_m == min(n for n in (1, 8, 16, 32) if n >= min(tokens, 32))


def test_what_does_not_concern_a_family_does_not_make_another_kernel() -> None:
    many = {"has_bias": True, "parts": 3}
    assert spec_of(FIRST, **many) == spec_of(FIRST)
    assert spec_of(DEQUANTIZE, tokens=3, **many) == spec_of(DEQUANTIZE)
    for name in ("route", "quantize", "sorted_rows"):
        assert spec_of(MMA, **{name: False}) == spec_of(MMA)
    assert spec_of(FIRST, emulate=True) == replace(spec_of(FIRST), overlap=False)


def test_the_interpreter_gets_kernels_without_devices_options() -> None:
    spec = spec_of(MMA, emulate=True)
    assert spec.emulate
    assert [spec.overlap, spec.prefetch, spec.max_registers] == [False, 0, 0]
    assert cache.options(spec) == {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}


def test_options_follow_the_spec() -> None:
    spec = replace(spec_of(MMA), num_warps=8, max_registers=96, overlap=True)
    assert cache.options(spec) == {
        "num_warps": 8,
        "num_stages": 1,
        "enable_fp_fusion": False,
        "maxnreg": 96,
        "launch_pdl": True,
    }


# --- cache -------------------------------------------------------------------------------------------


def test_the_cache_key_moves_with_the_spec_the_template_and_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(MMA)
    key = cache.cache_key(spec)
    assert key == cache.cache_key(replace(spec))
    assert key != cache.cache_key(replace(spec, has_bias=True))
    monkeypatch.setattr(toolchain, "version", lambda: "0.0")
    assert key != cache.cache_key(spec)


def test_names_differ_where_specs_differ() -> None:
    spec = spec_of(MMA)
    changes = {
        "family": DEQUANTIZE,
        "widths": (2, 2),
        "group": 64,
        "layout": Layout.BIT_MAJOR,
        "k": 2048,
        "activation": Activation.A8,
        "has_bias": True,
        "parts": 2,
        "route": True,
        "quantize": True,
        "hidden": 12,
        "block_m": 32,
        "block_n": 32,
        "row_tiles": 2,
        "block_w": 256,
        "block_r": 64,
        "num_warps": 2,
        "columns": 2000,
        "num_stages": 5,
        "consumers": 2,
        "row_unit": 8,
        "token_rows": True,
        "overlap": not spec.overlap,
        "prefetch": 32,
        "max_registers": 99,
        "split": True,
        "sorted_rows": True,
        "emulate": True,
    }
    assert set(changes) == set(spec.describe()), "every field"
    assert len({spec.name, *(replace(spec, **{k: v}).name for k, v in changes.items())}) == len(changes) + 1


def test_emit_writes_the_text_once(tmp_path: Path) -> None:
    spec = spec_of(DEQUANTIZE)
    path = cache.emit(spec, tmp_path)
    assert path == tmp_path / f"{spec.name}.py"
    assert path.read_text(encoding="utf-8") == specialise.specialise(spec)
    written = path.stat().st_mtime_ns
    assert cache.emit(spec, tmp_path).stat().st_mtime_ns == written
    path.write_text("damaged", encoding="utf-8")
    assert cache.emit(spec, tmp_path).read_text(encoding="utf-8") == specialise.specialise(spec)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_emit_uses_the_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBIQUANT_CACHE", str(tmp_path))
    spec = spec_of(FIRST)
    assert cache.emit(spec) == tmp_path / "kernels" / f"{spec.name}__{cache.cache_key(spec)}.py"


def test_a_cache_that_cannot_be_written_is_replaced_for_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("not a directory", encoding="utf-8")
    monkeypatch.setenv("MOBIQUANT_CACHE", str(occupied))
    assert cache.emit(spec_of(FIRST)).is_file()
    assert "kernel cache cannot be written" in caplog.text


def test_without_triton_text_is_emitted_and_loading_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = replace(spec_of(FIRST), block_w=8192)
    assert "for triton absent" in cache.emit(spec, tmp_path).read_text(encoding="utf-8")
    with pytest.raises(TritonMissing, match="CUDA kernels need triton"):
        cache.load(spec)


def test_importing_the_package_imports_no_triton_and_no_kernel() -> None:
    code = (
        "import sys, mobiquant_compiler, mobiquant_compiler.codegen.cache, mobiquant_compiler.runtime.launch\n"
        "print([m for m in sys.modules if m == 'triton' or m.endswith('codegen.device')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_configs_is_the_only_table_of_tiles() -> None:
    families = {family for family, *_ in configs._TILES}
    assert families == set(IN_TABLE) - {FIRST}, "the tile of route_quantize follows from the number of columns"


def test_loading_twice_is_loading_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("MOBIQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_LOADED", {})
    spec = spec_of(FIRST)
    kernel = cache.load(spec)
    assert cache.load(replace(spec)) is kernel
    assert cache.loaded_kernels() == (kernel,)
    assert cache.compiled_kernels() == 0, "nothing was launched"
    assert kernel.parameters == tuple(parameters(kernel.path.read_text(encoding="utf-8"), "route_quantize"))
