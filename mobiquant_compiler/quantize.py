"""`quantize_`: nn.Linear and Conv1D to `MobiLinear`, layer by layer, freeing each weight as it goes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mobiquant_compiler.calibrate import (
    Loss,
    Progress,
    check_tokens,
    measure_table,
    next_token_loss,
    sensitivities,
    shared_inputs,
)
from mobiquant_compiler.config import SCALE_DTYPES, SliceConfig, matches
from mobiquant_compiler.errors import BadOption, NothingToQuantize, StrictSkip
from mobiquant_compiler.linear import MobiLinear, Router, TokenMask, check_module, column_energy, elastic_linears
from mobiquant_compiler.report import Coverage, Skip, SkipReason
from mobiquant_compiler.runtime.budget import BudgetState
from mobiquant_compiler.slices import WEIGHT_DTYPES, SlicedWeight, check_weight, slice_weight

MakeRouter = Callable[[Sequence[str], tuple[int, ...], TokenMask], Router]

ANCHORS = (2.5, 3.0, 4.0, 5.0, 6.0, 7.0)  # budgets at which scores are measured, for a range of 2 to 8 bits

TABLE_WINDOWS = 4  # windows that scores are measured on: two thousand tokens fix a quantile well enough


def linear_like(module: nn.Module) -> str | None:
    """Say which kind of linear a module is: "linear" ([N, K] weight), "conv1d" ([K, N], GPT-2), or None."""
    if type(module) is nn.Linear:
        return "linear"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return "conv1d"
    return None


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of a linear-like module as [N, K] (a view)."""
    weight = module.weight
    assert isinstance(weight, Tensor), "linear-like modules have a tensor weight"
    return weight.t() if linear_like(module) == "conv1d" else weight


def select(model: nn.Module, config: SliceConfig) -> tuple[dict[str, nn.Module], list[Skip]]:
    """Return the linears to quantize by name, and everything left alone with its reason."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():  # each module once: two names of one module are no tie
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            holders.setdefault(id(parameter), []).append(_parameter(name, key))
    chosen: dict[str, nn.Module] = {}
    skipped: list[Skip] = []
    choosing = dict(_expert_choices(model))
    for name, module in model.named_modules():
        reason = _skip_reason(name, module, config, holders) or choosing.get(name)
        if isinstance(reason, Skip):
            skipped.append(reason)
        elif linear_like(module):
            chosen[name] = module
        skipped.extend(_expert_skips(name, module))
    return chosen, skipped


def _skip_reason(
    name: str, module: nn.Module, config: SliceConfig, holders: Mapping[int, Sequence[str]]
) -> Skip | None:
    if not linear_like(module):
        return Skip(name, SkipReason.UNKNOWN_TYPE, type(module).__name__) if isinstance(module, nn.Linear) else None
    if not matches(name, config.include):
        return Skip(name, SkipReason.NOT_INCLUDED)
    tied = [other for other in holders[id(module.weight)] if other != _parameter(name, "weight")]
    if tied:
        return Skip(name, SkipReason.TIED, tied[0])
    if not config.selects(name):
        return Skip(name, SkipReason.EXCLUDED)
    n, k = weight_of(module).shape
    if config.is_too_narrow(k):
        return Skip(name, SkipReason.TOO_NARROW, f"{n} x {k}")
    if module.weight.dtype not in WEIGHT_DTYPES:
        return Skip(name, SkipReason.DTYPE, str(module.weight.dtype))
    return None


def _expert_choices(model: nn.Module) -> Iterable[tuple[str, Skip]]:
    """Yield linears that have an output for each expert beside them: what ranks those is not to be rounded."""
    for parent, module in model.named_modules():
        for place, experts in module.named_children():
            count = _experts_in(place, experts)
            for own, linear in module.named_children() if count > 1 else ():
                if linear_like(linear) and weight_of(linear).shape[0] == count:
                    name, others = _parameter(parent, own), _parameter(parent, place)
                    yield name, Skip(name, SkipReason.RANKED, f"one of {count} experts of {others}")


def _experts_in(name: str, module: nn.Module) -> int:
    """Return how many experts a module of that name holds: modules, or the first dimension of 3-D parameters."""
    if "expert" not in name.lower():
        return 0
    if isinstance(module, nn.ModuleList):
        return len(module)
    return next((p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3), 0)


def _parameter(module: str, key: str) -> str:
    return f"{module}.{key}" if module else key


def _expert_skips(name: str, module: nn.Module) -> list[Skip]:
    """Report 3-D parameters of expert modules: linears in all but name, and most of a mixture's weights."""
    return [
        Skip(_parameter(name, key), SkipReason.EXPERTS, "x".join(map(str, p.shape)))
        for key, p in module.named_parameters(recurse=False)
        if p.dim() == 3 and "expert" in f"{name}.{type(module).__name__}".lower()
    ]


def fingerprint(weight: Tensor) -> str:
    """Return a hash of a weight [N, K] that survives a change between float32 and bfloat16 storage."""
    data = weight.detach().to(torch.bfloat16).contiguous().cpu().view(torch.int16).numpy()
    return hashlib.sha256(repr(tuple(weight.shape)).encode() + data.tobytes()).hexdigest()


@torch.inference_mode(False)  # buffers made under inference mode could not be written to outside of it
def quantize_(
    model: nn.Module,
    config: SliceConfig | None = None,
    *,
    calibration: Tensor | None = None,
    loss: Loss | None = None,
    budget: float | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> Coverage:
    """Replace the linear layers of a model, in place, by elastic ones.

    Slices are data-free. Calibration tokens serve the router alone: one gradient pass measures how sensitive the loss
    is to each linear, a few forward passes measure the scores from which budgets become thresholds. Without them
    every token of a linear uses the same slice count, chosen by the budget (`runtime.budget.StaticTable`).

    Args:
        model: Any module; peak memory above its own size is one layer's working set (and, with calibration, the
            activations of one window).
        config: Slices, groups, layout, which layers.
        calibration: Token ids [windows, length].
        loss: ``loss(model, window [1, length])``, a scalar mean; next-token cross entropy by default.
        budget: Average weight bits to start with; all slices by default.
        strict: Make a layer that is left alone, other than by `exclude`, an error.
        progress: Called with stage, done, total.

    Returns:
        What was made elastic and what was not, and why.

    Raises:
        NotAModule: `model` is none.
        WeightError: a weight that cannot become slices, or no linear at all; the model is untouched then.
        StrictSkip: `strict` and a layer was skipped.
        BudgetOutOfRange: `budget` is not possible; the model stays at all slices.
    """
    check_module(model, "quantize_")
    model = getattr(model, "_orig_mod", model)  # of a module that was compiled already: its own names
    config = config or SliceConfig()
    progress = progress or (lambda stage, done, total: None)
    loss = loss or next_token_loss
    linears, skipped = select(model, config)
    check(model, linears, skipped, config, strict)
    groups = [[name] for name in linears]
    sensitivity: Mapping[str, Tensor] = {}
    tokens = None if calibration is None else check_tokens(calibration).to(next(model.parameters()).device)
    if tokens is not None:
        if config.scope == "input":
            groups = shared_inputs(model, linears, tokens[:1, :32], loss)
        for group in groups:
            group_limits(group, config)
        sensitivity = sensitivities(model, linears, tokens, loss, progress)
    coverage = _replace(model, linears, skipped, config, sensitivity, progress)
    attach_budgets(model, linears, groups, config, sensitivity, tokens, loss, progress)
    if budget is not None:
        state_of(model).set(budget)
    return coverage


def state_of(model: nn.Module) -> BudgetState:
    """Return the budget state that all routers of a freshly quantized model share."""
    first = next(iter(elastic_linears(model).values()))
    state: BudgetState = first.router.state
    return state


def attach_budgets(
    model: nn.Module,
    names: Iterable[str],
    groups: Sequence[Sequence[str]],
    config: SliceConfig,
    sensitivity: Mapping[str, Tensor],
    tokens: Tensor | None,
    loss: Loss,
    progress: Progress,
    make: MakeRouter | None = None,
) -> BudgetState:
    """Give the elastic linears of a model their shared routers and, where tokens are given, a measured budget table.

    `make` returns the router of a group of linears, ``make(names, widths, token mask)``; data-free ones by default.
    """
    state = _share_routers(model, groups, config, make or _data_free(model, sensitivity))
    state.set(state.budget)  # ceilings hold from the start
    if tokens is not None and len(config.widths) > 1:
        elastic: dict[str, Any] = {name: model.get_submodule(name) for name in names}
        anchors = _anchors(state)
        state.table = measure_table(model, elastic, state, tokens[:TABLE_WINDOWS], anchors, loss, progress)
    return state


def check(
    model: nn.Module, linears: Mapping[str, nn.Module], skipped: Sequence[Skip], config: SliceConfig, strict: bool
) -> None:
    """Find every reason to refuse before the first weight is given up."""
    if "" in linears:
        why = "it is a linear itself, which cannot be replaced in place: wrap it in nn.Sequential"
        raise NothingToQuantize(model=type(model).__name__, skipped=why)
    if not linears:
        why = "; ".join(str(s) for s in skipped[:3]) or "no nn.Linear or Conv1D in it"
        if elastic_linears(model):
            why = "it is elastic already; quantize the model that it was made from"
        raise NothingToQuantize(model=type(model).__name__, skipped=why)
    unasked = [s for s in skipped if s.reason not in (SkipReason.EXCLUDED, SkipReason.NOT_INCLUDED)]
    if strict and unasked:
        raise StrictSkip(count=len(unasked), graph=type(model).__name__, skips="; ".join(map(str, unasked)))
    _check_patterns(linears, config)
    for name, module in linears.items():
        config.limits(name)
        weight = weight_of(module)
        check_weight(weight, config.spec_for(weight.shape[1]), where=name)


def _check_patterns(linears: Mapping[str, nn.Module], config: SliceConfig) -> None:
    """Refuse a floor or a ceiling for linears that are not there: a slip of the pen would change no precision."""
    for option in ("floor", "ceiling"):
        for pattern in getattr(config, option):
            if not any(matches(name, (pattern,)) for name in linears):
                wanted = f"a pattern of one of the {len(linears)} linears to slice, as {next(iter(linears))!r}"
                raise BadOption(where="SliceConfig", name=option, got=pattern, wanted=wanted)


def _replace(
    model: nn.Module,
    linears: dict[str, nn.Module],
    skipped: Sequence[Skip],
    config: SliceConfig,
    sensitivity: Mapping[str, Tensor],
    progress: Progress,
) -> Coverage:
    """Swap each linear for its slices and give up the original before the next."""
    before = after = 0
    names = list(linears)
    mask = TokenMask().to(weight_of(linears[names[0]]).device)
    for done, name in enumerate(names):
        module = linears.pop(name)
        weight = weight_of(module)
        before += weight.numel() * weight.element_size()
        elastic = make_elastic(name, module, config, mask)
        set_submodule(model, module, elastic)
        del module, weight
        after += elastic.weight_bytes
        linears[name] = elastic
        progress("slices", done + 1, len(names))
    return Coverage(names, list(skipped), before, after)


def make_elastic(
    name: str, module: nn.Module, config: SliceConfig, mask: TokenMask, sliced: SlicedWeight | None = None
) -> MobiLinear:
    """Return the elastic linear that takes the place of `module`, with data-free slices unless they are given."""
    weight = weight_of(module)
    spec = config.spec_for(weight.shape[1])
    if sliced is None:
        stored = SCALE_DTYPES[config.scale_dtype]
        sliced = slice_weight(weight.detach(), spec, scale_dtype=stored, where=name)
    bias: Any = module.bias
    elastic = MobiLinear.from_slices(sliced, bias, spec, weight.dtype, token_mask=mask)
    elastic.fingerprint = fingerprint(weight)
    elastic.train(module.training)
    return elastic


def set_submodule(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is held: a module may have several names."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new


def _data_free(model: nn.Module, sensitivity: Mapping[str, Tensor]) -> MakeRouter:
    def make(group: Sequence[str], widths: tuple[int, ...], mask: TokenMask) -> Router:
        members: list[Any] = [model.get_submodule(name) for name in group]
        params = sum(m.in_features * m.out_features for m in members)
        energies = [
            column_energy(m.scale, m.spec, m.in_features, sensitivity.get(name))
            for name, m in zip(group, members, strict=True)
        ]
        return Router(torch.stack(energies).sum(0) / params, widths, mask)

    return make


def _share_routers(
    model: nn.Module, groups: Sequence[Sequence[str]], config: SliceConfig, make: MakeRouter
) -> BudgetState:
    """Give each group of linears one router, and all routers one budget state and token mask."""
    routers = []
    for group in groups:
        members: list[Any] = [model.get_submodule(name) for name in group]
        router = make(group, members[0].spec.widths, members[0].router.token_mask)
        router.params = sum(m.in_features * m.out_features for m in members)
        router.floor, router.ceiling = group_limits(group, config)
        for member in members:
            member.router = router
        routers.append(router)
    return BudgetState(routers)


def group_limits(group: Sequence[str], config: SliceConfig) -> tuple[int, int]:
    """Return the floor and ceiling of linears that share one decision: the strictest of each."""
    limits = [config.limits(name) for name in group]
    low, high = max(low for low, _ in limits), min(high for _, high in limits)
    if low > high:
        where = f"SliceConfig for {', '.join(group)}, which share a router"
        raise BadOption(where=where, name="floor/ceiling", got=(low, high), wanted="floor <= ceiling")
    return low, high


def _anchors(state: BudgetState) -> list[float]:
    low, high = state.range
    return sorted({low + (a - 2) / 6 * (high - low) for a in ANCHORS})
