"""`mobiquant emit`: the kernels of a spec or of a model as readable files, and what they take of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mobiquant_compiler.cli.console import note, positive, progress, show, whole_numbers
from mobiquant_compiler.cli.loading import load, trace
from mobiquant_compiler.errors import BadOption
from mobiquant_compiler.spec import PREFILL_TOKENS, Activation, Family

if TYPE_CHECKING:
    from mobiquant_compiler.codegen.signature import Dtypes
    from mobiquant_compiler.launches import Launch
    from mobiquant_compiler.spec import KernelSpec

FAMILIES = (*map(str, Family), "all")
TARGET_HELP = "Compute capability that kernels are emitted for, as 90 for sm_90."
COLUMNS = {
    "family": "kernel",
    "name": "file, without .py",
    "template": "template",
    "registers": "registers",
    "shared_bytes": "shared bytes",
    "local_bytes": "spilled bytes",
    "instructions": "instructions",
    "loads": "loads",
    "products": "products",
    "fits": "fits",
}
MOST_ROWS, MOST_COLUMNS = 1 << 24, 1 << 20  # of an emitted launch: far beyond any model, and no kernel takes for ever
_OF_A_SPEC = ("widths", "group", "layout", "k", "n", "bias", "parts", "hidden")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(emit)


def emit(
    context: typer.Context,
    places: Annotated[
        list[str],
        typer.Argument(metavar="[MODEL] OUTPUT", help="A directory to write to; with MODEL, the kernels of a model."),
    ],
    family: Annotated[str, typer.Option(help="One of " + ", ".join(FAMILIES) + ".")] = "all",
    widths: Annotated[str, typer.Option(help="Bits of each slice, the base first.")] = "2,2,2,2",
    group: Annotated[int, typer.Option(help="128, 64 or 32 columns a scale.")] = 128,
    layout: Annotated[str, typer.Option(help="slice_major or bit_major.")] = "slice_major",
    k: Annotated[int, typer.Option("--k", help="Input columns.")] = 4096,
    n: Annotated[int, typer.Option("--n", help="Output rows, of all weights of the launch together.")] = 4096,
    bias: Annotated[bool, typer.Option("--bias", help="Add a bias.")] = False,
    parts: Annotated[int, typer.Option(help="Weights that one launch multiplies by.")] = 1,
    hidden: Annotated[int, typer.Option(help="Hidden units of a trained router; 0: a data-free one.")] = 0,
    tokens: Annotated[int | None, typer.Option(help="Tokens of a call; 1 by default, with MODEL any number.")] = None,
    activation: Annotated[str | None, typer.Option(help="a16 or a8; a16 or the model's own by default.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of activations; bfloat16 or the model's own by default.")] = None,
    target: Annotated[int, typer.Option(help=TARGET_HELP)] = 90,
    ptx: Annotated[bool, typer.Option("--ptx", help="Write the PTX beside each kernel.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write kernels as readable files and say what each takes on a target. Needs no GPU."""
    model, output = _places(places)
    families, cc = _families(family), check_target(target)
    classes = None if tokens is None else [positive(tokens, "--tokens")]
    width = None if activation is None else Activation.of(activation, "command line", "--activation")
    if model is None:
        spec = (whole_numbers(widths, "--widths"), group, layout)
        rows = positive(n, "--n", positive(parts, "--parts"), MOST_ROWS)  # each weight has one at least
        sizes = (rows, positive(k, "--k", most=MOST_COLUMNS), parts)
        launches = [_launch(spec, sizes, bias, dtype or "bfloat16", width or Activation.A16, hidden)]
        classes, workspace = classes or [1], True
    else:
        _refuse_spec(context)
        launches = _launches(model, dtype, width)
        workspace = classes is None or classes[0] > PREFILL_TOKENS
    chosen = [pair for pair in kernels_for(launches, cc, classes, workspace) if pair[0].family in families]
    rows = _write(chosen, cc, output, ptx)
    if not chosen:
        by = "--tokens and the model" if model else "--tokens, --n, --k and the slices"
        note(f"no {family} kernel serves this on sm_{cc}: that depends on {by}; --family all shows which kernels do")
    for text in sorted({row["note"] for row in rows if row["note"]}):
        note(text)
    show(rows, COLUMNS, as_json=as_json, title=f"{output}, sm_{cc}")


def _places(places: Sequence[str]) -> tuple[str | None, Path]:
    if len(places) > 2:
        raise BadOption(where="emit", name="[MODEL] OUTPUT", got=" ".join(places), wanted="one or two arguments")
    output = Path(places[-1])
    if output.exists() and not output.is_dir():
        raise BadOption(where="emit", name="OUTPUT", got=str(output), wanted="a directory")
    if (output / "config.json").exists():
        wanted = "a directory that holds no model; to emit the kernels of one give MODEL OUTPUT"
        raise BadOption(where="emit", name="OUTPUT", got=str(output), wanted=wanted)
    return (places[0] if len(places) == 2 else None), output


def _families(text: str) -> tuple[Family, ...]:
    if text not in FAMILIES:
        raise BadOption(where="command line", name="--family", got=text, wanted=f"one of {', '.join(FAMILIES)}")
    return tuple(Family) if text == "all" else (Family(text),)


def check_target(cc: int) -> int:
    """Return a compute capability that kernels can be compiled for.

    Raises:
        BadOption: it is not one that Triton's compiler knows, or older than our kernels.
    """
    from mobiquant_compiler.codegen.configs import known_targets

    if cc not in known_targets():
        wanted = f"one of {', '.join(map(str, known_targets()))}"
        raise BadOption(where="command line", name="--target", got=cc, wanted=wanted)
    return cc


def _refuse_spec(context: typer.Context) -> None:
    """Refuse options that say what a model says itself."""
    for name in _OF_A_SPEC:
        source = context.get_parameter_source(name)
        if (
            source is not None and source.name == "COMMANDLINE"
        ):  # by name: newer versions of typer have a click of their own
            got = context.params[name]
            raise BadOption(where="command line", name=f"--{name}", got=got, wanted="no such option beside MODEL")


def _launch(
    spec: tuple[tuple[int, ...], int, str],
    sizes: tuple[int, int, int],
    bias: bool,
    dtype: str,
    width: Activation,
    hidden: int,
) -> Launch:
    import torch

    from mobiquant_compiler.launches import Launch
    from mobiquant_compiler.models import parse_dtype
    from mobiquant_compiler.spec import SliceSpec

    n, k, parts = sizes
    if hidden < 0:
        raise BadOption(where="command line", name="--hidden", got=hidden, wanted="at least 0")
    x = parse_dtype(dtype)
    weight = SliceSpec(*spec)  # type: ignore[arg-type]  # checks and converts the layout
    device = torch.device("cpu")
    facts = {"bias_dtype": x if bias else None, "parts": parts, "activation": width, "hidden": hidden}
    return Launch(weight, n, k, device, x, **facts)


def _launches(source: str, dtype: str | None, width: Activation | None) -> Sequence[Launch]:
    """Load a model, slice it as the backend would where it is plain, and return its launches."""
    from mobiquant_compiler.launches import launches_of
    from mobiquant_compiler.linear import elastic_linears

    with progress() as report:
        loaded = load(source, "cpu", dtype, report)
    if not elastic_linears(loaded.model):
        trace(loaded, 2, {})
    return launches_of(loaded.model, "emit", activation=width)


def kernels_for(
    launches: Iterable[Launch], cc: int, tokens: Iterable[int] | None, workspace: bool
) -> list[tuple[KernelSpec, Dtypes]]:
    """Return the kernels of launches for a target, each once, with the dtypes they are compiled for.

    Args:
        launches: See `launches.launches_of`.
        cc: Compute capability.
        tokens: Numbers of tokens a call; None is any.
        workspace: Whether calls are long enough for the workspace way.
    """
    from mobiquant_compiler.codegen.configs import Target, TokenClass
    from mobiquant_compiler.launches import binaries_of

    classes = list(TokenClass) if tokens is None else list(dict.fromkeys(map(TokenClass.of, tokens)))
    return binaries_of(launches, Target.of(cc), classes, workspace=workspace)


def _compile(chosen: Sequence[tuple[KernelSpec, Dtypes]], cc: int, report: Callable[[str, int, int], None]) -> None:
    """Have all binaries in Triton's cache, compiled side by side; `resources.measure` says what cannot be had."""
    from mobiquant_compiler.codegen import compiling, toolchain

    if toolchain.version() == "absent" or toolchain.interpreting():
        return
    jobs = [(spec, cc, dtypes) for spec, dtypes in chosen]
    compiling.compile_all(jobs, None, lambda done: report("compile", done, len(jobs)))


def _write(chosen: Sequence[tuple[KernelSpec, Dtypes]], cc: int, output: Path, ptx: bool) -> list[dict[str, Any]]:
    """Emit every kernel, compile it, and return a row each."""
    from dataclasses import asdict

    from mobiquant_compiler.codegen import cache, resources
    from mobiquant_compiler.codegen.specialise import modules_digest, template_digest

    rows, modules = [], modules_digest()
    with progress() as report:
        _compile(chosen, cc, report)
        for done, (spec, dtypes) in enumerate(chosen, 1):
            path, kinds = cache.emit(spec, output), ".".join(filter(None, (dtypes.x, dtypes.scale, dtypes.bias)))
            found = asdict(resources.measure(spec, cc, dtypes))
            text, beside = found.pop("ptx"), path.with_suffix(f".sm{cc}.{kinds}.ptx")
            if ptx and text:
                beside.write_text(text, encoding="utf-8")
            where = {"file": str(path), "ptx": str(beside) if ptx and text else None, "target": f"sm_{cc}"}
            kind = {"family": str(spec.family), "name": spec.name}
            kind |= {"template": template_digest(spec.family), "modules": modules}
            rows.append(kind | where | {"x_dtype": dtypes.x, "scale_dtype": dtypes.scale} | found)
            report("kernels", done, len(chosen))
    return rows
