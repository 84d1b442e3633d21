"""Tile configurations by family and token class, and the pure estimate that says which fit a target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from mobiquant_compiler.codegen.geometry import power_of_two, span
from mobiquant_compiler.errors import KernelDoesNotFit
from mobiquant_compiler.spec import Activation, Family, KernelSpec, Order, SliceSpec

# Dynamic shared memory a block may have, in bytes, by compute capability (CUDA programming guide, table of limits).
_SHARED_BYTES = {
    75: 65536,
    80: 166912,
    86: 101376,
    87: 166912,
    89: 101376,
    90: 232448,
    100: 232448,
    103: 232448,
    120: 101376,
}
_ROUTE_STEP = 1024  # columns per step of the route kernel


@dataclass(frozen=True, slots=True)
class Target:
    """What a kernel must fit.

    Attributes:
        cc: Compute capability, as 90 for sm_90.
        shared_bytes: Shared memory that one block may use.
    """

    cc: int
    shared_bytes: int

    @classmethod
    def of(cls, cc: int) -> Target:
        """Return the target of a compute capability; an unknown one gets the limit of the next older known one."""
        known = max((c for c in _SHARED_BYTES if c <= cc), default=75)
        return cls(cc, _SHARED_BYTES[known])

    def __str__(self) -> str:
        return f"sm_{self.cc}"


class TokenClass(StrEnum):
    """Numbers of tokens that share a kernel."""

    ONE = "1"
    UP_TO_16 = "2..16"
    UP_TO_32 = "17..32"
    UP_TO_64 = "33..64"
    MANY = "65.."

    @classmethod
    def of(cls, tokens: int) -> TokenClass:
        """Return the class of `tokens` >= 1."""
        limits = {1: cls.ONE, 16: cls.UP_TO_16, 32: cls.UP_TO_32, 64: cls.UP_TO_64}
        return next((member for limit, member in limits.items() if tokens <= limit), cls.MANY)

    @property
    def sample(self) -> int:
        """A number of tokens of this class, for warming up."""
        return {"1": 1, "2..16": 2, "17..32": 17, "33..64": 33}.get(self.value, 65)


@dataclass(frozen=True, slots=True)
class Tile:
    """One line of the table: tokens and output rows of a tile, columns or positions of a step, warps, stages."""

    block_m: int
    block_n: int
    block_w: int
    num_warps: int
    num_stages: int = 1


# Best first; a later line is smaller. block_w of decode counts positions, of the others columns.
_TILES: dict[tuple[Family, TokenClass], tuple[Tile, ...]] = {
    (Family.ROUTE, TokenClass.ONE): (Tile(1, 1, _ROUTE_STEP, 4),),
    (Family.ROUTE, TokenClass.MANY): (Tile(4, 1, _ROUTE_STEP, 4),),
    (Family.QUANTIZE, TokenClass.ONE): (Tile(1, 1, 512, 4),),
    (Family.QUANTIZE, TokenClass.MANY): (Tile(1, 1, 2048, 4),),
    (Family.DECODE, TokenClass.ONE): (Tile(1, 2, 128, 1), Tile(1, 2, 32, 1)),
    (Family.GROUPED, TokenClass.UP_TO_16): (Tile(16, 32, 0, 4, 2), Tile(16, 32, 0, 4), Tile(16, 16, 0, 4)),
    (Family.GROUPED, TokenClass.UP_TO_32): (Tile(32, 32, 0, 4, 2), Tile(32, 32, 0, 4), Tile(32, 16, 0, 4)),
    (Family.GROUPED, TokenClass.UP_TO_64): (Tile(64, 64, 0, 4, 2), Tile(64, 32, 0, 4), Tile(64, 16, 0, 4)),
    (Family.GROUPED, TokenClass.MANY): (Tile(64, 64, 0, 4, 2), Tile(64, 64, 0, 4), Tile(32, 32, 0, 4)),
}


def shared_bytes(spec: KernelSpec) -> int:
    """Estimate, from above, the shared memory in bytes that a block of `spec` needs.

    - route, quantize_activation: one float32 a warp for each row reduced.
    - decode_gemv: the exchange of one step's integers between lanes, 4 block_n block_w.
    - grouped_gemm: activation halves and codes of a group in each stage, ``(h M + N) G``; the codes' words while they
      change hands, ``4 N G``; float32 exchange of the tile, ``4 M N``.
    """
    if spec.family is Family.GROUPED:
        halves = 2 if spec.activation is Activation.A16 else 1
        stages = (halves * spec.block_m + spec.block_n) * spec.group * spec.num_stages
        return stages + 4 * spec.block_n * spec.group + 4 * spec.block_m * spec.block_n
    if spec.family is Family.DECODE:
        return 4 * spec.block_n * spec.block_w * spec.num_stages + 4096
    return 4 * spec.num_warps * max(spec.block_m, spec.block_w // spec.group) * 32


def fits(spec: KernelSpec, target: Target) -> bool:
    """Say whether a block of `spec` fits the target's shared memory; pure."""
    return shared_bytes(spec) <= target.shared_bytes


def choose(candidates: Iterator[KernelSpec] | tuple[KernelSpec, ...], target: Target) -> KernelSpec:
    """Return the first candidate that fits.

    Raises:
        KernelDoesNotFit: none does.
    """
    refused = []
    for spec in candidates:
        if fits(spec, target):
            return spec
        refused.append(spec)
    least = min(refused, key=shared_bytes)
    raise KernelDoesNotFit(
        family=least.family, target=target, spec=least.name, got=shared_bytes(least), wanted=target.shared_bytes
    )


def kernel_spec(
    family: Family,
    weight: SliceSpec,
    k: int,
    tokens: TokenClass,
    target: Target,
    *,
    activation: Activation = Activation.A16,
    has_bias: bool = False,
    emulate: bool = False,
) -> KernelSpec:
    """Choose the kernel of `family` for a weight of `k` input columns.

    The choice depends on nothing but the arguments, so that the same kernels can be warmed up ahead.

    Raises:
        KernelDoesNotFit: no tile fits the target.
    """
    one = tokens is TokenClass.ONE
    row = tokens if (family, tokens) in _TILES else TokenClass.MANY
    specs = (
        KernelSpec(
            family=family,
            widths=weight.widths,
            group=weight.group,
            layout=weight.layout,
            k=weight.padded(k),
            activation=activation,
            has_bias=has_bias and family in (Family.DECODE, Family.GROUPED),
            block_m=tile.block_m,
            block_n=tile.block_n,
            block_w=_block_w(family, weight, k, tile),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            order=Order.PLACES if one and family is Family.QUANTIZE else Order.COLUMNS,
            sorted_rows=tokens is TokenClass.MANY and family is Family.GROUPED,
            emulate=emulate and family is Family.DECODE,
        )
        for tile in _TILES[family, row]
    )
    return choose(tuple(specs), target)


def _block_w(family: Family, weight: SliceSpec, k: int, tile: Tile) -> int:
    """Cut a tile's step down to the columns there are; steps of decode and quantize hold whole groups."""
    padded = weight.padded(k)
    if family is Family.GROUPED:
        return weight.group
    if family is Family.DECODE:
        positions = span(weight)
        return max(weight.group // positions, min(tile.block_w, power_of_two(padded // positions)))
    return max(weight.group, min(tile.block_w, power_of_two(padded)))
