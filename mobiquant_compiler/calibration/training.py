"""Trained routers: a small network per input learns which tokens each further slice helps, and how much.

The data-free prediction of `reference.energy_scores` sees only the size of each column. What it cannot see are the
errors that cancel each other, and which tokens the loss depends on. Both are known on calibration tokens: there the
true worth of a slice is the weighted error that it removes from the linear's outputs, times the weight of the token.
The network learns the factor between that worth and the prediction, so training starts from the data-free router.

The worth of one token is the prediction's factor times noise with a long tail, and what a budget should follow is its
mean. So the loss is that of a gamma distribution with mean ``exp(c)``: ``worth / prediction * exp(-c) + c``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from mobiquant_compiler.blocks import Chain, members
from mobiquant_compiler.calibrate import Loss, Progress
from mobiquant_compiler.calibration.config import CalibrationConfig
from mobiquant_compiler.calibration.state import CalibrationState
from mobiquant_compiler.hooks import watched
from mobiquant_compiler.linear import SCORE_TENSORS, MobiLinear, Router
from mobiquant_compiler.packing import unpack
from mobiquant_compiler.reference import SCORES, mlp_features
from mobiquant_compiler.slices import reconstruct

NETWORK = SCORE_TENSORS["mlp"][2:]
_BATCH = 2048  # tokens a step
_RATE = 1e-2
_CHECKED = 8  # one token in so many is not trained on, and decides whether the network is kept
_CUT = 0.999  # quantile of the factors above which they are cut off: one token must not decide a step


@dataclass(frozen=True, slots=True)
class Lesson:
    """What one router learns from.

    Shapes: inputs [tokens, K]; worth [tokens, E - 1], the growth of the loss that each further slice prevents, per bit
    and weight.
    """

    inputs: Tensor
    worth: Tensor


def slice_worth(linears: Sequence[MobiLinear], outputs: Sequence[Tensor], x: Tensor, weight: Tensor) -> Tensor:
    """Return what each further slice of linears with one input prevents, for each token, per bit and weight.

    The weight with all slices stands for the original one.

    Args:
        linears: Of the same slices.
        outputs: Sensitivity of the loss to the outputs of each, [N].
        x: [T, K].
        weight: Of each token, [T].

    Returns:
        float32 [T, E - 1].
    """
    spec = linears[0].spec
    errors = torch.zeros(x.shape[0], spec.num_slices, device=x.device)
    for linear, counted in zip(linears, outputs, strict=True):
        whole = _weight(linear, spec.num_slices)
        for k in range(1, spec.num_slices):
            error = x @ (_weight(linear, k) - whole).t()
            errors[:, k - 1] += error.square_() @ counted.float()
    params = sum(linear.in_features * linear.out_features for linear in linears)
    bits = torch.tensor(spec.widths[1:], dtype=torch.float32, device=x.device) * params
    return (errors[:, :-1] - errors[:, 1:]) * weight.unsqueeze(1) / bits


def _weight(linear: MobiLinear, count: int) -> Tensor:
    codes = unpack(linear.slices, linear.spec, count)
    return reconstruct(codes, linear.scale, linear.zero, linear.spec, count)[:, : linear.in_features]


def train_network(lesson: Lesson, router: Router, config: CalibrationConfig, draw: torch.Generator) -> list[Tensor]:
    """Train the network of one router.

    Args:
        lesson: Its tokens.
        router: The data-free one that it starts from, of kind "energy".
        config: Width, steps.
        draw: What is drawn from (on the CPU).

    Returns:
        hidden, hidden_bias, out, out_bias for `Router.learn`. The weights are 0, so that only a factor per slice is
        left, where the network did not help on tokens that it was not trained on.
    """
    features = mlp_features(lesson.inputs)
    predicted = SCORES["energy"](lesson.inputs, router.tensors).clamp_min(1e-30)
    factors = (lesson.worth / predicted).clamp_min(0)
    factors = torch.minimum(factors, _quantile(factors, _CUT))
    checked = torch.arange(len(features), device=features.device) % _CHECKED == 0
    mean, spread = features[~checked].mean(0), features[~checked].std(0).clamp_min(1e-3)
    normal = (features - mean) / spread
    constant = factors[~checked].mean(0).clamp_min(1e-6).log()
    network = _fit(normal[~checked], factors[~checked], constant, config, draw)
    hidden, hidden_bias, out, out_bias = network
    gained = _gamma(_apply(normal[checked], network), factors[checked]) < _gamma(constant, factors[checked])
    if not bool(gained):
        # All of it: where training diverged, 0 times what is no number would be none either.
        hidden, hidden_bias, out = (torch.zeros_like(t) for t in (hidden, hidden_bias, out))
        out_bias = constant
    hidden = hidden / spread
    return [hidden, hidden_bias - hidden @ mean, out, out_bias]


def _quantile(values: Tensor, share: float) -> Tensor:
    """Return a quantile of each column (`torch.quantile` takes too few numbers)."""
    return values.sort(0).values[int(share * (len(values) - 1))]


def _gamma(correction: Tensor, factors: Tensor) -> Tensor:
    return (factors * (-correction).exp() + correction).mean()


def _apply(normal: Tensor, network: Sequence[Tensor]) -> Tensor:
    hidden, hidden_bias, out, out_bias = network
    return silu(normal @ hidden.t() + hidden_bias) @ out.t() + out_bias


def _fit(
    normal: Tensor, factors: Tensor, constant: Tensor, config: CalibrationConfig, draw: torch.Generator
) -> list[Tensor]:
    """Return the network of least loss, for inputs of mean 0 and spread 1."""
    columns, width, scores = normal.shape[1], config.router_width, factors.shape[1]
    hidden = torch.randn(width, columns, generator=draw).to(normal.device) / math.sqrt(columns)
    zeros = (torch.zeros(size, device=normal.device) for size in ((width,), (scores, width)))
    network = [t.clone().requires_grad_() for t in (hidden, *zeros, constant)]
    # One launch a step on a GPU, whose time here is the number of launches.
    optimizer = torch.optim.AdamW(network, lr=_RATE, weight_decay=0.01, fused=normal.is_cuda)
    drawn = torch.randint(0, len(normal), (config.router_steps, _BATCH), generator=draw).to(normal.device)
    for step in range(config.router_steps):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * (0.5 + 0.5 * math.cos(math.pi * step / config.router_steps))
        rows = drawn[step]
        with torch.enable_grad():
            loss = _gamma(_apply(normal[rows], network), factors[rows])
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    return [t.detach() for t in network]


@dataclass(frozen=True, slots=True)
class Training:
    """What the training of all routers of a model needs.

    Attributes:
        model: Elastic, frozen, in eval mode, at all slices.
        blocks: Names of its blocks.
        routers: The data-free router of each group of linears, by its first linear.
        groups: The linears that share a router.
        outputs: Sensitivity of the loss to the outputs of each linear.
        weights: Weight of each token by each group's first linear, [windows * length].
    """

    model: nn.Module
    blocks: Sequence[str]
    routers: Mapping[str, Router]
    groups: Sequence[Sequence[str]]
    outputs: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]

    def run(
        self, tokens: Tensor, loss: Loss, config: CalibrationConfig, state: CalibrationState, progress: Progress
    ) -> dict[str, list[Tensor]]:
        """Train the routers block by block; returns each group's network by its first linear."""
        tokens = tokens[: config.router_windows]
        chain = Chain(self.model, self.blocks, tokens, loss)
        networks: dict[str, list[Tensor]] = {}
        for index, block in enumerate(self.blocks):
            groups = {group[0]: group for group in self.groups if members(block, group[:1])}
            step = f"router-{_key(config, self.groups)}-{index:04d}"
            found = state.load(step)
            lessons = self._lessons(chain, index, groups if found is None else {})
            if found is None:
                found = self._train(index, lessons, config)
                state.save(step, found)
            networks |= {n: [found[f"{n}.{key}"] for key in NETWORK] for n in groups if f"{n}.{NETWORK[0]}" in found}
            progress("routers", index + 1, len(self.blocks))
        return networks

    def _train(self, index: int, lessons: Mapping[str, Lesson], config: CalibrationConfig) -> dict[str, Tensor]:
        found = {}
        for number, (name, lesson) in enumerate(lessons.items()):
            draw = torch.Generator().manual_seed((config.seed * 100_003 + index) * 1_009 + number)
            network = train_network(lesson, self.routers[name], config, draw)
            found |= {f"{name}.{key}": value for key, value in zip(NETWORK, network, strict=True)}
        return found

    def _lessons(self, chain: Chain, index: int, groups: Mapping[str, Sequence[str]]) -> dict[str, Lesson]:
        """Run a block over all windows; returns what the routers of its groups learn from."""
        linears: dict[str, Any] = {name: self.model.get_submodule(name) for name in groups}
        inputs: dict[str, list[Tensor]] = {name: [] for name in groups}
        with watched(linears, lambda name, x: inputs[name].append(x.float())):
            chain.run(index, advance=True)
        lessons = {}
        for name, seen in inputs.items():
            if not seen:  # took no part: the data-free router stays
                continue
            x = torch.cat(seen)
            members: list[Any] = [self.model.get_submodule(member) for member in groups[name]]
            outputs = [self.outputs[member] for member in groups[name]]
            lessons[name] = Lesson(x, slice_worth(members, outputs, x, self.weights[name][: len(x)]))
        return lessons


def _key(config: CalibrationConfig, groups: Sequence[Sequence[str]]) -> str:
    """Return a short name of what the training of routers depends on beside the slices."""
    options = {name: value for name, value in config.to_dict().items() if name.startswith("router")}
    told = json.dumps([options, [list(group) for group in groups]], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:8]
