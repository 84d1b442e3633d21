"""Which calls have their activations in shared memory, and the kernel for it; arithmetic only, no device."""

from __future__ import annotations

from mobiquant_compiler.codegen.configs import Target, TokenClass, choose, kernel_spec
from mobiquant_compiler.codegen.resident_layout import ResidentLayout
from mobiquant_compiler.spec import MULTIPROCESSORS, Activation, Family, KernelSpec, SliceSpec

_ON = 90  # compute capability where it was measured; others may have less shared memory
_GROUP = 128
_FEWEST_ROWS, _MANY_ROWS = 512, 2 * 16 * MULTIPROCESSORS + 1  # the least measured; more tiles than teams
_LONG = 4  # steps of a tile from which it is faster whatever the rows
_MOST_COLUMNS = 28672  # that were measured
_PREFETCHED = 16 * _GROUP  # columns, a step: more would be asked for twice, and stand before what is needed first
_WARPS, _REGISTERS = 16, 128  # all registers of a multiprocessor
_TOKENS, _ROWS = 8, 16  # of a tile


def serves(
    weight: SliceSpec,
    n: int,
    k: int,
    tokens: TokenClass,
    target: Target,
    *,
    activation: Activation = Activation.A16,
    scale_bytes: int = 2,
) -> bool:
    """Say whether resident_mma is there for a call, and faster than a program for each tile of rows; pure.

    Measured on an H100 and an H200: it is where there are more tiles than teams, two for each multiprocessor, and with
    long rows wherever it was measured. Scales are copied 16 bytes at a time; a ring may hold two steps of a tile.
    """
    if target.cc != _ON or tokens is not TokenClass.FEW or not weight.in_bit_pairs or weight.group != _GROUP:
        return False
    if scale_bytes not in (2, 4):
        return False
    groups = weight.padded(k) // _GROUP
    layout = ResidentLayout(groups, scale_bytes, 2 if activation is Activation.A16 else 1)
    copied = layout.steps > 1 and groups % 2 == 0 and groups * scale_bytes % 16 == 0
    rows = n >= (_MANY_ROWS if layout.steps < _LONG else _FEWEST_ROWS)
    return copied and rows and k <= _MOST_COLUMNS and layout.fits(weight.num_slices)


def multiply_spec(
    weight: SliceSpec,
    k: int,
    tokens: TokenClass,
    target: Target,
    *,
    n: int,
    activation: Activation = Activation.A16,
    has_bias: bool = False,
    parts: int = 1,
    scale_bytes: int = 2,
    emulate: bool = False,
    gluon: bool = True,
) -> KernelSpec:
    """Choose the kernel for tokens as lanes load them: resident_mma where it serves, else sliced_mma; pure.

    Args:
        weight: Widths, group and layout.
        k: Input columns.
        tokens: Class of token counts.
        target: What it must fit.
        n: Output rows of all weights of the launch.
        activation: Fixed-point width of activations.
        has_bias: Whether a bias is added.
        parts: Weights of the launch.
        scale_bytes: Of a scale.
        emulate: For the interpreter, which runs no Gluon.
        gluon: Whether kernels in Gluon can be compiled.

    Raises:
        KernelDoesNotFit: no tile fits the target.
    """
    facts = {"activation": activation, "has_bias": has_bias, "parts": parts}
    resident = serves(weight, n, k, tokens, target, activation=activation, scale_bytes=scale_bytes)
    if emulate or not (resident and gluon):
        return kernel_spec(Family.SLICED_MMA, weight, k, tokens, target, n=n, emulate=emulate, **facts)
    spec = KernelSpec(
        Family.RESIDENT_MMA,
        *(weight.widths, weight.group, weight.layout, weight.padded(k)),
        block_m=_TOKENS,
        block_n=_ROWS,
        num_warps=_WARPS,
        overlap=True,
        prefetch=_PREFETCHED,
        max_registers=_REGISTERS,
        **facts,
    )
    return choose((spec,), target)
