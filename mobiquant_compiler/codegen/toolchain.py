"""The one place that imports triton: lazily, so that the package works where triton is absent."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from mobiquant_compiler.errors import TritonMissing

# Kernels say `tl.fma` where they mean it: a compiler's choice of contraction differs from body to body, and Triton's
# default is about to change.
FP_FUSION = False
_GLUON = (
    *("DistributedLinearLayout", "DotOperandLayout", "NVMMADistributedLayout", "NVMMASharedLayout"),
    *("SharedLinearLayout", "SwizzledSharedLayout", "warp_specialize"),
)
_HOPPER = ("fence_async_shared", "mbarrier", "tma", "warpgroup_mma", "warpgroup_mma_wait")


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


def was_cached(compile_kernel: Callable[[], Any]) -> bool:
    """Compile, and say whether Triton's cache on disk held all of it; raises what `compile_kernel` does."""
    found: list[bool] = []
    knobs = triton().knobs.compilation
    before = knobs.listener

    def note(**facts: Any) -> None:
        found.append(bool(facts["cache_hit"]))
        if before is not None:
            before(**facts)

    knobs.listener = note
    try:
        compile_kernel()
    finally:
        knobs.listener = before
    return all(found)


def source_type(function: Any) -> Any:
    """Return what stands for the source of a jitted function when it is compiled without a device."""
    if function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource


@cache
def gluon_refusal() -> str | None:
    """Return why kernels that are written in Gluon cannot be compiled, None where they can; Gluon is experimental."""
    try:
        gluon = import_module("triton.experimental.gluon")
        language = import_module("triton.experimental.gluon.language")
        hopper = import_module("triton.experimental.gluon.language.nvidia.hopper")
    except ImportError as error:
        return f"triton {version()} has no Gluon ({error})"
    parts = [(gluon, ("jit", "constexpr_function")), (language, _GLUON), (hopper, _HOPPER)]
    missing = [name for module, names in parts for name in names if not hasattr(module, name)]
    if missing:
        return f"Gluon of triton {version()} lacks {', '.join(missing)}"
    return "kernels in Gluon do not run in the interpreter" if interpreting() else None
