"""What users call while a model runs: `set_budget`, `budget`, `achieved_bits`, `padding_mask`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from mobiquant_compiler.errors import NotElastic
from mobiquant_compiler.linear import MobiLinear, check_module, elastic_linears, plain_name
from mobiquant_compiler.runtime import telemetry
from mobiquant_compiler.runtime.budget import BudgetState, live_states
from mobiquant_compiler.runtime.telemetry import AchievedBits
from mobiquant_compiler.runtime.weights import BOUND


def linears_of(model: nn.Module, where: str) -> dict[str, MobiLinear]:
    """Return the elastic linears of a model, or those bound to its plain weights by the backend."""
    check_module(model, where)
    found = {plain_name(name): linear for name, linear in elastic_linears(model).items()}
    if found:
        return found
    bound = BOUND.of_model(model)
    if not bound:
        raise NotElastic(where=where, model=type(model).__name__)
    return bound


def states_of(linears: dict[str, MobiLinear]) -> list[BudgetState]:
    """Return the budget states of linears; those that have none get one of all slices."""
    loose = [r for r in telemetry.routers_of(linears) if r.state is None]
    if loose:
        BudgetState(loose)
    return list({id(r.state): r.state for r in telemetry.routers_of(linears)}.values())


def set_budget(model: nn.Module, bits: float) -> None:
    """Set the average weight bits per token, effective at the next launch: no recompile, no new CUDA graph.

    Args:
        model: Quantized model, compiled or not; or a plain model that ran compiled with backend="mobiquant".
        bits: Wanted average over all elastic linears, weighted by parameters.

    Raises:
        NotAModule: `model` is none.
        NotElastic: the model has no elastic linear.
        BudgetOutOfRange: names the range; nothing is changed.
    """
    states = states_of(linears_of(model, "set_budget"))
    for state in states:
        state.check(bits)
    for state in states:
        state.set(bits)


def set_initial_budget(inputs: Sequence[object], bits: float | None) -> None:
    """Set the budget of the routers whose thresholds are among a graph's inputs, once (`options={"budget": ...}`)."""
    if bits is None:
        return
    wanted = {id(value) for value in inputs}
    states = {id(s): s for s in live_states() if any(id(r.thresholds) in wanted for r in s.routers)}
    for state in states.values():
        state.start(bits)


def get_budget(model: nn.Module) -> float:
    """Return the budget in force (of the first group of linears that share one)."""
    return states_of(linears_of(model, "get_budget"))[0].budget


@contextmanager
def budget(model: nn.Module, bits: float) -> Iterator[None]:
    """Run a block at another budget, then return to the one before."""
    states = states_of(linears_of(model, "budget"))
    before = [state.budget for state in states]
    set_budget(model, bits)
    try:
        yield
    finally:
        for state, value in zip(states, before, strict=True):
            state.set(value)


def achieved_bits(model: nn.Module) -> AchievedBits:
    """Return the average weight bits that tokens really used since `reset_telemetry`, in all and per linear."""
    return telemetry.achieved(linears_of(model, "achieved_bits"))


def reset_telemetry(model: nn.Module) -> None:
    """Start counting slice counts anew."""
    telemetry.reset(linears_of(model, "reset_telemetry"))


def refresh(model: nn.Module) -> int:
    """Drop the slices of a plain model's weights, so that its next compiled call packs them anew.

    Needed after edits that leave no trace in torch: through ``.data`` into the same storage, or of tensors made under
    inference_mode. Everything else is seen without it.

    Returns:
        How many weights had slices.

    Raises:
        NotAModule: it is no model.
    """
    check_module(model, "refresh")
    return BOUND.forget(model)


@contextmanager
def padding_mask(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Leave padding out of `achieved_bits`: within the block, calls of ``mask.numel()`` tokens are counted by it.

    Args:
        model: Elastic model.
        mask: Attention mask [batch, length], nonzero for real tokens.

    Raises:
        MaskTooLong: more tokens than can be told apart.
    """
    with telemetry.masked(linears_of(model, "padding_mask"), mask):
        yield
