"""Which launches the linears of a model can need on a GPU, and which kernels each of them runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mobiquant_compiler.errors import NotElastic
from mobiquant_compiler.kernels import fused_is_split, fused_splits, router_spec
from mobiquant_compiler.linear import MobiLinear, check_module, elastic_linears, plain_name
from mobiquant_compiler.runtime import fused
from mobiquant_compiler.runtime.weights import BOUND
from mobiquant_compiler.spec import MAX_SIBLINGS, Activation, Family, KernelSpec, SliceSpec

if TYPE_CHECKING:
    from mobiquant_compiler.codegen.configs import Target, TokenClass
    from mobiquant_compiler.codegen.signature import Dtypes

FUSED_CC = 10 * fused.CAPABILITY[0] + fused.CAPABILITY[1]


@dataclass(frozen=True, slots=True)
class Launch:
    """What kernels see of one linear, or of several that are multiplied together.

    Attributes:
        spec: Widths, group and layout.
        n: Output rows, of all linears together.
        k: Input columns.
        device: Where the weights are.
        x_dtype: Dtype of activations.
        scale_dtype: Dtype of scale and zero point.
        bias_dtype: Dtype of the bias, None where there is none.
        parts: Linears.
        activation: Fixed-point width of activations.
        hidden: Hidden units of the trained router that chooses slice counts, 0 of a data-free one.
        row_unit: 8 where the output rows of every linear are a multiple of it, 1 where not, None where nobody knows.
        split: Whether fused kernels split programs of their last wave: of every linear or of none; None where some do,
            or nobody knows.
    """

    spec: SliceSpec
    n: int
    k: int
    device: torch.device
    x_dtype: torch.dtype
    scale_dtype: torch.dtype = torch.float16
    bias_dtype: torch.dtype | None = None
    parts: int = 1
    activation: Activation = Activation.A16
    hidden: int = 0
    row_unit: int | None = None
    split: bool | None = None

    @property
    def splits(self) -> tuple[bool, ...]:
        """Whether its fused kernels are split, both where linears differ."""
        return fused_splits(self.n, self.k, self.parts) if self.split is None else (self.split,)

    @property
    def row_units(self) -> tuple[int, ...]:
        """The row units of kernels that it can take."""
        return fused.row_units(self.n, self.parts) if self.row_unit is None else (self.row_unit,)


def launches_of(
    model: nn.Module, where: str, *, activation: Activation | None = None, names: Iterable[str] | None = None
) -> tuple[Launch, ...]:
    """Return every distinct launch of a model's linears: each alone, and siblings together.

    Siblings read one input by one decision: linears that share a router, `MAX_SIBLINGS` at most, in the model's order.

    Args:
        model: Quantized model, or a plain one that ran compiled by the backend; compiled or not.
        where: Who asks, for messages.
        activation: Fixed-point width instead of the linears' own.
        names: Linears to look at; all by default.

    Raises:
        NotAModule: `model` is none.
        NotElastic: the model has no elastic linear.
    """
    check_module(model, where)
    linears = elastic_or_bound(model)
    if not linears:
        raise NotElastic(where=where, model=type(model).__name__)
    chosen = set(linears if names is None else names)
    biases = _bias_dtypes(model, linears)
    alone, siblings = [], dict[tuple[Any, ...], list[Launch]]()
    for name in (name for name in linears if name in chosen):
        linear = linears[name]
        launch = _alone(linear, biases[name], activation)
        alone.append(launch)
        key = (
            id(linear.router),
            launch.spec,
            launch.activation,
            linear.prefill,
        )  # what the pass fuse-siblings compares
        siblings.setdefault(key, []).append(launch)
    together = [launch for members in siblings.values() for launch in _together(members)]
    return tuple(dict.fromkeys([*alone, *together]))


def elastic_or_bound(model: nn.Module) -> dict[str, MobiLinear]:
    """Return the elastic linears of a model by name, and those that the backend bound to its plain weights."""
    own = {plain_name(name): linear for name, linear in elastic_linears(model).items()}
    return BOUND.of_model(model) | own


def _bias_dtypes(model: nn.Module, linears: Mapping[str, MobiLinear]) -> dict[str, torch.dtype | None]:
    """Return the dtype of each linear's bias; one that is bound to a plain weight leaves the bias with its module."""
    modules: dict[str, nn.Module] = {plain_name(name): module for name, module in model.named_modules()}
    found = {}
    for name in linears:
        module = modules.get(name.partition("#")[0])
        bias = getattr(module, "bias", None)
        found[name] = bias.dtype if isinstance(bias, torch.Tensor) else None
    return found


def _alone(linear: MobiLinear, bias: torch.dtype | None, activation: Activation | None) -> Launch:
    return Launch(
        linear.spec,
        linear.out_features,
        linear.in_features,
        linear.slices.device,
        linear.weight_like.dtype,
        linear.scale.dtype,
        bias,
        activation=activation or Activation(linear.activation),
        hidden=linear.router.hidden_units,
        row_unit=fused.row_unit(linear.out_features),
    )


def _together(members: Sequence[Launch]) -> Iterator[Launch]:
    """Yield the launches of linears that share input and decision; those that differ in dtypes are launched alone."""
    for start in range(0, len(members), MAX_SIBLINGS):
        part = members[start : start + MAX_SIBLINGS]
        first = part[0]
        kinds = {(m.device, m.x_dtype, m.scale_dtype, m.bias_dtype) for m in part}
        if len(part) == 1 or len(kinds) > 1:
            continue
        unit = min(fused.row_unit(m.n) for m in part)
        splits = {fused_is_split(m.n, m.k) for m in part}
        split = splits.pop() if len(splits) == 1 else None
        yield replace(first, n=sum(m.n for m in part), parts=len(part), row_unit=unit, split=split)


def kernels_of(
    launch: Launch,
    target: Target,
    tokens: Iterable[TokenClass],
    *,
    workspace: bool,
    emulate: bool = False,
    gluon: bool = True,
) -> list[KernelSpec]:
    """Return the kernels of a launch on a target, as `wiring` chooses them; pure, and needs no device.

    Args:
        launch: The linears.
        target: What they must fit.
        tokens: Classes of token counts.
        workspace: Whether there are long calls, which dequantize weights for a library's GEMM or in registers.
        emulate: For the interpreter.
        gluon: Whether kernels in Gluon can be compiled; others serve their calls where they cannot.

    Raises:
        KernelDoesNotFit: no tile fits the target.
    """
    from mobiquant_compiler.codegen.configs import TokenClass, kernel_spec
    from mobiquant_compiler.codegen.resident_configs import multiply_spec

    spec, k, one = launch.spec, launch.k, TokenClass.ONE
    found: list[KernelSpec] = []
    first = {"hidden": launch.hidden, "emulate": emulate}
    alone = router_spec(spec.num_slices)
    for long in (False, True) if workspace else (False,):
        found.append(kernel_spec(Family.ROUTE_QUANTIZE, alone, k, one, target, quantize=False, long=long, **first))
        for route in (True, False):
            facts = {"activation": launch.activation, "route": route, "long": long}
            found.append(kernel_spec(Family.ROUTE_QUANTIZE, spec, k, one, target, **facts, **first))
    counts = list(tokens)
    if gluon:
        found += _batch_kernels(launch, target, counts)
    for count in _multiplied_by_lanes(launch, target, counts) if gluon else counts:
        own = multiply_spec(
            spec,
            k,
            count,
            target,
            n=launch.n,
            activation=launch.activation,
            has_bias=launch.bias_dtype is not None,
            parts=launch.parts,
            scale_bytes=launch.scale_dtype.itemsize,
            emulate=emulate,
            gluon=gluon,
        )
        found.append(own)
    if workspace:
        for sorted_rows in (True, False):
            found.append(kernel_spec(Family.DEQUANTIZE, spec, k, TokenClass.MANY, target, sorted_rows=sorted_rows))
        found += _fused_kernels(launch, target) if gluon else ()
    return list(dict.fromkeys(found))


def binaries_of(
    launches: Iterable[Launch], target: Target, tokens: Iterable[TokenClass], *, workspace: bool, gluon: bool = True
) -> list[tuple[KernelSpec, Dtypes]]:
    """Return the kernels of launches, each once, with the dtypes they are compiled for.

    Args:
        launches: See `launches_of`.
        target: As `kernels_of` takes it, and what follows.
        tokens: Classes of token counts.
        workspace: Whether there are long calls.
        gluon: Whether kernels in Gluon can be compiled.

    Raises:
        KernelDoesNotFit: no tile fits the target.
    """
    from mobiquant_compiler.codegen.signature import Dtypes

    classes, found = list(tokens), dict[tuple[KernelSpec, Dtypes], None]()
    for launch in launches:
        for spec in kernels_of(launch, target, classes, workspace=workspace, gluon=gluon):
            bias = launch.bias_dtype if spec.has_bias else None
            found[spec, Dtypes.of(launch.x_dtype, launch.scale_dtype, bias)] = None
    return list(found)


def _multiplied_by_lanes(launch: Launch, target: Target, tokens: Sequence[TokenClass]) -> list[TokenClass]:
    """Return the classes of which batch_wgmma does not serve every call."""
    from mobiquant_compiler.codegen import batch_configs

    rows = batch_configs.serves(launch.spec, target)
    return [c for c in tokens if not (rows and batch_configs.takes_all(c, launch.n, launch.k, launch.parts))]


def _batch_kernels(launch: Launch, target: Target, tokens: Sequence[TokenClass]) -> Iterator[KernelSpec]:
    """Yield the kernels of tokens as rows, where there are any for such a launch and so many tokens."""
    from mobiquant_compiler.codegen import batch_configs
    from mobiquant_compiler.codegen.configs import TokenClass, kernel_spec

    spec, k = launch.spec, launch.k
    if not batch_configs.serves(spec, target):
        return
    tiles = [tile for count in tokens for tile in batch_configs.tiles_of(count, launch.n, k, launch.parts)]
    if not tiles:
        return
    facts = {"activation": launch.activation, "token_rows": True, "hidden": launch.hidden}
    routed = any(batch_configs.keeps_any_order(count, launch.n, k, launch.parts) for count in tokens)
    for route in (True, False) if routed else (False,):
        yield kernel_spec(Family.ROUTE_QUANTIZE, spec, k, TokenClass.ONE, target, route=route, **facts)
    for unit in launch.row_units:
        for tile in tiles:
            facts = {"tile": tile, "activation": launch.activation, "parts": launch.parts, "row_unit": unit}
            yield batch_configs.batch_spec(spec, k, target, has_bias=launch.bias_dtype is not None, **facts)


def _fused_kernels(launch: Launch, target: Target) -> Iterator[KernelSpec]:
    """Yield the kernels that make weights in registers, where there are any for such a launch."""
    from mobiquant_compiler.codegen.configs import TokenClass, kernel_spec, wgmma_spec

    if target.cc != FUSED_CC or launch.x_dtype not in fused.DTYPES:
        return
    if not (fused.takes_slices(launch.spec) and fused.takes_columns(launch.spec, launch.k)):
        return
    yield kernel_spec(Family.GATHER_TOKENS, launch.spec, launch.k, TokenClass.MANY, target)
    for unit, split, small in product(launch.row_units, launch.splits, (True, False)):
        facts = {"row_unit": unit, "has_bias": launch.bias_dtype is not None}
        yield wgmma_spec(launch.spec, launch.k, target, small=small, split=split, **facts)
