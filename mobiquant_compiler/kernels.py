"""Which kernel serves what: chosen, emitted and loaded once for each kind of call."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING

import torch

from mobiquant_compiler.spec import Activation, Family, SliceSpec

if TYPE_CHECKING:
    from mobiquant_compiler.codegen.batch_configs import BatchTile
    from mobiquant_compiler.codegen.cache import Kernel
    from mobiquant_compiler.codegen.configs import Target, TokenClass

_INTERPRETER_CC = 80  # tiles of the interpreter: those of the oldest target we test


@lru_cache(maxsize=64)
def target_of(device: torch.device) -> Target:
    """Return what kernels for `device` must fit; CPU tensors are the interpreter's."""
    from mobiquant_compiler.codegen.configs import Target

    if device.type != "cuda":
        return Target.of(_INTERPRETER_CC)
    major, minor = torch.cuda.get_device_capability(device)
    return Target.of(10 * major + minor)


@cache
def prepare_kernel(
    spec: SliceSpec,
    k: int,
    target: Target,
    activation: Activation,
    *,
    route: bool,
    quantize: bool,
    hidden: int = 0,
    long: bool = False,
    token_rows: bool = False,
) -> Kernel:
    """Return the kernel that chooses slice counts, writes activations in fixed point, or both.

    Counts are chosen by a trained router of `hidden` units where there are any; calls of more than `PREFILL_TOKENS`
    tokens are `long`; batch_wgmma takes `token_rows`.
    """
    from mobiquant_compiler.codegen import cache, configs, toolchain

    return cache.load(
        configs.kernel_spec(
            Family.ROUTE_QUANTIZE,
            spec,
            k,
            configs.TokenClass.ONE,
            target,
            activation=activation,
            route=route,
            quantize=quantize,
            hidden=hidden,
            long=long,
            token_rows=token_rows,
            emulate=toolchain.interpreting(),
        )
    )


@cache
def multiply_kernel(
    spec: SliceSpec,
    n: int,
    k: int,
    tokens: TokenClass,
    target: Target,
    activation: Activation,
    *,
    has_bias: bool = False,
    parts: int = 1,
    scale_bytes: int = 2,
) -> Kernel:
    """Return the kernel that multiplies a class of token counts by weights of `n` output rows together."""
    from mobiquant_compiler.codegen import cache, resident_configs, toolchain

    return cache.load(
        resident_configs.multiply_spec(
            spec,
            k,
            tokens,
            target,
            n=n,
            activation=activation,
            has_bias=has_bias,
            parts=parts,
            scale_bytes=scale_bytes,
            emulate=toolchain.interpreting(),
            gluon=gluon_refusal() is None,
        )
    )


@cache
def batch_kernel(
    spec: SliceSpec,
    k: int,
    target: Target,
    activation: Activation,
    *,
    tile: BatchTile,
    has_bias: bool = False,
    parts: int = 1,
    row_unit: int = 1,
) -> Kernel:
    """Return the kernel that multiplies blocks of tokens by products of warpgroups."""
    from mobiquant_compiler.codegen import batch_configs, cache

    return cache.load(
        batch_configs.batch_spec(
            spec,
            k,
            target,
            tile=tile,
            activation=activation,
            has_bias=has_bias,
            parts=parts,
            row_unit=row_unit,
        )
    )


@cache
def _has_batch_kernel(spec: SliceSpec, target: Target) -> bool:
    from mobiquant_compiler.codegen import batch_configs

    return batch_configs.serves(spec, target) and gluon_refusal() is None


def batch_tiles(
    spec: SliceSpec, target: Target, tokens: TokenClass, n: int, k: int, parts: int
) -> tuple[BatchTile, ...]:
    """Return the tiles of batch_wgmma that calls of a class of token counts can take."""
    from mobiquant_compiler.codegen import batch_configs

    return batch_configs.tiles_of(tokens, n, k, parts) if _has_batch_kernel(spec, target) else ()


def batch_takes_all(spec: SliceSpec, target: Target, tokens: TokenClass, n: int, k: int, parts: int) -> bool:
    """Say whether batch_wgmma serves all calls of a class of token counts, so that no lanes multiply."""
    from mobiquant_compiler.codegen import batch_configs

    return _has_batch_kernel(spec, target) and batch_configs.takes_all(tokens, n, k, parts)


def batch_routes_rows(spec: SliceSpec, target: Target, tokens: TokenClass, n: int, k: int, parts: int) -> bool:
    """Say whether calls of a class of token counts can want rows from the kernel that routes."""
    from mobiquant_compiler.codegen import batch_configs

    return _has_batch_kernel(spec, target) and batch_configs.keeps_any_order(tokens, n, k, parts)


@lru_cache(maxsize=1024)
def batch_tile(spec: SliceSpec, target: Target, tokens: int, rows: tuple[int, ...], k: int) -> BatchTile | None:
    """Return the tile of a call of batch_wgmma, which wants tokens as rows; None where lanes load them.

    Args:
        spec: Widths, group and layout of the weights.
        target: Where they are.
        tokens: T.
        rows: Output rows of each weight.
        k: Input columns.
    """
    from mobiquant_compiler.codegen import batch_configs

    if not _has_batch_kernel(spec, target):
        return None
    return batch_configs.tile_of(tokens, batch_configs.blocks_of(rows), k)


@lru_cache(maxsize=1024)
def batch_keeps_order(tokens: int, rows: tuple[int, ...], k: int) -> bool:
    """Say whether tokens that are routed for batch_wgmma keep their order; arguments of `batch_tile`, which has one."""
    from mobiquant_compiler.codegen import batch_configs

    return batch_configs.keeps_order(tokens, batch_configs.blocks_of(rows), k)


@cache
def dequantize_kernel(spec: SliceSpec, k: int, target: Target, *, sorted_rows: bool) -> Kernel:
    """Return the kernel that writes weights out for a library's GEMM."""
    from mobiquant_compiler.codegen import cache, configs

    many = configs.TokenClass.MANY
    return cache.load(configs.kernel_spec(Family.DEQUANTIZE, spec, k, many, target, sorted_rows=sorted_rows))


@cache
def gather_kernel(spec: SliceSpec, k: int, target: Target) -> Kernel:
    """Return the kernel that brings tokens of equal slice count together."""
    from mobiquant_compiler.codegen import cache, configs

    return cache.load(configs.kernel_spec(Family.GATHER_TOKENS, spec, k, configs.TokenClass.MANY, target))


@cache
def fused_kernel(
    spec: SliceSpec,
    k: int,
    target: Target,
    *,
    small: bool,
    split: bool,
    row_unit: int = 1,
    has_bias: bool = False,
) -> Kernel:
    """Return the kernel that multiplies gathered tokens by weights made in registers."""
    from mobiquant_compiler.codegen import cache, configs

    facts = {"small": small, "split": split, "row_unit": row_unit, "has_bias": has_bias}
    return cache.load(configs.wgmma_spec(spec, k, target, **facts))


def fused_is_small(tokens: int, n: int, k: int, groups: int) -> bool:
    """Say whether a call takes the fused kernel with small tiles; its tokens may have `groups` different counts."""
    from mobiquant_compiler.codegen import configs

    return configs.wgmma_is_small(tokens, n, k, groups)


def fused_is_split(n: int, k: int) -> bool:
    """Say whether calls of weights of `n` rows take a fused kernel whose last wave is split along `k` columns."""
    from mobiquant_compiler.codegen import configs

    return configs.wgmma_is_split(n, k)


def fused_splits(n: int, k: int, parts: int) -> tuple[bool, ...]:
    """Return whether fused kernels of a launch are split, given the rows of all its weights: some of several may be."""
    alone = fused_is_split(n, k)
    return (False, True) if parts > 1 and not alone and fused_is_split(1, k) else (alone,)


@cache
def gluon_refusal() -> str | None:
    """Return why kernels written in Gluon cannot be compiled here, None where they can."""
    from mobiquant_compiler.codegen import toolchain

    return toolchain.gluon_refusal()


@lru_cache(maxsize=64)
def router_spec(num_slices: int) -> SliceSpec:
    """Return the spec that kernels are made for which only route: they see the number of slices, not their widths."""
    return SliceSpec((1,) * num_slices, 32)
