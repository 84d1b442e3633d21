"""Read a checkpoint straight into packed buffers: no weight is ever held in full precision."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mobiquant_compiler.checkpoint.files import (
    CONFIG,
    FLOATS,
    TABLE_KEYS,
    LinearFacts,
    RouterFacts,
    Shards,
    StateFacts,
    check_finite,
    dtype_name,
    read_manifest,
    table_prefix,
)
from mobiquant_compiler.errors import (
    BadOption,
    CheckpointCorrupt,
    CheckpointMismatch,
    CheckpointMissing,
    CheckpointTensor,
    WeightNotInCheckpoint,
)
from mobiquant_compiler.linear import SCORE_TENSORS, MobiLinear, Router, TokenMask
from mobiquant_compiler.meta import WeightsOnMeta
from mobiquant_compiler.quantize import fingerprint, linear_like, weight_of
from mobiquant_compiler.runtime.budget import QUANTILES, BudgetState, CalibratedTable, StaticTable
from mobiquant_compiler.spec import SliceSpec


class Reader:
    """Turns the files of one checkpoint into modules; everything is checked before it is handed out."""

    def __init__(self, directory: str | Path, device: torch.device | str | None = None) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointMissing(path=self.directory, what="the directory")
        self.device = torch.device(device or "cpu")
        self.manifest = read_manifest(self.directory)
        self.shards = Shards(self.directory, self.device)
        self.mask = TokenMask().to(self.device)

    @cached_property
    def routers(self) -> dict[str, Router]:
        """The routers by name of linear, with table and budget in force."""
        by_linear: dict[str, Router] = {}
        for number, facts in enumerate(self.manifest.states):
            routers = []
            for router_facts in facts.routers:
                router = self._router(router_facts)
                routers.append(router)
                by_linear |= dict.fromkeys(router_facts.linears, router)
            state = BudgetState(routers, self._table(number, facts))
            low, high = state.range
            if not low - 1e-9 <= facts.budget <= high + 1e-9:
                wanted = f"{low:g} to {high:g}"
                raise CheckpointMismatch(
                    path=self.directory / CONFIG,
                    what="the budget in force is impossible",
                    got=facts.budget,
                    wanted=wanted,
                )
            state.set(facts.budget)
        return by_linear

    def _router(self, facts: RouterFacts) -> Router:
        linears = [self.manifest.linears[name] for name in facts.linears]
        name = f"{facts.prefix}.energy"
        energy = self.shards.read(name, (linears[0].in_features,), torch.float32)
        check_finite(self.shards, name, energy)
        router = Router(energy, linears[0].widths, self.mask, self._gain(facts, linears[0]))
        if facts.kind == "mlp":
            router.learn(self._network(facts, linears[0]))
        router.floor, router.ceiling = facts.floor, facts.ceiling
        router.params = sum(f.in_features * f.out_features for f in linears)
        return router

    def _network(self, facts: RouterFacts, linear: LinearFacts) -> list[Tensor]:
        """Return the tensors of a trained router, whose width the file decides."""
        hidden, hidden_bias, out, out_bias = (f"{facts.prefix}.{key}" for key in SCORE_TENSORS["mlp"][2:])
        first = self.shards.read(hidden, (-1, linear.in_features + 2), torch.float16)
        width, scores = first.shape[0], len(linear.widths) - 1
        shapes = {hidden_bias: (width,), out: (scores, width), out_bias: (scores,)}
        network = [first, *(self.shards.read(name, shape, torch.float16) for name, shape in shapes.items())]
        for name, tensor in zip((hidden, *shapes), network, strict=True):
            check_finite(self.shards, name, tensor)
        return network

    def _gain(self, facts: RouterFacts, linear: LinearFacts) -> Tensor | None:
        if not facts.measured:
            return None
        name = f"{facts.prefix}.gain"
        gain = self.shards.read(name, (len(linear.widths) - 1,), torch.float32)
        check_finite(self.shards, name, gain, least=0.0)
        return gain

    def _table(self, number: int, facts: StateFacts) -> CalibratedTable | StaticTable:
        if facts.table == "static":
            return StaticTable()
        names = [f"{table_prefix(number)}.{key}" for key in TABLE_KEYS]
        anchors = self.shards.read(names[0], (-1,), torch.float64).cpu()
        wanted = (len(anchors), len(facts.routers), QUANTILES)
        if any(router.kind == "mlp" for router in facts.routers):
            scores = len(self.manifest.linears[facts.routers[0].linears[0]].widths) - 1
            wanted = (*wanted[:2], scores, QUANTILES)
        quantiles = self.shards.read(names[1], wanted, torch.float32).cpu()
        for name, tensor in zip(names, (anchors, quantiles), strict=True):
            if tensor.numel() == 0 or bool(tensor.isnan().any()) or bool((tensor.diff(dim=-1) < 0).any()):
                got = f"{tensor.numel()} values that do not rise"
                raise CheckpointTensor(
                    path=self.shards.path(name), tensor=name, name="values", got=got, wanted="rising ones"
                )
        return CalibratedTable(anchors, quantiles)

    def linear(self, name: str, dtype: torch.dtype | None = None) -> MobiLinear:
        """Return one elastic linear with its shared router; `dtype` is what its ``weight.dtype`` says."""
        facts = self.manifest.linears[name]
        spec, n, k = facts.spec, facts.out_features, facts.in_features
        stored = getattr(torch, facts.scale_dtype)
        slices = self.shards.read(f"{name}.slices", spec.packed_shape(n, k), torch.int32)
        scale = self.shards.read(f"{name}.scale", spec.scale_shape(n, k), stored)
        zero = self.shards.read(f"{name}.zero", spec.scale_shape(n, k), stored)
        check_finite(self.shards, f"{name}.scale", scale, least=0.0)
        check_finite(self.shards, f"{name}.zero", zero)
        bias = None
        if facts.bias is not None:
            bias = self.shards.read(f"{name}.bias", (n,), getattr(torch, facts.bias))
            check_finite(self.shards, f"{name}.bias", bias)
        linear = MobiLinear(
            slices, scale, zero, bias, spec, k, self.routers[name], dtype or getattr(torch, facts.dtype)
        )
        linear.fingerprint = facts.fingerprint
        return linear


def load(
    directory: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Build the model that a checkpoint describes and fill it, packed weights straight from the mapped files.

    Args:
        directory: What `save` wrote, from a model of transformers (others: `load_into`).
        device: Where to; the CPU by default.
        dtype: Floating-point dtype of what is not packed; as stored by default.

    Returns:
        The model in eval mode, at the budget it was saved with.

    Raises:
        CheckpointError: says which file and tensor, and what was wanted.
    """
    reader = Reader(directory, device)
    model = _build(reader)
    _fill(model, reader, dtype)
    if (reader.directory / "generation_config.json").exists():
        from transformers import GenerationConfig

        generation: Any = GenerationConfig.from_pretrained(reader.directory)
        model.generation_config = generation
    return model.eval()


def load_into(
    model: nn.Module,
    directory: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Fill any module that has the linears and parameters of the checkpoint, in place.

    Args:
        model: The architecture, with any weights, on meta if wanted; its linears are replaced.
        directory: What `save` wrote.
        device: Where to; where the model's first parameter is by default (the CPU for meta).
        dtype: As in `load`.

    Returns:
        The same model.

    Raises:
        CheckpointError: the model is untouched then.
    """
    here = next((p.device for p in model.parameters() if not p.is_meta), None)
    _fill(model, Reader(directory, device or here), dtype)
    return model


def read_linears(
    directory: str | Path, *, device: torch.device | str | None = None
) -> dict[str, Callable[[], MobiLinear]]:
    """Return makers of elastic linears by fingerprint of the weight they were made from (`quantize.fingerprint`).

    Routers and budget are read now and shared, the packed weights when a maker is called. Of linears with equal
    weights the first serves all.

    Raises:
        CheckpointError: now for config.json, shards and routers; at the call for one linear's tensors.
    """
    reader = Reader(directory, device)
    assert reader.routers, "a checkpoint has at least one linear"
    makers: dict[str, Callable[[], MobiLinear]] = {}
    for name, facts in reader.manifest.linears.items():
        if facts.fingerprint is not None:
            makers.setdefault(facts.fingerprint, partial(reader.linear, name))
    return makers


def weight_source(directory: str | Path) -> Callable[[Tensor, SliceSpec, str], MobiLinear]:
    """Return what the backend asks for the slices of a plain weight: ``source(weight [N, K], spec, layer name)``.

    Raises:
        CheckpointError: the checkpoint is damaged.
        WeightNotInCheckpoint: (when asked) no linear was made from that weight.
        CheckpointMismatch: (when asked) it was sliced otherwise than the graph wants.
    """
    directory = Path(directory)
    read_manifest(directory)
    makers: dict[torch.device, dict[str, Callable[[], MobiLinear]]] = {}

    def source(weight: Tensor, spec: SliceSpec, name: str) -> MobiLinear:
        if weight.device not in makers:
            makers[weight.device] = read_linears(directory, device=weight.device)
        make = makers[weight.device].get(fingerprint(weight))
        if make is None:
            raise WeightNotInCheckpoint(path=directory, where=name, shape=" x ".join(map(str, weight.shape)))
        linear = make()
        if linear.router.kind != "energy":
            what = f"layer {name} has a trained router, which a plain model cannot take (load the checkpoint instead)"
            raise CheckpointMismatch(path=directory, what=what, got=linear.router.kind, wanted="energy")
        if linear.spec != spec:
            what = f"layer {name} is sliced otherwise (set options['slices'] to match)"
            raise CheckpointMismatch(path=directory, what=what, got=linear.spec, wanted=spec)
        return linear

    return source


def _build(reader: Reader) -> nn.Module:
    """Build the model of transformers that config.json describes, without weights."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    values = dict(reader.manifest.model)
    kind = values.pop("model_type", None)
    if kind is None:
        what = "the model's own configuration (it is not a model of transformers: build it and use load_into)"
        raise CheckpointMissing(path=reader.directory / CONFIG, what=what)
    try:
        config = transformers.AutoConfig.for_model(kind, **values)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        with WeightsOnMeta():
            return named._from_config(config) if named else transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as err:
        raise CheckpointCorrupt(path=reader.directory, what=CONFIG, reason=err) from err


def _fill(model: nn.Module, reader: Reader, dtype: torch.dtype | None) -> None:
    """Read everything, then put it in place: an error leaves the model as it was."""
    if dtype is not None and dtype_name(dtype) not in FLOATS:
        raise BadOption(where="load", name="dtype", got=dtype, wanted=f"one of {FLOATS}")
    targets = {name: _target(model, name, facts, reader) for name, facts in reader.manifest.linears.items()}
    linears = {targets[name]: reader.linear(name, dtype) for name in targets}
    others = _others(model, reader, set(targets.values()), dtype)
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in linears:
                parent._modules[key] = linears[child].train(child.training)
    for name, tensor in others.items():
        _assign(model, name, tensor)
    for alias, name in reader.manifest.tied.items():
        _tie(model, alias, name)
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if left:
        got = f"{len(left)} buffers that neither the files nor the model's constructor give, as {left[0]}"
        raise CheckpointMismatch(path=reader.directory, what="the model is not complete", got=got, wanted="none")
    model.to(reader.device)


def _target(model: nn.Module, name: str, facts: LinearFacts, reader: Reader) -> nn.Module:
    """Return the module that an elastic linear replaces."""
    wanted = f"a linear of {facts.out_features} x {facts.in_features}" + (" with bias" if facts.bias else "")
    try:
        module = model.get_submodule(name)
    except AttributeError:
        what = f"{type(model).__name__} has no layer {name}"
        raise CheckpointMismatch(path=reader.directory, what=what, got="none", wanted=wanted) from None
    got = f"a {type(module).__name__}"
    if isinstance(module, MobiLinear) or linear_like(module):
        n, k = module.weight.shape if isinstance(module, MobiLinear) else weight_of(module).shape
        got = f"a linear of {n} x {k}" + ("" if module.bias is None else " with bias")
    if got != wanted:
        what = f"layer {name} of {type(model).__name__} differs"
        raise CheckpointMismatch(path=reader.directory, what=what, got=got, wanted=wanted)
    return module


def _others(model: nn.Module, reader: Reader, targets: set[nn.Module], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Read every parameter and buffer that is not of an elastic linear."""
    inside = [name + "." for name, m in model.named_modules(remove_duplicate=False) if m in targets]
    state = {n: t for n, t in model.state_dict().items() if not n.startswith(tuple(inside))}
    tied, stored = reader.manifest.tied, set(reader.shards.files) - reader.manifest.elastic_names()
    missing = [n for n in state if n not in stored and tied.get(n) not in stored]
    foreign = [n for n in (*stored, *tied) if n not in state]
    for names, what in (
        (missing, "the model has tensors that it has not"),
        (foreign, "it has tensors that the model has not"),
    ):
        if names:
            got = f"{len(names)}, as {names[0]}"
            raise CheckpointMismatch(
                path=reader.directory, what=what, got=got, wanted=f"those of {type(model).__name__}"
            )
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    others = {}
    for name in sorted(stored):
        old = state[name]
        tensor = reader.shards.read(name, tuple(old.shape), None if old.is_floating_point() else old.dtype)
        cast = dtype is not None and name in parameters and tensor.is_floating_point()
        others[name] = tensor.to(dtype) if cast else tensor
    return others


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    old = module._parameters.get(key)
    if old is None:
        module._buffers[key] = tensor
    else:
        module._parameters[key] = nn.Parameter(tensor, requires_grad=old.requires_grad)


def _tie(model: nn.Module, alias: str, name: str) -> None:
    """Make `alias` the same parameter or buffer as `name`."""
    owner, _, key = name.rpartition(".")
    source: Any = model.get_submodule(owner)
    owner, _, other = alias.rpartition(".")
    module: Any = model.get_submodule(owner)
    kept = module._parameters if other in module._parameters else module._buffers
    kept[other] = source._parameters[key] if key in source._parameters else source._buffers[key]
