"""Emitted kernels on disk and in memory: write the file, import it, hand out what it holds.

Two caches lie on disk. Ours holds source, one file a kernel in ``<cache>/kernels``, under a name with the `cache_key`:
template, spec and triton's version. The text depends on nothing else, and on no target either: what a target decides
(tile, overlap, registers) are fields of the spec. A file under the right name with other text is written anew.
Triton's (``TRITON_CACHE_DIR``) holds binaries, keyed by the source with all that it calls, the compile options, the
types and alignments of the arguments, the target and triton itself; so one file of ours serves any number of GPUs.
In memory a kernel is loaded once (`load`), and Triton keeps a binary a device and set of types; `compiled_kernels`
counts those.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from mobiquant_compiler.codegen import boxes, toolchain
from mobiquant_compiler.codegen.signature import Dtypes, parameter_type
from mobiquant_compiler.codegen.specialise import fingerprint, specialise
from mobiquant_compiler.config import RuntimeConfig
from mobiquant_compiler.spec import KernelSpec

log = logging.getLogger(__name__)
_LOADED: dict[KernelSpec, Kernel] = {}  # registry: kernels of this process
_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """A jitted kernel with what is needed to launch it.

    Attributes:
        spec: What it was made from.
        path: The emitted file that runs.
        function: The jitted function of that file.
        parameters: Names of its parameters.
        options: Compile options of the launch.
        descriptions: How parameters that take descriptors get them, by name.
    """

    spec: KernelSpec
    path: Path
    function: Any
    parameters: tuple[str, ...]
    options: dict[str, Any]
    descriptions: dict[str, boxes.Description]

    def launch(self, grid: tuple[int, ...], **arguments: Any) -> None:
        """Enqueue the kernel; arguments of parameters that specialisation dropped are left out.

        Parameters that take descriptors get those of the tensors that their `descriptions` name.
        """
        found = self.descriptions
        given = {
            name: found[name].of(arguments[found[name].source]) if name in found else arguments[name]
            for name in self.parameters
        }
        self.function[grid](**given, **self.options)


def cache_key(spec: KernelSpec) -> str:
    """Return the hash of all that the emitted file and its behaviour depend on, of which the target is no part."""
    fields = [f"{name}={value}" for name, value in spec.describe().items()]
    return hashlib.sha256("\n".join([fingerprint(spec.family), *fields]).encode()).hexdigest()[:16]


def emit(spec: KernelSpec, directory: Path | str | None = None) -> Path:
    """Write the kernel's source and return its path; needs neither a GPU nor triton.

    Args:
        spec: The kernel.
        directory: Where to; None is the cache, where the name carries the cache key.

    Raises:
        BadKernelSpec: the template refuses the spec.
    """
    text = specialise(spec)
    if directory is not None:
        return _write(Path(directory) / f"{spec.name}.py", text)
    name = f"{spec.name}__{cache_key(spec)}.py"
    try:
        return _write(RuntimeConfig.from_env().cache_dir / "kernels" / name, text)
    except OSError as error:
        fallback = _private_directory()
        log.warning("kernel cache cannot be written (%s); using %s for this process", error, fallback)
        return _write(fallback / name, text)


@lru_cache(maxsize=1)
def _private_directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="mobiquant-kernels-"))


def _write(path: Path, text: str) -> Path:
    """Make the file at `path` hold `text`, atomically: other processes see the old file, the new one, or none."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:32]}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _import(path: Path) -> ModuleType:
    name = f"mobiquant_compiler_emitted.{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None, f"{path} is a Python file"
    assert found.loader is not None, f"{path} is a Python file"
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # `inspect` looks functions' modules up there
    found.loader.exec_module(module)
    return module


def load(spec: KernelSpec) -> Kernel:
    """Emit and import the kernel of `spec`, once per process.

    Raises:
        TritonMissing: triton cannot be imported.
        BadKernelSpec: the template refuses the spec.
    """
    kernel = _LOADED.get(spec)
    if kernel is not None:
        return kernel
    toolchain.triton()
    with _LOCK:
        if spec not in _LOADED:
            path = emit(spec)
            function = getattr(_import(path), str(spec.family))
            names = tuple(function.arg_names)
            described = {name: boxes.description(name, spec) for name in names if boxes.is_described(name)}
            _LOADED[spec] = Kernel(spec, path, function, names, options(spec), described)
        return _LOADED[spec]


def loaded_kernels() -> tuple[Kernel, ...]:
    """Return the kernels that this process has loaded, in that order."""
    with _LOCK:
        return tuple(_LOADED.values())


def compiled_kernels() -> int:
    """Return how many binaries of our kernels Triton holds for launches in this process, on all devices.

    The number grows where a launch compiles, or reads from Triton's cache on disk, and stands still where all that is
    launched was launched before with the same types. Binaries of `compile_for` do not count, nor does the interpreter.
    """
    devices = [d for kernel in loaded_kernels() for d in getattr(kernel.function, "device_caches", {}).values()]
    return sum(len(binaries) for binaries, *_ in devices)


def options(spec: KernelSpec) -> dict[str, Any]:
    """Return the compile options of a kernel, the same for launches and for `compile_for`."""
    chosen: dict[str, Any] = {
        "num_warps": spec.num_warps,
        "num_stages": 1,  # templates that have stages spell them out; Triton pipelines no loop of theirs
        "enable_fp_fusion": toolchain.FP_FUSION,
    }
    if spec.max_registers:
        chosen["maxnreg"] = spec.max_registers
    if spec.overlap:
        chosen["launch_pdl"] = True
    return chosen


def compile_for(spec: KernelSpec, target_cc: int, dtypes: Dtypes | None = None) -> Any:
    """Compile a kernel for any CUDA target, without a GPU.

    Args:
        spec: The kernel.
        target_cc: Compute capability, as 90 for sm_90.
        dtypes: Dtypes of activations and scales; bfloat16 and float16 by default.

    Returns:
        Triton's compiled kernel: ``.asm["ptx"]``, ``.asm["cubin"]``, ``.metadata.shared``.

    Raises:
        TritonMissing: triton cannot be imported.
        BadKernelSpec: the template refuses the spec.
    """
    triton = toolchain.triton()
    from triton.backends.compiler import GPUTarget

    kernel = load(spec)
    dtypes = dtypes or Dtypes()
    types = {name: _type_of(name, spec, dtypes) for name in kernel.parameters}
    source = toolchain.source_type(kernel.function)(kernel.function, types, attrs=_aligned(kernel.function, types))
    return triton.compile(source, target=GPUTarget("cuda", target_cc, 32), options=kernel.options)


def _type_of(parameter: str, spec: KernelSpec, dtypes: Dtypes) -> str:
    if boxes.is_described(parameter):
        return boxes.descriptor_type(parameter, spec, dtypes.x)
    return parameter_type(parameter, spec.family, dtypes)


def _aligned(function: Any, types: dict[str, str]) -> dict[tuple[int, ...], list[list[Any]]]:
    """Say of the pointers that launches specialise on what holds of every allocation: 16-byte alignment."""
    free: Iterable[str] = function.do_not_specialize or ()
    names = [name for name, kind in types.items() if kind.startswith("*") and name not in free]
    return {(list(types).index(name),): [["tt.divisibility", 16]] for name in names}
