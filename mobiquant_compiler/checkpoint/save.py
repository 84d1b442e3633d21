"""Write an elastic model as a directory, all at once or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import Tensor, nn

from mobiquant_compiler.checkpoint.files import (
    CONFIG,
    INDEX,
    SHARD_BYTES,
    TABLE_KEYS,
    LinearFacts,
    Manifest,
    RouterFacts,
    StateFacts,
    dtype_name,
    is_checkpoint,
    table_prefix,
    write_shards,
)
from mobiquant_compiler.errors import BadOption, CheckpointInTheWay, CheckpointMismatch, NotElastic
from mobiquant_compiler.linear import SCORE_TENSORS, MobiLinear, Router, check_module, elastic_linears, plain_name
from mobiquant_compiler.runtime.budget import BudgetState, CalibratedTable, StaticTable


def save(model: nn.Module, directory: str | Path, *, tokenizer: Any = None, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write an elastic model as a directory: config.json and safetensors, all at once or not at all.

    Args:
        model: A model after `quantize_` or `load`, compiled or not.
        directory: New, empty, or an older checkpoint of ours, which is replaced only when the new one is complete.
        tokenizer: Saved beside the model if given (anything with `save_pretrained`).
        shard_bytes: Largest size of one file.

    Returns:
        The directory.

    Raises:
        NotAModule: it is no model.
        NotElastic: the model has no elastic linear.
        CheckpointInTheWay: the directory holds something else.
    """
    check_module(model, "save")
    model = getattr(model, "_orig_mod", model)
    directory = free_place(directory)
    manifest, tensors = _describe(model)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        write_shards(tensors, temporary, shard_bytes)
        (temporary / CONFIG).write_text(json.dumps(manifest.to_json(), indent=1), encoding="utf-8")
        for shard in temporary.glob("*.safetensors"):
            shutil.copymode(temporary / CONFIG, shard)  # safetensors makes files that only their owner may read
        for companion in (getattr(model, "generation_config", None), tokenizer):
            if companion is not None:
                companion.save_pretrained(temporary)
        _publish(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def free_place(directory: str | Path) -> Path:
    """Return the whole path of a directory that a checkpoint can be written to: new, empty, or an older one of ours.

    Raises:
        CheckpointInTheWay: it holds something else, or is a file.
    """
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise CheckpointInTheWay(path=directory, got="it is a file")
    if directory.exists() and not is_checkpoint(directory) and (held := sorted(os.listdir(directory))):
        raise CheckpointInTheWay(path=directory, got=", ".join(held[:3]) + ("..." if len(held) > 3 else ""))
    return directory


def _publish(temporary: Path, directory: Path) -> None:
    """Put the finished directory in place; what a user added to the old checkpoint stays."""
    if not directory.exists():
        temporary.rename(directory)
        return
    for old in directory.iterdir():
        ours = old.suffix == ".safetensors" or old.name == INDEX
        if not ours and not (temporary / old.name).exists():
            copy = shutil.copytree if old.is_dir() else shutil.copy2
            copy(old, temporary / old.name)
    aside = temporary.with_name(temporary.name + ".old")
    directory.rename(aside)
    try:
        temporary.rename(directory)
    except OSError:
        aside.rename(directory)
        raise
    shutil.rmtree(aside)


def _describe(model: nn.Module) -> tuple[Manifest, dict[str, Tensor]]:
    """Return what config.json says and the tensors to store, each once."""
    linears = {plain_name(name): linear for name, linear in elastic_linears(model).items()}
    if not linears:
        raise NotElastic(where="save", model=type(model).__name__)
    members: dict[Router, list[str]] = {}
    for name, linear in linears.items():
        members.setdefault(linear.router, []).append(name)
    states = _states(list(members))
    routers = {f"{names[0]}.router": router for router, names in members.items()}
    tensors, tied = _stored(model, routers, set(linears))
    facts = []
    for number, state in enumerate(states):
        calibrated = isinstance(state.table, CalibratedTable)
        if calibrated:
            tensors |= {f"{table_prefix(number)}.{key}": getattr(state.table, key) for key in TABLE_KEYS}
        elif not isinstance(state.table, StaticTable):
            wanted = "a StaticTable or a CalibratedTable"
            raise BadOption(where="save", name="budget table", got=type(state.table).__name__, wanted=wanted)
        routers = tuple(RouterFacts(tuple(members[r]), r.kind, r.floor, r.ceiling, r.measured) for r in state.routers)
        facts.append(StateFacts(state.budget, "calibrated" if calibrated else "static", routers))
    config = getattr(model, "config", None)
    own = json.loads(config.to_json_string()) if hasattr(config, "to_json_string") else {}
    if own and not own.get("architectures"):
        own["architectures"] = [type(model).__name__]
    return Manifest({n: _facts(m) for n, m in linears.items()}, tuple(facts), tied, own), tensors


def stored_keys(router: Router) -> tuple[str, ...]:
    """Return the buffers of a router that a checkpoint holds: an unmeasured gain follows from the widths."""
    return SCORE_TENSORS[router.kind] if router.measured else ("energy",)


def _states(routers: list[Router]) -> list[BudgetState]:
    loose = [r for r in routers if r.state is None]
    if loose:
        BudgetState(loose)
    states = list({id(r.state): r.state for r in routers}.values())
    for state in states:
        if any(r not in routers for r in state.routers):
            got = (
                f"{sum(r in routers for r in state.routers)} of the {len(state.routers)} routers that share its budget"
            )
            raise CheckpointMismatch(path="(save)", what="this is a part of a model", got=got, wanted="the whole model")
    return states


def _facts(linear: MobiLinear) -> LinearFacts:
    return LinearFacts(
        in_features=linear.in_features,
        out_features=linear.out_features,
        widths=tuple(linear.widths),
        group=linear.group,
        layout=linear.layout,
        scale_dtype=dtype_name(linear.scale.dtype),
        dtype=dtype_name(linear.weight_like.dtype),
        bias=None if linear.bias is None else dtype_name(linear.bias.dtype),
        fingerprint=getattr(linear, "fingerprint", None),
    )


def _stored(
    model: nn.Module, owners: Mapping[str, Router], linears: set[str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors to store and the other names of tied ones; shared routers and shared linears count once."""
    names = {plain_name(n) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, MobiLinear)}
    again = tuple(f"{name}." for name in names - linears)
    routers = {f"{name}.router" for name in linears}
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        name = plain_name(name)
        owner, _, key = name.rpartition(".")
        if name.startswith(again):
            continue
        if owner in routers:
            if owner in owners and key in stored_keys(owners[owner]):
                stored[name] = tensor
            continue
        identity = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.numel() and identity in first:
            tied[name] = first[identity]
            continue
        first[identity] = name
        stored[name] = tensor
    return stored, tied
