"""Numbers that follow from a kernel's widths and layout; pure, shared by configurations and emitted text."""

from __future__ import annotations

from mobiquant_compiler.spec import WORD_CODES, KernelSpec, Layout, SliceSpec


def slice_spec(spec: KernelSpec) -> SliceSpec:
    """Return widths, group and layout of the weight that a kernel reads."""
    return SliceSpec(spec.widths, spec.group, spec.layout)


def span(spec: SliceSpec) -> int:
    """Return the columns of one position: those that one word of the narrowest packed unit holds.

    The decode kernel steps through positions; a wider unit has several words at each.

    Example:
        >>> span(SliceSpec((2, 2))), span(SliceSpec((4, 2, 2))), span(SliceSpec((4,)))
        (16, 16, 8)
    """
    narrowest = 1 if spec.layout is Layout.BIT_MAJOR else min(spec.widths)
    return WORD_CODES // narrowest


def power_of_two(value: int) -> int:
    """Return the least power of two that is at least `value`."""
    return 1 << max(0, value - 1).bit_length()
