"""What a checkpoint holds, as plain data for `mobiquant inspect`."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch

from mobiquant_compiler.checkpoint.files import (
    FORMAT_VERSION,
    LinearFacts,
    Manifest,
    RouterFacts,
    Shards,
    check_finite,
    read_manifest,
)
from mobiquant_compiler.errors import CheckpointMissing


def summarize(directory: str | Path) -> dict[str, Any]:
    """Describe a checkpoint: every linear, its bytes and scales, routers, budgets, totals.

    Raises:
        CheckpointError: missing or damaged; shapes and dtypes are checked, packed codes are not read.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointMissing(path=directory, what="the directory")
    manifest, shards = read_manifest(directory), Shards(directory)
    routers = {name: r for state in manifest.states for r in state.routers for name in r.linears}
    linears = [_linear(name, facts, routers[name], shards) for name, facts in manifest.linears.items()]
    sizes = {name: _bytes(name, shards) for name in shards.files}
    parameters = sum(f.in_features * f.out_features for f in manifest.linears.values())
    held = sum(row["bytes"] for row in linears)
    totals = {
        "linears": len(linears),
        "parameters": parameters,
        "bytes": held,
        "bits_per_weight": 8 * held / parameters,
        "other_bytes": sum(size for name, size in sizes.items() if name not in manifest.elastic_names()),
    }
    states = [_state(manifest, number) for number in range(len(manifest.states))]
    return {
        "path": str(directory),
        "format_version": FORMAT_VERSION,
        "totals": totals,
        "states": states,
        "linears": linears,
    }


def _bytes(name: str, shards: Shards) -> int:
    shape, dtype = shards.facts(name)
    return prod(shape) * dtype.itemsize


def _linear(name: str, facts: LinearFacts, router: RouterFacts, shards: Shards) -> dict[str, Any]:
    n, k = facts.out_features, facts.in_features
    scale = shards.read(f"{name}.scale", facts.spec.scale_shape(n, k), getattr(torch, facts.scale_dtype))
    check_finite(shards, f"{name}.scale", scale, least=0.0)
    low, high = float(scale.min()), float(scale.max())
    return {
        "name": name,
        "shape": f"{n} x {k}",
        "widths": "+".join(map(str, facts.widths)),
        "group": facts.group,
        "layout": facts.layout,
        "bias": facts.bias,
        "dtype": facts.dtype,
        "bytes": sum(_bytes(f"{name}.{key}", shards) for key in ("slices", "scale", "zero")),
        "scale": f"{low:.3g} to {high:.3g}",
        "scale_low": low,
        "scale_high": high,
        "router": router.prefix if router.linears[0] == name else f"as {router.linears[0].rpartition('.')[2]}",
        "counts": f"{router.floor} to {router.ceiling}",
        "fingerprint": facts.fingerprint,
    }


def _state(manifest: Manifest, number: int) -> dict[str, Any]:
    state = manifest.states[number]
    low = high = total = 0
    for router in state.routers:
        for name in router.linears:
            facts = manifest.linears[name]
            params = facts.in_features * facts.out_features
            total += params
            low += params * facts.spec.bits(router.floor)
            high += params * facts.spec.bits(router.ceiling)
    return {
        "budget": state.budget,
        "low": low / total,
        "high": high / total,
        "table": state.table,
        "routers": len(state.routers),
    }
