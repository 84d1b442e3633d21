"""Binding of templates, tile configurations, emission and cache: all without a GPU."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mobiquant_compiler.codegen import cache, configs, geometry, specialise, toolchain
from mobiquant_compiler.codegen.configs import Target, TokenClass, fits, kernel_spec, shared_bytes
from mobiquant_compiler.codegen.signature import Dtypes, parameter_type
from mobiquant_compiler.errors import BadKernelSpec, KernelDoesNotFit, TritonMissing
from mobiquant_compiler.spec import Activation, Family, KernelSpec, Layout, Order, SliceSpec

H100 = Target.of(90)


def spec_of(family: Family, spec: SliceSpec | None = None, tokens: TokenClass | None = None, **options) -> KernelSpec:
    """Choose a kernel of `family` for 4096 columns."""
    tokens = tokens or (TokenClass.MANY if family is Family.GROUPED else TokenClass.ONE)
    return kernel_spec(family, spec or SliceSpec(), 4096, tokens, H100, **options)


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
    spec = spec_of(Family.DECODE)
    header = [line for line in specialise.specialise(spec).splitlines() if line.startswith("#")]
    for name, value in spec.describe().items():
        assert f"# {name}: {value}" in header


def test_dead_branches_and_their_parameters_are_gone() -> None:
    plain = specialise.specialise(spec_of(Family.DECODE))
    full = specialise.specialise(spec_of(Family.DECODE, has_bias=True))
    assert "bias_ptr" not in parameters(plain, "decode_gemv")
    assert "bias_ptr" in parameters(full, "decode_gemv")
    a8 = specialise.specialise(spec_of(Family.GROUPED, activation=Activation.A8))
    assert "low_ptr" not in a8
    assert "rows_ptr" in parameters(a8, "grouped_gemm")
    small = specialise.specialise(spec_of(Family.GROUPED, tokens=TokenClass.UP_TO_16))
    assert "rows_ptr" not in parameters(small, "grouped_gemm")
    assert small.count("MIXED=") == 1  # the straight bodies are for sorted rows


def test_a_static_assert_that_fails_is_an_error_of_ours() -> None:
    with pytest.raises(BadKernelSpec, match=r"kernel grouped_gemm: .*tensor cores take tiles of 16 to 256 tokens"):
        specialise.specialise(replace(spec_of(Family.GROUPED), block_m=8))


@pytest.mark.parametrize(("name", "value"), [("block_n", 3), ("num_warps", 0), ("num_stages", 0), ("k", 100)])
def test_a_spec_that_cannot_be_is_refused(name: str, value: int) -> None:
    with pytest.raises(BadKernelSpec, match=f"kernel decode_gemv: {name} got {value}"):
        replace(spec_of(Family.DECODE), **{name: value})


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
    tree = specialise._Bind(spec_of(Family.ROUTE), values, set()).visit(ast.parse(text))
    assert ast.unparse(ast.fix_missing_locations(tree)) == wanted


# --- configurations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cc", [75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("tokens", list(TokenClass))
@pytest.mark.parametrize("group", [32, 64, 128])
def test_there_is_a_tile_for_every_class_and_target(cc: int, tokens: TokenClass, group: int) -> None:
    target = Target.of(cc)
    family = Family.DECODE if tokens is TokenClass.ONE else Family.GROUPED
    for chosen in (family, Family.QUANTIZE, Family.ROUTE):
        for widths in ((2, 2, 2, 2), (1,) * 8, (4, 2)):
            spec = kernel_spec(chosen, SliceSpec(widths, group), 4096, tokens, target)
            assert fits(spec, target)
            if cc == H100.cc:
                specialise.specialise(spec)


def test_the_estimate_grows_with_the_tile_and_halves_with_eight_bit_activations() -> None:
    spec = spec_of(Family.GROUPED)
    assert shared_bytes(replace(spec, block_m=2 * spec.block_m)) > shared_bytes(spec)
    assert shared_bytes(replace(spec, num_stages=3)) > shared_bytes(spec)
    assert shared_bytes(replace(spec, activation=Activation.A8)) < shared_bytes(spec)
    # (2 * 64 + 64) * 128 * 2 stages + words 4 * 64 * 128 + tile 4 * 64 * 64
    assert shared_bytes(spec) == 98304


def test_the_next_tile_is_taken_where_the_best_does_not_fit() -> None:
    best = kernel_spec(Family.GROUPED, SliceSpec(), 4096, TokenClass.MANY, H100)
    small = Target(75, shared_bytes(best) - 1)
    assert not fits(best, small)
    assert fits(kernel_spec(Family.GROUPED, SliceSpec(), 4096, TokenClass.MANY, small), small)


def test_no_tile_at_all_is_an_error_that_says_by_how_much() -> None:
    with pytest.raises(KernelDoesNotFit, match=r"kernel grouped_gemm: .* sm_75 .* limit 1000\)"):
        kernel_spec(Family.GROUPED, SliceSpec(), 4096, TokenClass.MANY, Target(75, 1000))


def test_an_unknown_target_is_taken_for_the_next_older_one() -> None:
    assert Target.of(91).shared_bytes == Target.of(90).shared_bytes
    assert Target.of(60).shared_bytes == Target.of(75).shared_bytes


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 32, 33, 64, 65, 10000])
def test_token_classes_cover_all_numbers(tokens: int) -> None:
    found = TokenClass.of(tokens)
    assert TokenClass.of(found.sample) is found
    low, _, high = found.value.partition("..")
    assert int(low) <= tokens <= int(high or (low if tokens == 1 else tokens))


@pytest.mark.parametrize("k", [32, 100, 576, 1536, 4096, 11008])
@pytest.mark.parametrize("widths", [(2, 2, 2, 2), (4, 4), (1,) * 8])
def test_steps_hold_whole_groups_and_no_more_columns_than_there_are(k: int, widths: tuple[int, ...]) -> None:
    weight = SliceSpec(widths, 32)
    decode = kernel_spec(Family.DECODE, weight, k, TokenClass.ONE, H100)
    assert decode.block_w * geometry.span(weight) % 32 == 0
    assert decode.block_w <= 2 * decode.k // geometry.span(weight)
    quantize = kernel_spec(Family.QUANTIZE, weight, k, TokenClass.ONE, H100)
    assert quantize.order is Order.PLACES
    assert quantize.block_w % 32 == 0


# --- cache -------------------------------------------------------------------------------------------


def test_the_cache_key_moves_with_the_spec_the_template_and_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(Family.DECODE)
    key = cache.cache_key(spec)
    assert key == cache.cache_key(replace(spec))
    assert key != cache.cache_key(replace(spec, has_bias=True))
    monkeypatch.setattr(toolchain, "version", lambda: "0.0")
    assert key != cache.cache_key(spec)
    monkeypatch.undo()
    source = specialise._source
    monkeypatch.setattr(specialise, "_source", lambda path: source(path) + ("#" if path.stem == "device" else ""))
    assert key != cache.cache_key(spec)


def test_names_differ_where_specs_differ() -> None:
    spec = spec_of(Family.GROUPED)
    changes = {
        "widths": (2, 2),
        "k": 2048,
        "layout": Layout.BIT_MAJOR,
        "group": 64,
        "activation": Activation.A8,
        "has_bias": True,
        "block_m": 32,
        "block_n": 32,
        "block_w": 256,
        "num_warps": 2,
        "num_stages": 1,
        "order": Order.PLACES,
        "sorted_rows": False,
        "emulate": True,
    }
    names = {replace(spec, **{name: value}).name for name, value in changes.items()}
    assert len(names | {spec.name}) == len(changes) + 1


def test_emit_writes_the_text_once(tmp_path: Path) -> None:
    spec = spec_of(Family.QUANTIZE)
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
    spec = spec_of(Family.ROUTE)
    assert cache.emit(spec) == tmp_path / "kernels" / f"{spec.name}__{cache.cache_key(spec)}.py"


def test_a_cache_that_cannot_be_written_is_replaced_for_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("not a directory", encoding="utf-8")
    monkeypatch.setenv("MOBIQUANT_CACHE", str(occupied))
    assert cache.emit(spec_of(Family.ROUTE)).is_file()
    assert "kernel cache cannot be written" in caplog.text


def test_without_triton_text_is_emitted_and_loading_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = replace(spec_of(Family.ROUTE), block_w=64)
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
    assert {family for family, _ in configs._TILES} == set(Family)
