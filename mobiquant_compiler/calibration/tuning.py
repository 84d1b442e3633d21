"""Scales and zero points tuned through the whole model, with the codes of the first slices held fixed.

Codes chosen column by column know only their own linear. What is left is for the two numbers of each group: a few
gradient steps bring the outputs of the elastic model back to those of the original one, while each step draws another
budget and gives each group of linears the slice count that suits it. So one pair of numbers is tuned for every count.
While it is tuned nothing but the values of scale and zero point changes (EfficientQAT, arXiv 2407.11062, tunes one
width so). At the end the slices beyond `HELD_BITS` are chosen again on the moved grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as multiply
from torch.nn.functional import pad

from mobiquant_compiler.blocks import without_cache
from mobiquant_compiler.calibration.allocation import Costs, allocate
from mobiquant_compiler.calibration.config import ZERO_RATE, CalibrationConfig
from mobiquant_compiler.calibration.grids import nearest_codes
from mobiquant_compiler.calibration.state import CalibrationState
from mobiquant_compiler.linear import MobiLinear
from mobiquant_compiler.packing import pack, unpack
from mobiquant_compiler.quantize import set_submodule
from mobiquant_compiler.slices import affine_at

STEP = "tuning"
TOP = 64  # most likely next tokens that are kept of the original model's answer
HELD_BITS = 4  # slices up to so many bits keep their codes: tuning is of what they multiply to
_SAVED = 10  # steps between two saved states
_WARMUP = 5
_LEAST_BITS = 0.05  # share of the budget range that is left out at its lower end: there every count is the least


@dataclass(frozen=True, slots=True)
class Teacher:
    """What the original model answers: the logarithm of the probability of its `TOP` most likely next tokens.

    Shapes: values float32 [windows, length, TOP]; indices int32, the same.
    """

    values: Tensor
    indices: Tensor

    def divergence(self, logits: Tensor, windows: Tensor) -> Tensor:
        """Return the mean divergence of logits [B, S, V] from the answers to `windows` [B], the rest as one token."""
        logs = logits.float().log_softmax(-1)
        wanted = self.values[windows].to(logs.device)
        got = logs.gather(-1, self.indices[windows].to(logs.device).long())
        value = (wanted.exp() * (wanted - got)).sum(-1)
        rest, rest_got = _rest(wanted), _rest(got)
        return (value + rest * (rest.log() - rest_got.log())).mean()


def _rest(logs: Tensor) -> Tensor:
    return (1 - logs.exp().sum(-1)).clamp_min(1e-6)


def answers(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values and indices that a `Teacher` keeps of logits [..., V]."""
    found = logits.detach().float().log_softmax(-1).topk(min(TOP, logits.shape[-1]), -1)
    return found.values.cpu(), found.indices.to(torch.int32).cpu()


class _Multiply(torch.autograd.Function):
    """``x W_count^T`` with gradients for x, the logarithm of the scale, and the zero point."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_scale: Tensor, zero: Tensor, module: _Tunable) -> Tensor:
        weight = module.rebuilt(log_scale, zero)
        ctx.module = module
        ctx.save_for_backward(x, weight, log_scale)
        return multiply(x, weight[:, : x.shape[-1]])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, log_scale = ctx.saved_tensors
        gradient = gradients[0]
        rows = gradient.reshape(-1, gradient.shape[-1])
        by_weight = rows.t() @ x.reshape(-1, x.shape[-1])
        by_weight = pad(by_weight, (0, weight.shape[1] - by_weight.shape[1])).float()
        shape = (weight.shape[0], -1, ctx.module.spec.group)
        by_weight = by_weight.view(shape)
        by_scale = (by_weight * weight.view(shape).float()).sum(-1)
        by_zero = -ctx.module.scale * log_scale.exp() * by_weight.sum(-1)
        return gradient @ weight[:, : x.shape[-1]], by_scale, by_zero, None


class _Tunable(nn.Module):
    """Stands in for a `MobiLinear` while its scale and zero point are tuned; all tokens use `count` slices."""

    codes: Tensor
    scale: Tensor

    def __init__(self, source: MobiLinear) -> None:
        super().__init__()
        self.source, self.spec = source, source.spec
        self.count = source.spec.num_slices
        self.register_buffer("codes", unpack(source.slices, source.spec, source.spec.num_slices))
        self.register_buffer("scale", source.scale.float())
        self.log_scale = nn.Parameter(torch.zeros_like(self.scale))
        self.zero = nn.Parameter(source.zero.float())

    def rebuilt(self, log_scale: Tensor, zero: Tensor) -> Tensor:
        """Return ``W_count`` [N, K_padded] in bfloat16."""
        values = self._values(self.scale * log_scale.exp(), zero, self.count)
        return values.view(self.codes.shape).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        y = _Multiply.apply(x.to(torch.bfloat16), self.log_scale, self.zero, self)
        bias = self.source.bias
        return (y if bias is None else y + bias).to(x.dtype)

    def store(self) -> None:
        """Write scale and zero point back, in the dtype they are stored in, and what later slices make of them."""
        with torch.no_grad():
            before = self._values(self.scale, self.source.zero.float(), self.spec.num_slices)
            self.source.scale.copy_(self.scale * self.log_scale.exp())
            self.source.zero.copy_(self.zero)
            self.source.slices.copy_(pack(self._codes_near(before), self.spec))

    def _values(self, scale: Tensor, zero: Tensor, count: int) -> Tensor:
        """Return ``W_count`` in groups, float32 [N, groups, G]."""
        codes = self.codes >> (self.spec.total_bits - self.spec.bits(count))
        step, centre = affine_at(scale, zero, self.spec, count)
        return (codes.view(*scale.shape, self.spec.group).float() - centre.unsqueeze(-1)) * step.unsqueeze(-1)

    def _codes_near(self, wanted: Tensor) -> Tensor:
        """Return the codes uint8 [N, K_padded] that come nearest to weights with all slices; the held ones stay.

        Tuning moves a grid by more than the last slices are fine. What they said of the weight, they say again of the
        moved grid: so many bits stay as near to the original model as they were, on any text.
        """
        bits = [self.spec.bits(count) for count in range(1, self.spec.num_slices + 1)]
        held = max([b for b in bits if b <= HELD_BITS], default=bits[0])
        part = 1 << (self.spec.total_bits - held)
        codes = self.codes.view(wanted.shape).float()
        first = (codes / part).floor() * part
        scale, zero = (t.float().unsqueeze(-1) for t in (self.source.scale, self.source.zero))
        nearest = nearest_codes(wanted, scale, zero, self.spec)
        nearest = torch.minimum(torch.maximum(nearest, first), first + (part - 1))
        return torch.where(scale > 0, nearest, codes).to(torch.uint8).view(self.codes.shape)


@contextmanager
def _tunable(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, _Tunable]]:
    """Put stand-ins into the model within the block."""
    stand_ins = {name: _Tunable(model.get_submodule(name)) for name in names}  # type: ignore[arg-type]
    for name, module in stand_ins.items():
        set_submodule(model, model.get_submodule(name), module)
    try:
        yield stand_ins
    finally:
        for module in stand_ins.values():
            set_submodule(model, module, module.source)


def tune_(
    model: nn.Module,
    costs: Costs,
    tokens: Tensor,
    teacher: Teacher,
    config: CalibrationConfig,
    state: CalibrationState,
    progress: Callable[[str, int, int], None],
    settle: Callable[[], None] = lambda: None,
) -> None:
    """Tune scales and zero points of a model's elastic linears, in place, in `config.tune_steps` steps.

    Memory: the model, its codes with a byte a weight, and the activations of `config.tune_windows` windows; where
    blocks compute one at a time (`residency`), on that device one block of these. Arithmetic
    is in bfloat16, with the two numbers of each group in float32.

    Args:
        model: Calibrated, frozen, in eval mode.
        costs: What the slices of its linears are worth, for drawing counts.
        tokens: Token ids [windows, length].
        teacher: Of the same windows.
        config: Steps, rates, seed.
        state: Where every tenth step is kept.
        progress: Called with stage, done, total.
        settle: Called where all parameters must be on one device (`residency`).
    """
    settle()
    names = [name for group in costs.groups for name in group]
    with _tunable(model, names) as stand_ins:
        optimizer = _Adam([p for m in stand_ins.values() for p in (m.log_scale, m.zero)], config.tune_decay)
        done = _resume(stand_ins, optimizer, state.load(STEP))
        for step in range(done, config.tune_steps):
            draw = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            _set_counts(stand_ins, costs, draw)
            chosen = torch.randint(0, len(tokens), (config.tune_windows,), generator=draw)
            _gradients(model, tokens[chosen.to(tokens.device)], chosen, teacher, tokens.device.type)
            settle()
            rate = _schedule(step, config.tune_steps) * config.tune_rate
            optimizer.step([rate, ZERO_RATE * rate] * len(names))
            if (step + 1) % _SAVED == 0 or step + 1 == config.tune_steps:
                state.save(STEP, _tensors(stand_ins, optimizer, step + 1))
            progress("scales", step + 1, config.tune_steps)
        settle()
        for module in stand_ins.values():
            module.store()


def _gradients(model: nn.Module, ids: Tensor, chosen: Tensor, teacher: Teacher, device: str) -> None:
    with torch.enable_grad(), without_cache(model), torch.autocast(device, torch.bfloat16):
        output = model(ids)
        teacher.divergence(getattr(output, "logits", output), chosen).backward()


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / _WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def _set_counts(stand_ins: Mapping[str, _Tunable], costs: Costs, draw: torch.Generator) -> None:
    """Draw a budget, few bits more often than many, and give each group of linears a count that suits it."""
    low, high = costs.range
    share = _LEAST_BITS + (1 - _LEAST_BITS) * float(torch.rand((), generator=draw)) ** 1.5
    noise = torch.randn(len(costs.groups), 1, generator=draw, dtype=torch.float64)
    for group, count in zip(costs.groups, allocate(costs, low + share * (high - low), noise).tolist(), strict=True):
        for name in group:
            stand_ins[name].count = count


class _Adam:
    """Adam whose state is plain tensors, so that it can be kept and taken up again; it decays towards the start.

    Adam moves what hardly matters as far as what does. Without decay that is noise, which the text tuned on averages
    out and other text does not.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.start = [p.detach().clone() for p in parameters]
        self.first = [torch.zeros_like(p) for p in parameters]
        self.second = [torch.zeros_like(p) for p in parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, rates: Sequence[float], betas: tuple[float, float] = (0.9, 0.95)) -> None:
        """Move each parameter by its gradient, and forget the gradients."""
        self.steps += 1
        fresh = [1 - beta**self.steps for beta in betas]
        moved = zip(self.parameters, self.start, self.first, self.second, rates, strict=True)
        for p, start, first, second, rate in moved:
            if p.grad is None:  # took no part
                continue
            first.lerp_(p.grad, 1 - betas[0])
            second.lerp_(p.grad.square(), 1 - betas[1])
            p.lerp_(start, rate * self.decay)
            p.sub_(rate * (first / fresh[0]) / ((second / fresh[1]).sqrt() + 1e-8))
            p.grad = None


def _tensors(stand_ins: Mapping[str, _Tunable], optimizer: _Adam, step: int) -> dict[str, Tensor]:
    found = {"step": torch.tensor(step)}
    kinds = ("log_scale", "zero")
    for i, (name, kind) in enumerate((n, k) for n in stand_ins for k in kinds):
        moments = (optimizer.parameters[i], optimizer.first[i], optimizer.second[i])
        found |= {f"{name}.{kind}.{j}": tensor for j, tensor in enumerate(moments)}
    return found


@torch.no_grad()
def _resume(stand_ins: Mapping[str, _Tunable], optimizer: _Adam, found: Mapping[str, Tensor] | None) -> int:
    """Take up a kept state; returns the steps that are done."""
    if found is None:
        return 0
    kinds = ("log_scale", "zero")
    for i, (name, kind) in enumerate((n, k) for n in stand_ins for k in kinds):
        moments = (optimizer.parameters[i], optimizer.first[i], optimizer.second[i])
        for j, tensor in enumerate(moments):
            tensor.copy_(found[f"{name}.{kind}.{j}"])
    optimizer.steps = int(found["step"])
    return optimizer.steps
