"""Scales and zero points of groups: how they are read, and how they turn integer products into sums."""

import triton
import triton.language as tl

from mobiquant_compiler.codegen import fragments


@triton.constexpr_function
def shrink_at(widths, count):
    """Return the power of two by which the step of `count` slices is smaller than the base step."""
    return 1.0 / (1 << sum(widths[1:count]))


@triton.jit
def power_of_minus(power):
    """Return one over a power of two (float32, not below 2**-126): its exponent with the other sign."""
    return ((254 << 23) - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def grid_at(scale, zero, shrink, grow):
    """Return step and centre of a group's grid where residual slices make its cells smaller by ``shrink = 1 / grow``.

    slices.py's ``s_k = s shrink`` and ``Z_k = z grow + (grow - 1) / 2``; powers of two scale without rounding.
    """
    return scale * shrink, tl.fma(zero, grow, 0.5 * grow - 0.5)


@triton.jit
def add_group(acc, dots, grid, step, shift):
    """Add to acc the share of the output that comes from one group, given its integer dot product.

    For activations ``x = step xi`` and ``shift = -step sum(xi)``, ``s_k (Q_k - Z_k) . x`` is
    ``s_k (step (Q_k . xi) + shift Z_k)``.

    Numerics: contraction is spelled out here and off elsewhere (`toolchain.FP_FUSION`), so that bodies compiled for
        different slice counts and batch sizes round alike.
    Shapes: dots int32, the rest float32, all [THREADS]; grid as `grid_at` gives it.
    """
    return tl.fma(grid[0], tl.fma(dots.to(tl.float32), step, shift * grid[1]), acc)


@triton.jit
def load_scale(at, mask, EMULATE: tl.constexpr):
    """Load a scale (or zero point), 0 where the mask is false: in its own dtype."""
    DTYPE: tl.constexpr = at.dtype.element_ty
    if DTYPE.primitive_bitwidth == 16:
        scale = fragments.load_half(at, mask, EMULATE).to(DTYPE, bitcast=True)
    elif DTYPE.primitive_bitwidth == 32:
        scale = fragments.load_words(at, mask, 1, EMULATE)[0].to(DTYPE, bitcast=True)
    else:
        scale = tl.load(at, mask=mask, other=0.0)
    return scale


@triton.jit
def ask_scales(
    ptr, row, pair, GROUP: tl.constexpr, K_PADDED: tl.constexpr, CHECKED: tl.constexpr, EMULATE: tl.constexpr
):
    """Load a row's scales (or zero points) of a pair of groups, 0 where there is no group: what `scales_of` takes.

    Until it does nothing waits for them. Returns one int32 [THREADS] with both, or two tensors of their own dtype.
    """
    GROUPS: tl.constexpr = K_PADDED // GROUP
    at = ptr + row * GROUPS + pair * 2
    if GROUPS % 2 == 0 and ptr.dtype.element_ty.primitive_bitwidth == 16 and not EMULATE:
        # By way of the L1 cache: eight warps read one sector of a row.
        if CHECKED:
            asked = fragments.load_words(at, pair * 2 < GROUPS, 1, EMULATE)
        else:
            asked = fragments.read_words(at, 1, EMULATE)
    else:
        first = load_scale(at, pair * 2 < GROUPS, EMULATE)
        asked = (first, load_scale(at + 1, pair * 2 + 1 < GROUPS, EMULATE))
    return asked


@triton.jit
def scales_of(asked, ptr):
    """Return what `ask_scales` asked for at `ptr`, two float32 [THREADS]."""
    if len(asked) == 1:
        first = asked[0].to(tl.int16).to(ptr.dtype.element_ty, bitcast=True)
        second = (asked[0] >> 16).to(tl.int16).to(ptr.dtype.element_ty, bitcast=True)
    else:
        first, second = asked
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def load_scales(
    ptr, row, pair, GROUP: tl.constexpr, K_PADDED: tl.constexpr, CHECKED: tl.constexpr, EMULATE: tl.constexpr
):
    """Load a row's scales (or zero points) of a pair of groups, 0 where there is no group; two float32 [THREADS]."""
    return scales_of(ask_scales(ptr, row, pair, GROUP, K_PADDED, CHECKED, EMULATE), ptr)
