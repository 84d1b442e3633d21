"""`calibrate_`: slices chosen on calibration tokens, block by block, so that every slice count is good."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobiquant_compiler.blocks import Chain, blocks_of_all, members
from mobiquant_compiler.calibrate import (
    Loss,
    Progress,
    check_tokens,
    frozen,
    next_token_loss,
    sensitivities,
    shared_inputs,
)
from mobiquant_compiler.calibration.allocation import Costs
from mobiquant_compiler.calibration.codes import Factor, compensated_codes, factorize, values_at
from mobiquant_compiler.calibration.config import CalibrationConfig
from mobiquant_compiler.calibration.grids import sliced, weighted_grid
from mobiquant_compiler.calibration.residency import Residency, one_at_a_time
from mobiquant_compiler.calibration.routers import measured_routers, sum_of
from mobiquant_compiler.calibration.state import CalibrationState
from mobiquant_compiler.calibration.training import Training
from mobiquant_compiler.calibration.tuning import Teacher, answers, tune_
from mobiquant_compiler.config import SCALE_DTYPES, SliceConfig
from mobiquant_compiler.errors import BadOption
from mobiquant_compiler.hessians import gathered
from mobiquant_compiler.hooks import removing
from mobiquant_compiler.linear import TokenMask, elastic_linears
from mobiquant_compiler.quantize import (
    MakeRouter,
    attach_budgets,
    check,
    fingerprint,
    group_limits,
    make_elastic,
    select,
    set_submodule,
    state_of,
    weight_of,
)
from mobiquant_compiler.report import Coverage, Skip
from mobiquant_compiler.slices import SlicedWeight, storage_dtype
from mobiquant_compiler.spec import SliceSpec

GRADIENTS = "gradients"


@dataclass(frozen=True, slots=True)
class _Run:
    """What all steps of one calibration share."""

    model: nn.Module
    linears: dict[str, nn.Module]
    skipped: list[Skip]
    blocks: list[str]
    inputs: list[list[str]]  # linears that read the same tensor
    groups: list[list[str]]  # linears that share a router
    tokens: Tensor
    slices: SliceConfig
    config: CalibrationConfig
    loss: Loss
    progress: Progress
    state: CalibrationState


@torch.inference_mode(False)  # as in quantize_
def calibrate_(
    model: nn.Module,
    tokens: Tensor,
    config: CalibrationConfig | None = None,
    *,
    slices: SliceConfig | None = None,
    state: str | Path | None = None,
    loss: Loss | None = None,
    budget: float | None = None,
    strict: bool = False,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Coverage:
    """Replace the linear layers of a model, in place, by elastic ones whose slices are chosen on tokens.

    One gradient pass says how much the loss depends on each token and output of each linear. Then, block by block:
    the block's inputs give a Hessian for each distinct input of a linear, the Hessian gives codes that are good with
    every slice count (`codes`), and the quantized block's outputs feed the next. At the end budgets are measured as
    in `quantize_`.

    Args:
        model: Its linears lie in one chain of blocks (as those of decoder-only language models of transformers).
        tokens: Token ids [windows, length]; 64 windows of 512 are plenty (`evaluation.spread_windows`).
        config: How codes are chosen.
        slices: Slices, groups, layout, which layers.
        state: Directory in which each finished step is kept. A run that was interrupted goes on from there when it is
            called again, with the model as it was at first, and gives the same result.
        loss: As in `quantize_`.
        budget: As in `quantize_`.
        strict: As in `quantize_`.
        device: Where to compute; where the model is by default. On another device there is one block at a time, and
            what lies outside of blocks: a model that does not fit there stays in main memory. Slower, as blocks travel.
        progress: Called with stage, done, total.

    Returns:
        What was made elastic and what was not, and why. After an error in the middle the model is partly elastic.

    Raises:
        WeightError: as in `quantize_`; the model is untouched then.
        NoBlocks: the linears are not in a chain of blocks; the model is untouched then.
        CalibrationStateMismatch: `state` is of another model, tokens or configuration; likewise.
        NonFiniteActivations: the model does not run on these tokens.
    """
    run = _prepare(model, tokens, config, slices, state, loss, progress, strict)
    linears = list(run.linears)
    before = sum(weight_of(m).numel() * weight_of(m).element_size() for m in run.linears.values())
    with one_at_a_time(run.model, run.blocks, device) as residency:
        run = replace(run, tokens=run.tokens.to(residency.device))
        with frozen(run.model):
            outputs, routers = _all_steps(run, residency)
        shared = (run.tokens, run.loss, run.progress, routers)
        attach_budgets(run.model, linears, run.groups, run.slices, outputs, *shared)
    if budget is not None:
        state_of(run.model).set(budget)
    after = sum(linear.weight_bytes for linear in elastic_linears(run.model).values())
    return Coverage(linears, list(run.skipped), before, after)


def _all_steps(run: _Run, residency: Residency) -> tuple[Mapping[str, Tensor], MakeRouter]:
    """Make every linear elastic; returns the sensitivity of the loss to their outputs, and what makes their routers."""
    gradients = _gradients(run)
    expected = _calibrate_blocks(run, gradients)
    if run.config.tune_steps:
        costs = _costs(run, run.inputs, expected)  # not of routers: slices are the same for every scope
        tune_(run.model, costs, run.tokens, gradients.teacher, run.config, run.state, run.progress, residency.leave)
    costs = _costs(run, run.groups, expected)
    networks = _train_routers(run, gradients, costs, expected) if run.config.router == "mlp" else {}
    return gradients.outputs, measured_routers(costs, expected, networks)


def _prepare(
    model: nn.Module,
    tokens: Tensor,
    config: CalibrationConfig | None,
    slices: SliceConfig | None,
    state: str | Path | None,
    loss: Loss | None,
    progress: Progress | None,
    strict: bool,
) -> _Run:
    """Find every reason to refuse before the first weight is given up."""
    model = getattr(model, "_orig_mod", model)
    config, slices = config or CalibrationConfig(), slices or SliceConfig()
    count = len(slices.widths)
    if config.propagate is not None and config.propagate > count:
        raise BadOption(
            where="CalibrationConfig", name="propagate", got=config.propagate, wanted=f"at most {count}, the slices"
        )
    linears, skipped = select(model, slices)
    check(model, linears, skipped, slices, strict)
    blocks = blocks_of_all(model, list(linears))
    tokens = check_tokens(tokens).to(next(model.parameters()).device)
    loss, progress = loss or next_token_loss, progress or (lambda stage, done, total: None)
    inputs = shared_inputs(model, linears, tokens[:1, :32], loss)
    Chain(model, blocks, tokens[:1, :32], loss)  # refuses blocks that are none
    groups = inputs if slices.scope == "input" else [[name] for name in linears]
    for group in groups:
        group_limits(group, slices)
    kept = CalibrationState(state, _identity(linears, tokens, slices, config))
    return _Run(model, dict(linears), skipped, blocks, inputs, groups, tokens, slices, config, loss, progress, kept)


def _identity(
    linears: Mapping[str, nn.Module], tokens: Tensor, slices: SliceConfig, config: CalibrationConfig
) -> dict[str, object]:
    """Return what a run must have in common with the one that it goes on from."""
    model = hashlib.sha256()
    for name, module in linears.items():
        model.update(f"{name} {fingerprint(weight_of(module))}\n".encode())
    ids = tokens.cpu().contiguous()
    text = hashlib.sha256(repr(tuple(ids.shape)).encode() + ids.numpy().tobytes())
    routing = ("scope", "floor", "ceiling")  # what slices do not depend on
    return {
        "model": model.hexdigest(),
        "tokens": text.hexdigest(),
        "slices": {key: value for key, value in slices.to_dict().items() if key not in routing},
        "config": config.of_slices(),
    }


@dataclass(frozen=True, slots=True)
class _Gradients:
    """What one pass over the original model says.

    Attributes:
        outputs: Sensitivity of the loss to each output, float32 [N] by linear (`calibrate.sensitivities`).
        tokens: Weight of each token, [windows * length] of mean 1, by the first linear of each input; all 1 where
            tokens are not weighed.
        teacher: Its answers; what `tune_` brings the elastic model back to.
    """

    outputs: Mapping[str, Tensor]
    tokens: Mapping[str, Tensor]
    teacher: Teacher


def _gradients(run: _Run) -> _Gradients:
    found = run.state.load(GRADIENTS)
    if found is None:
        found = _measure_gradients(run)
        run.state.save(GRADIENTS, found)
    device = run.tokens.device
    outputs = {name: found[f"output.{name}"].to(device) for name in run.linears}
    weights = {}
    for group in run.inputs:
        seen = found.get(f"token.{group[0]}")
        if seen is None or not run.config.guided or float(seen.sum()) == 0:
            seen = torch.ones(run.tokens.numel())
        weights[group[0]] = (seen / seen.mean()).to(device)
    return _Gradients(outputs, weights, Teacher(found["teacher.values"], found["teacher.indices"]))


def _measure_gradients(run: _Run) -> dict[str, Tensor]:
    by_token: dict[str, list[Tensor]] = {}
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept.append(answers(getattr(output, "logits", output)))

    with removing([run.model.register_forward_hook(keep)]):
        outputs = sensitivities(run.model, run.linears, run.tokens, run.loss, run.progress, by_token)
    found = {f"output.{name}": value for name, value in outputs.items()}
    for group in run.inputs:
        seen = [torch.cat(by_token[name]) for name in group if name in by_token]
        if seen:
            found[f"token.{group[0]}"] = torch.stack(seen).sum(0)
    for key, parts in zip(("values", "indices"), zip(*kept, strict=True), strict=True):
        found[f"teacher.{key}"] = torch.cat(parts)
    return found


def _calibrate_blocks(run: _Run, gradients: _Gradients) -> dict[str, Tensor]:
    """Choose the codes of each block's linears in turn, and replace them; returns what `_expected` says."""
    steps = [f"block-{index:04d}" for index in range(len(run.blocks))]
    last = max((i for i, step in enumerate(steps) if not run.state.has(step)), default=-1)  # to be done
    chain = Chain(run.model, run.blocks, run.tokens, run.loss) if last >= 0 else None
    mask = TokenMask().to(run.tokens.device)
    expected: dict[str, Tensor] = {}
    for index, block in enumerate(run.blocks):
        inside = members(block, run.linears)
        found = run.state.load(steps[index])
        if found is None:
            assert chain is not None, "there is a chain while a block is to be done"
            found = _block_codes(run, chain, index, inside, gradients)
            run.state.save(steps[index], found)
        for name in inside:
            _replace(run, name, {key: found[f"{name}.{key}"] for key in ("codes", "scale", "zero")}, mask)
        expected |= {key: value for key, value in found.items() if key.endswith((".losses", ".energy"))}
        if chain is not None and index < last:
            with _propagating(run, inside):
                chain.run(index, advance=True)
        run.progress("blocks", index + 1, len(run.blocks))
    return expected


@contextmanager
def _propagating(run: _Run, names: Sequence[str]) -> Iterator[None]:
    """Use as many slices of these linears as the next block is calibrated behind."""
    routers: list[Any] = [run.model.get_submodule(name).router for name in names]
    if run.config.propagate is not None:
        for router in routers:
            router.thresholds[run.config.propagate - 1 :] = torch.inf
    yield
    for router in routers:
        router.thresholds.fill_(-torch.inf)
        router.reset()


def _block_codes(
    run: _Run, chain: Chain, index: int, inside: Sequence[str], gradients: _Gradients
) -> dict[str, Tensor]:
    """Return what `_group_codes` returns, of every linear of one block."""
    leaders = {group[0]: group for group in run.inputs if group[0] in inside}
    with gathered({name: run.linears[name] for name in leaders}, gradients.tokens) as hessians:
        chain.run(index, advance=False)
    found: dict[str, Tensor] = {}
    for leader, group in leaders.items():
        hessian = hessians.pop(leader, None)
        if hessian is None:  # took no part: all columns alike
            hessian = torch.eye(weight_of(run.linears[leader]).shape[1], device=run.tokens.device)
        factor = factorize(hessian, run.config.damping, leader)
        found |= _group_codes(group, hessian, factor, gradients.outputs, run)
    return found


def _group_codes(
    group: Sequence[str], hessian: Tensor, factor: Factor, outputs: Mapping[str, Tensor], run: _Run
) -> dict[str, Tensor]:
    """Choose the slices of all weights that read the same tensor in one walk through its columns: no row needs another.

    Returns:
        What `_expected` says and codes uint8 [N, K], scale and zero [N, groups], by ``name.key``.
    """
    weights = {name: weight_of(run.linears[name]).detach() for name in group}
    spec = run.slices.spec_for(hessian.shape[0])
    counted = run.config.weights([spec.bits(k) for k in range(1, spec.num_slices + 1)])
    grids = []
    for weight in weights.values():
        dtype = storage_dtype(weight, SCALE_DTYPES[run.slices.scale_dtype])
        grids.append(weighted_grid(weight.float(), hessian.diagonal(), spec, counted, run.config.narrowest, dtype))
    scale, zero = (torch.cat([t.float() for t in parts]) for parts in zip(*grids, strict=True))
    whole = torch.cat([weight.float() for weight in weights.values()])
    codes = compensated_codes(whole, factor, scale, zero, spec, counted).split([len(w) for w in weights.values()])
    found: dict[str, Tensor] = {}
    for (name, weight), grid, code in zip(weights.items(), grids, codes, strict=True):
        expected = _expected(weight.float(), code, *grid, spec, hessian, outputs[name])
        found |= {f"{name}.{key}": value for key, value in expected.items()}
    return found


def _expected(
    weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, spec: SliceSpec, hessian: Tensor, outputs: Tensor
) -> dict[str, Tensor]:
    """Return codes, scale and zero of one weight with what is expected of them.

    Returns:
        losses float64 [E], the growth of the loss with each slice count; energy float64 [K], the part of each column
        in it per squared activation, with the base alone.
    """
    wide = [t.float().repeat_interleave(spec.group, 1)[:, : weight.shape[1]] for t in (scale, zero)]
    errors = values_at(codes.float(), wide[0], wide[1], spec) - weight
    outputs = outputs.double()
    losses = torch.stack([(((e @ hessian) * e).sum(1).double() * outputs).sum() for e in errors])
    energy = (errors[0].double().square() * outputs.unsqueeze(1)).sum(0)
    # Errors of columns are correlated, on purpose: the columns' parts are scaled to what they come to together.
    energy = energy * losses[0] / (energy @ hessian.diagonal().double()).clamp_min(torch.finfo(torch.float64).tiny)
    return {"codes": codes.contiguous(), "scale": scale, "zero": zero, "losses": losses, "energy": energy}


def _replace(run: _Run, name: str, found: Mapping[str, Tensor], mask: TokenMask) -> None:
    """Put the elastic linear of `name` in place."""
    module = run.linears[name]
    weight = weight_of(module).detach()
    spec: SliceSpec = run.slices.spec_for(weight.shape[1])
    codes, scale, zero = (found[key].to(weight.device) for key in ("codes", "scale", "zero"))
    made: SlicedWeight = sliced(codes, weight.float(), scale, zero, spec)
    elastic = make_elastic(name, module, run.slices, mask, made)
    set_submodule(run.model, module, elastic)
    run.linears[name] = elastic


def _train_routers(
    run: _Run, gradients: _Gradients, costs: Costs, expected: Mapping[str, Tensor]
) -> dict[str, list[Tensor]]:
    """Return the network of each group's router by its first linear (`training`)."""
    if len(run.slices.widths) == 1:  # nothing to choose
        return {}
    leader = {name: group[0] for group in run.inputs for name in group}
    weights = {group[0]: gradients.tokens[leader[group[0]]] for group in run.groups}
    make = measured_routers(costs, expected, {})
    mask = TokenMask().to(run.tokens.device)
    start = {group[0]: make(group, run.slices.widths, mask) for group in run.groups}
    training = Training(run.model, run.blocks, start, run.groups, gradients.outputs, weights)
    return training.run(run.tokens, run.loss, run.config, run.state, run.progress)


def _costs(run: _Run, groups: Sequence[Sequence[str]], expected: Mapping[str, Tensor]) -> Costs:
    losses = torch.stack([sum_of(expected, group, "losses") for group in groups])
    linears: dict[str, Any] = run.linears
    params = [sum(linears[n].in_features * linears[n].out_features for n in group) for group in groups]
    bits = torch.tensor(run.slices.widths, dtype=torch.float64).cumsum(0)
    return Costs(groups, losses, torch.tensor(params, dtype=torch.float64), bits)
