"""What a compiled kernel takes of a GPU, read from its binary by the tools that Triton ships; no GPU is needed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mobiquant_compiler.codegen import cache, toolchain
from mobiquant_compiler.codegen.configs import Target, fits
from mobiquant_compiler.codegen.signature import Dtypes
from mobiquant_compiler.errors import TritonMissing
from mobiquant_compiler.spec import REGISTERS, KernelSpec

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)")
_DECLARED = re.compile(r"(?<!\.extern )\.shared \.align \d+ \.b8 \w+\[(\d+)\]")  # beside what a launch gives
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?PT?\d* )?([A-Z]\w*)", re.MULTILINE)
_PRODUCTS = ("IMMA", "HMMA", "HGMMA", "IGMMA")


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one kernel on one target; None is what could not be had.

    Attributes:
        shared_bytes: Shared memory of a block.
        registers: Registers of a thread.
        local_bytes: Stack of a thread: what did not fit into registers.
        instructions: Instructions of the kernel, padding left out.
        loads: Loads from global memory among them.
        products: Tensor-core products among them.
        fits: Whether a block fits the target.
        ptx: What the binary was made from, "" where nothing was compiled.
        note: Why something could not be had, "" where all could.
    """

    shared_bytes: int | None = None
    registers: int | None = None
    local_bytes: int | None = None
    instructions: int | None = None
    loads: int | None = None
    products: int | None = None
    fits: bool = True
    ptx: str = ""
    note: str = ""


def measure(spec: KernelSpec, cc: int, dtypes: Dtypes | None = None) -> Resources:
    """Compile a kernel for a target and read what it takes; without triton only the estimate of `fits` is known.

    Args:
        spec: The kernel.
        cc: Compute capability, one of `configs.known_targets`.
        dtypes: Dtypes of activations and scales; bfloat16 and float16 by default.
    """
    target = Target.of(cc)
    try:
        if toolchain.interpreting():
            return Resources(fits=fits(spec, target), note="TRITON_INTERPRET=1: nothing is compiled in this process")
        binary = cache.compile_for(spec, cc, dtypes)
    except TritonMissing as error:
        return Resources(fits=fits(spec, target), note=str(error))
    ptx = str(binary.asm["ptx"])
    shared = int(binary.metadata.shared) + sum(map(int, _DECLARED.findall(ptx)))
    tool = toolchain.cuobjdump()
    listing = "" if tool is None else _listing(tool, binary.asm["cubin"])
    usage = _USAGE.search(listing)
    if usage is None:
        note = "triton's cuobjdump is missing" if tool is None else f"{tool} cannot read binaries of {target}"
        return Resources(shared, fits=shared <= target.shared_bytes, ptx=ptx, note=note)
    registers, stack, local = map(int, usage.groups())
    room = shared <= target.shared_bytes and registers * 32 * int(binary.metadata.num_warps) <= REGISTERS
    return Resources(shared, registers, stack + local, *_counts(listing), fits=room, ptx=ptx)


def _listing(tool: str, cubin: bytes) -> str:
    """Return what cuobjdump says of a binary, "" where it fails."""
    with tempfile.TemporaryDirectory(prefix="mobiquant-") as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [tool, "--dump-resource-usage", "--dump-sass", str(path)]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout
        except OSError:
            return ""


def _counts(listing: str) -> tuple[int | None, int | None, int | None]:
    """Return the numbers of instructions, loads and products; None where the disassembler gave none."""
    names = [name for name in _INSTRUCTION.findall(listing) if name != "NOP"]
    if not names:
        return None, None, None
    return len(names), names.count("LDG"), sum(name in _PRODUCTS for name in names)
