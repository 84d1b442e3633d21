"""`set_execution`: how an elastic model computes, which is a choice of the caller and no part of the weights."""

from __future__ import annotations

from torch import nn

from mobiquant_compiler.errors import NotQuantized
from mobiquant_compiler.linear import check_module, elastic_linears
from mobiquant_compiler.spec import Activation, Prefill


def set_execution(model: nn.Module, *, activation: str | None = None, prefill: str | None = None) -> None:
    """Choose how the elastic linears of a model compute, from its next call on; a compiled one is compiled anew.

    Checkpoints do not keep it, and ``options={"activation": ..., "prefill": ...}`` of torch.compile win over it.

    Args:
        model: Quantized model, compiled or not.
        activation: Fixed-point width of activations in the integer kernels of a GPU: "a16" (as made by `quantize_`) or
            "a8" (half the products, rounded to a 127th of a group's largest value). None leaves it as it is.
        prefill: How calls of more than 64 tokens are done. "routed" (as made by `quantize_`): every token with its own
            slice count, by whatever path is fastest. "full": every token with all slices that the ceiling of its layer
            allows, whatever the budget; `achieved_bits` says so. "exact": as "routed", but always on the integer path
            of a GPU, where no bit of a token's result depends on its batch. None leaves it as it is.

    Raises:
        BadOption: another value; nothing is changed.
        NotAModule: `model` is none.
        NotQuantized: the model has no elastic linear of its own.
    """
    check_module(model, "set_execution")
    linears = elastic_linears(model)
    if not linears:
        raise NotQuantized(where="set_execution", model=type(model).__name__)
    chosen: dict[str, str] = {}
    if activation is not None:
        chosen["activation"] = str(Activation.of(activation, "set_execution"))
    if prefill is not None:
        chosen["prefill"] = str(Prefill.of(prefill, "set_execution"))
    for linear in linears.values():
        for name, value in chosen.items():
            setattr(linear, name, value)
