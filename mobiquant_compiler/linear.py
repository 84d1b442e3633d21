"""The modules of an elastic model: `MobiLinear`, the `Router` it asks, and the token mask all routers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from mobiquant_compiler.errors import NotAModule, TrainingGraph
from mobiquant_compiler.ops import OPS, check_input
from mobiquant_compiler.packing import pack
from mobiquant_compiler.slices import SlicedWeight, slice_weight
from mobiquant_compiler.spec import Activation, Prefill, SliceSpec

SCORE_TENSORS = {
    "energy": ("energy", "gain"),
    "mlp": ("energy", "gain", "hidden", "hidden_bias", "out", "out_bias"),
}  # buffers of a router by kind, in the order of `reference.SCORES`
MASK_CAPACITY = 65536  # tokens of one call that padding can be told apart in


class _KeepsDtype(nn.Module):
    """A module whose buffers follow device moves but not dtype casts: packed data has the dtypes it was made with."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # type: ignore[override]
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)


class TokenMask(_KeepsDtype):
    """Which tokens of a call are padding: int32 ``[1 + capacity]``, see `reference.record`."""

    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.zeros(1 + MASK_CAPACITY, dtype=torch.int32), persistent=False)


def score_gain(widths: tuple[int, ...]) -> Tensor:
    """Return the share of the base slice's error energy that each further slice removes per bit, float32 [E - 1].

    Each bit of a residual slice halves the step, so slice e leaves ``4**-(b_2 + ... + b_e)`` of the energy.
    """
    gains, left = [], 1.0
    for width in widths[1:]:
        gains.append(left * (1 - 4.0**-width) / width)
        left *= 4.0**-width
    return torch.tensor(gains, dtype=torch.float32)


class Router(_KeepsDtype):
    """Chooses slice counts for the tokens of one input; linears that read the same input share one.

    Attributes:
        energy: float32 [K], predicted growth of the loss per squared activation at the base slice, over parameters.
        gain: float32 [E - 1], see `score_gain`; or the measured share where slices were calibrated.
        thresholds: float32 [E - 1]; ``-inf`` forces a slice, ``inf`` forbids it, by a ceiling and at every budget.
            Written by `set_budget` only.
        hist: int64 [E], tokens seen by slice count (telemetry).
        resets: How often `hist` was set to zero, so that who reads differences of it knows.
        hidden, hidden_bias, out, out_bias: float16 network of a trained router (`reference.mlp_scores`), absent else.
        kind: Which score function (`reference.SCORES`).
        widths: Slice widths.
        floor: Least slice count.
        ceiling: Greatest slice count.
        params: Weights that its linears hold in all, the weight of its bits in averages.
        state: Budget state shared by all routers of a model (`runtime.budget.BudgetState`).
    """

    energy: Tensor
    gain: Tensor
    hidden: Tensor
    hidden_bias: Tensor
    out: Tensor
    out_bias: Tensor
    thresholds: Tensor
    hist: Tensor

    def __init__(
        self, energy: Tensor, widths: tuple[int, ...], token_mask: TokenMask | None = None, gain: Tensor | None = None
    ) -> None:
        super().__init__()
        self.kind = "energy"
        self.widths = tuple(widths)
        self.floor, self.ceiling = 1, len(widths)
        self.params = 0
        self.state: Any = None
        self.resets = 0
        self.token_mask = token_mask or TokenMask().to(energy.device)
        device = energy.device
        self.register_buffer("energy", energy.to(torch.float32))
        self.measured = gain is not None  # else the gain follows from the widths
        gain = score_gain(self.widths) if gain is None else gain.to(torch.float32)
        self.register_buffer("gain", gain.to(device))
        self.register_buffer("thresholds", torch.full((len(widths) - 1,), -torch.inf, device=device))
        self.register_buffer("hist", torch.zeros(len(widths), dtype=torch.int64, device=device), persistent=False)

    @property
    def tensors(self) -> list[Tensor]:
        """What the score function is given."""
        return [getattr(self, name) for name in SCORE_TENSORS[self.kind]]

    @property
    def hidden_units(self) -> int:
        """How many hidden units the network has, 0 where there is none."""
        return self.hidden.shape[0] if self.kind == "mlp" else 0

    def learn(self, network: Sequence[Tensor]) -> None:
        """Become a trained router: take hidden [H, K + 2], hidden_bias [H], out [E - 1, H], out_bias [E - 1]."""
        for name, tensor in zip(SCORE_TENSORS["mlp"][2:], network, strict=True):
            self.register_buffer(name, tensor.detach().to(self.energy.device, torch.float16))
        self.kind, self.measured = "mlp", True

    def reset(self) -> None:
        """Forget how many tokens were seen."""
        self.hist.zero_()
        self.resets += 1

    def bits_by_count(self) -> Tensor:
        """Return the weight bits of each slice count, float64 [E]."""
        return torch.tensor(self.widths, dtype=torch.float64).cumsum(0)

    def extra_repr(self) -> str:
        """Describe the router in one line."""
        return f"kind={self.kind}, widths={self.widths}, floor={self.floor}, ceiling={self.ceiling}"


class _NoGradient(torch.autograd.Function):
    """The identity; its backward refuses. Without it a residual around the layer would hide the missing gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise TrainingGraph(what="the input of an elastic linear")


class MobiLinear(_KeepsDtype):
    """A linear layer held as residual bit slices; its forward is one op.

    Attributes:
        slices: Packed codes int32 [total_bits, N, K_padded / 32].
        scale: Base step [N, K_padded / group].
        zero: Base zero point, same shape.
        bias: [N] or None.
        router: Shared with the linears that read the same input.
        activation: Fixed-point width of activations in the integer kernels, "a16" or "a8".
        prefill: How calls of many tokens are done, see `spec.Prefill`. Both are set by `set_execution`, and neither is
            part of a checkpoint.
    """

    slices: Tensor
    scale: Tensor
    zero: Tensor
    bias: nn.Parameter | None
    weight_like: Tensor

    def __init__(
        self,
        slices: Tensor,
        scale: Tensor,
        zero: Tensor,
        bias: Tensor | None,
        spec: SliceSpec,
        in_features: int,
        router: Router,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.fingerprint: str | None = None  # of the original weight, to find its slices again
        self.spec = spec
        self.widths, self.group, self.layout = list(spec.widths), spec.group, str(spec.layout)
        self.activation, self.prefill = str(Activation.A16), str(Prefill.ROUTED)
        self.in_features, self.out_features = in_features, slices.shape[1]
        self.register_buffer("slices", slices)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_buffer(
            "weight_like", torch.full((), torch.nan, dtype=dtype, device=slices.device), persistent=False
        )
        self.router = router

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        spec: SliceSpec,
        *,
        router: Router | None = None,
        token_mask: TokenMask | None = None,
        scale_dtype: torch.dtype = torch.float16,
        where: str = "weight",
    ) -> MobiLinear:
        """Slice and pack a weight [N, K]; without a router it gets one that predicts plain output error.

        Raises:
            WeightError: the weight cannot become slices.
        """
        sliced = slice_weight(weight.detach(), spec, scale_dtype=scale_dtype, where=where)
        return cls.from_slices(sliced, bias, spec, weight.dtype, router=router, token_mask=token_mask)

    @classmethod
    def from_slices(
        cls,
        sliced: SlicedWeight,
        bias: Tensor | None,
        spec: SliceSpec,
        dtype: torch.dtype,
        *,
        router: Router | None = None,
        token_mask: TokenMask | None = None,
    ) -> MobiLinear:
        """Pack the codes of a weight that was of `dtype`; the router as in `from_weight`."""
        n, k = sliced.codes.shape[0], sliced.k
        if router is None:
            router = Router(column_energy(sliced.scale, spec, k) / (n * k), spec.widths, token_mask)
            router.params = n * k
        return cls(pack(sliced.codes, spec), sliced.scale, sliced.zero, bias, spec, k, router, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply tokens [..., K] by the weight of each token's slice count; returns [..., N] in the dtype of x.

        Raises:
            BadInput: x is not floating point, or has another number of columns.
        """
        check_input(x, self.in_features, "MobiLinear")
        if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            x = _NoGradient.apply(x)
        router = self.router
        return OPS.elastic_linear.default(
            x,
            router.tensors,
            router.thresholds,
            router.hist,
            router.token_mask.tokens,
            router.kind,
            self.slices,
            self.scale,
            self.zero,
            self.bias,
            self.widths,
            self.group,
            self.layout,
            self.activation,
            self.prefill,
        )

    @property
    def weight(self) -> Tensor:
        """Stand-in for code that reads ``weight.dtype``, ``.device`` or ``.shape``; its values are NaN, on purpose."""
        return self.weight_like.expand(self.out_features, self.in_features)

    @property
    def weight_bytes(self) -> int:
        """Bytes of slices, scales and zero points."""
        return sum(t.numel() * t.element_size() for t in (self.slices, self.scale, self.zero))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # type: ignore[override]
        like = self.weight_like
        super()._apply(fn, recurse)
        self._buffers["weight_like"] = fn(like)  # the one buffer that follows casts: it tells the model's dtype
        return self

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"widths={tuple(self.widths)}, group={self.group}, layout={self.layout}"
        )


def column_energy(scale: Tensor, spec: SliceSpec, k: int, sensitivity: Tensor | None = None) -> Tensor:
    """Return the predicted loss growth per squared activation of each column with the base slice only.

    ``sum_n h_n s_{n,g}^2 / 12``: cells of step s have an error of variance s^2 / 12, and ``h_n`` is how much the loss
    grows per squared error at output n (1 where it is not known).

    Shapes: scale [N, groups]; sensitivity [N]; returns float32 [k].
    """
    squares = scale.double().square() / 12
    if sensitivity is not None:
        squares = squares * sensitivity.double().to(squares.device).unsqueeze(1)
    return squares.sum(0).repeat_interleave(spec.group)[:k].float()


def plain_name(name: str) -> str:
    """Return a module or parameter name without what torch.compile's wrappers put into it."""
    return name.replace("_orig_mod.", "")


def check_module(model: object, where: str) -> None:
    """Refuse what is no module.

    Raises:
        NotAModule: the message starts with `where`.
    """
    if not isinstance(model, nn.Module):
        raise NotAModule(where=where, got=type(model).__name__)


def elastic_linears(model: nn.Module) -> dict[str, MobiLinear]:
    """Return the elastic linears of a model by name, each module once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MobiLinear)}
