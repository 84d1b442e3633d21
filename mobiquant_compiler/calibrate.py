"""What calibration tokens are used for in a data-free model: sensitivities, shared inputs, score distributions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mobiquant_compiler.errors import BadTokens, EmptyBatch
from mobiquant_compiler.hooks import removing
from mobiquant_compiler.linear import MobiLinear, Router
from mobiquant_compiler.reference import SCORES
from mobiquant_compiler.runtime.budget import QUANTILES, BudgetState, CalibratedTable

Loss = Callable[[nn.Module, Tensor], Tensor]
Progress = Callable[[str, int, int], None]


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean cross entropy of the next token for ids [B, S]; the model gives logits or has ``.logits``."""
    output = model(tokens)
    logits = getattr(output, "logits", output)
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def check_tokens(tokens: Tensor, where: str = "calibration") -> Tensor:
    """Return the tokens as int64 [windows, length].

    Raises:
        BadTokens: not an integer tensor of one or two dimensions.
        EmptyBatch: no window, or windows too short to predict anything.
    """
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dtype is torch.bool:
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise BadTokens(where=where, name="type", got=got, wanted="an integer tensor [windows, length]")
    if tokens.dim() not in (1, 2):
        raise BadTokens(where=where, name="shape", got=tuple(tokens.shape), wanted="[windows, length]")
    tokens = tokens.reshape(-1, tokens.shape[-1])
    if tokens.shape[0] == 0 or tokens.shape[1] < 2:
        raise EmptyBatch(where=where, got=tuple(tokens.shape))
    return tokens.clone().long() if tokens.is_inference() else tokens.long()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluate without dropout or parameter gradients, and restore both.

    Parameters are remembered by name, which keeps none alive that is replaced meanwhile: those of a calibration are all
    of a model's weights.
    """
    training = model.training
    wanted = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in wanted:
                parameter.requires_grad_(True)
        model.train(training)


def sensitivities(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    tokens: Tensor,
    loss: Loss,
    progress: Progress,
    by_token: MutableMapping[str, list[Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Measure how much the loss grows per squared error at each output of each linear.

    The mean over tokens of the squared gradient of the summed loss at the linear's output: the diagonal of the
    empirical Fisher matrix, one gradient pass over the calibration tokens (quality figures: docs/architecture.md).

    Args:
        model: Any module.
        linears: Its linears by name.
        tokens: Token ids [windows, length].
        loss: See `next_token_loss`.
        progress: Called with stage, done, total.
        by_token: Gets the sum over outputs instead, for each token: a list of float32 [tokens] by name.

    Returns:
        float32 [N] by name; ones where the linear took no part.
    """
    sums = {name: torch.zeros(()) for name in linears}
    seen = dict.fromkeys(linears, 0)

    def watch(name: str) -> Callable[..., Tensor | None]:
        def add(gradient: Tensor) -> None:
            rows = gradient.flatten(0, -2).float()
            squares = rows.square()
            sums[name] = sums[name].to(rows.device) + squares.sum(0)
            seen[name] += rows.shape[0]
            if by_token is not None:
                by_token.setdefault(name, []).append(squares.sum(1).cpu())

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            # Parameters are frozen: the first linear's output starts the graph.
            output = output if output.requires_grad else output.detach().requires_grad_(True)
            output.register_hook(add)
            return output

        return hook

    with (
        frozen(model),
        torch.enable_grad(),
        removing([module.register_forward_hook(watch(name)) for name, module in linears.items()]),
    ):
        for step, window in enumerate(tokens):
            window = window.unsqueeze(0)
            value = loss(model, window) * window.numel()  # summed: a window's length must not change its gradients
            value.backward()
            progress("sensitivity", step + 1, len(tokens))
    return {name: sums[name] / seen[name] if seen[name] else torch.ones(()) for name in linears}


def shared_inputs(
    model: nn.Module, linears: Mapping[str, nn.Module], tokens: Tensor, run: Callable[[nn.Module, Tensor], Any]
) -> list[list[str]]:
    """Group linears that read the very same tensor, seen in one short forward pass.

    Returns:
        Names by group, in the order of execution; a linear that did not run is alone.
    """
    groups: list[list[str]] = []
    by_input: dict[int, list[str]] = {}
    alive: list[Tensor] = []  # identity is only meaningful while the tensors live

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if any(name in group for group in groups):
                return
            if id(x) not in by_input:
                by_input[id(x)] = []
                groups.append(by_input[id(x)])
                alive.append(x)
            by_input[id(x)].append(name)

        return hook

    with torch.no_grad(), removing([m.register_forward_pre_hook(watch(n)) for n, m in linears.items()]):
        run(model, tokens)
    placed = {name for group in groups for name in group}
    return groups + [[name] for name in linears if name not in placed]


def measure_table(
    model: nn.Module,
    linears: Mapping[str, MobiLinear],
    state: BudgetState,
    tokens: Tensor,
    anchors: Sequence[float],
    loss: Loss,
    progress: Progress,
) -> CalibratedTable:
    """Measure the distribution of every router's base score while the model runs near each anchor budget.

    Scores move with the precision of the layers before, so they are measured where they are used: the table of the
    anchors done so far sets the thresholds of the next, from the greatest budget down.
    """
    first = {}
    for linear in linears.values():
        first.setdefault(id(linear.router), linear)
    order = [first[id(router)] for router in state.routers]
    measured: dict[float, Tensor] = {}
    before = state.budget
    # Scores of an energy router differ between slices by a factor, those of a trained one in their distributions.
    each = any(router.kind != "energy" for router in state.routers)
    with frozen(model), torch.no_grad():
        for step, anchor in enumerate(sorted(anchors, reverse=True)):
            state.set(anchor)
            measured[anchor] = _score_quantiles(model, order, tokens, loss, each)
            state.table = _table(measured)
            progress("budget table", step + 1, len(anchors))
    state.set(before)
    for router in state.routers:
        router.reset()
    return _table(measured)


def _table(measured: Mapping[float, Tensor]) -> CalibratedTable:
    anchors = sorted(measured)
    return CalibratedTable(torch.tensor(anchors, dtype=torch.float64), torch.stack([measured[a] for a in anchors]))


def _score_quantiles(model: nn.Module, order: Sequence[MobiLinear], tokens: Tensor, loss: Loss, each: bool) -> Tensor:
    """Return quantiles of log scores of each linear's router, float32.

    [R, QUANTILES] of the base score, before gains; or if `each` [R, E - 1, QUANTILES], of the least score up to each
    slice, which decides whether it is used.
    """
    scores: list[list[Tensor]] = [[] for _ in order]

    def watch(router: Router, into: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            flat = args[0].reshape(-1, args[0].shape[-1])
            found = SCORES[router.kind](flat, router.tensors).double()
            found = found.cummin(1).values.t() if each else found[:, 0] / router.gain[0]
            into.append(found.clamp_min(1e-300).log().float().cpu())

        return hook

    handles = [m.register_forward_pre_hook(watch(m.router, into)) for m, into in zip(order, scores, strict=True)]
    with removing(handles):
        for window in tokens:
            loss(model, window.unsqueeze(0))
    points = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
    shape = (len(order[0].widths) - 1, QUANTILES) if each else (QUANTILES,)
    # A router that saw no token (a branch not taken) gets a flat distribution: it never decides the average.
    return torch.stack([_quantiles(torch.cat(s, -1), points) if s else torch.zeros(shape) for s in scores])


def _quantiles(values: Tensor, points: Tensor) -> Tensor:
    found = torch.quantile(values.double(), points, dim=-1)
    return found.movedim(0, -1).float()
