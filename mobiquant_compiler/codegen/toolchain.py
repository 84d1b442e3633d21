"""The one place that imports triton: lazily, so that the package works where triton is absent."""

from __future__ import annotations

from types import ModuleType

from mobiquant_compiler.errors import TritonMissing

# Kernels say `tl.fma` where they mean it: a compiler's choice of contraction differs from body to body, and Triton's
# default is about to change.
FP_FUSION = False


def triton() -> ModuleType:
    """Import and return triton.

    Raises:
        TritonMissing: it is not installed, or does not import.
    """
    try:
        import triton as module
        import triton.language
    except ImportError as error:
        raise TritonMissing(reason=str(error)) from error
    return module


def version() -> str:
    """Return triton's version, "absent" where there is none: text can be emitted without it."""
    try:
        return str(triton().__version__)
    except TritonMissing:
        return "absent"


def interpreting() -> bool:
    """Say whether triton runs kernels in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return bool(triton().knobs.runtime.interpret)


def cuobjdump() -> str | None:
    """Return the path of the disassembler that triton ships, None where there is none."""
    try:
        return str(triton().knobs.nvidia.cuobjdump.path)
    except (RuntimeError, AttributeError):
        return None
