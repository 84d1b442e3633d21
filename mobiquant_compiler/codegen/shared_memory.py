"""Shared memory by address: copies that threads begin and wait for, reads and writes, and threads that meet.

Triton puts a meeting of all a program's threads between writes and reads of shared memory that it knows of. Here warps
wait for no more than they need: instructions are inline assembly, of one element a thread, in the order of the text.

Functions are elementwise, so that kernels in Triton and in Gluon call them. Addresses are int32 [THREADS], in bytes.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _meeting(threads):
    """Return the instruction that has so many threads wait for one another, at a barrier of a number."""
    return f"mov.b32 $0, 0; bar.sync $1, {threads};"


@triton.jit
def reserved():
    """Return the address of a kernel's only allocation, int32; what Triton reserves begins at this symbol."""
    return tl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def copy(to, ptr, mask):
    """Begin to copy 16 bytes a thread to shared memory where the mask is true."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; mov.b32 $0, 0; @p cp.async.cg.shared.global [$1], [$2], 16; }",
        "=&r,r,l,r",
        [to, ptr.to(tl.int64), mask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def wait_for_copies(tid):
    """Wait until all that a warp's lanes have copied themselves is there."""
    tl.inline_asm_elementwise(
        "mov.b32 $0, $1; cp.async.wait_all; bar.warp.sync 0xffffffff;",
        "=r,r",
        [tid],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def meet(number, THREADS: tl.constexpr):
    """Have threads of the same barrier wait for one another: THREADS of them, number int32 [.] from 1 to 15."""
    MEETING: tl.constexpr = _meeting(THREADS)
    tl.inline_asm_elementwise(MEETING, "=&r,r", [number], tl.int32, False, 1)


@triton.jit
def leave(done):
    """End warps where it is true, in all lanes or in none, once their copies are there."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $1, 0; mov.b32 $0, 0; @p cp.async.wait_all; @p exit; }",
        "=&r,r",
        [done.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def read_four(address):
    """Read 16 bytes a thread; four int32 [THREADS]."""
    return tl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,r",
        [address],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def read_two(address):
    """Read 8 bytes a thread; two int32 [THREADS]."""
    return tl.inline_asm_elementwise(
        "ld.shared.v2.b32 {$0, $1}, [$2];", "=r,=r,r", [address], dtype=(tl.int32, tl.int32), is_pure=False, pack=1
    )


@triton.jit
def read_one(address):
    """Read four bytes a thread, int32 [THREADS]."""
    return tl.inline_asm_elementwise("ld.shared.b32 $0, [$1];", "=r,r", [address], tl.int32, False, 1)


@triton.jit
def write_one(address, value):
    """Write a float32 a thread."""
    tl.inline_asm_elementwise("mov.b32 $0, 0; st.shared.b32 [$1], $2;", "=&r,r,f", [address, value], tl.int32, False, 1)


@triton.jit
def read_pair(address, DTYPE: tl.constexpr):
    """Read two numbers of DTYPE that stand side by side; two float32 [THREADS]."""
    if DTYPE.primitive_bitwidth == 32:
        first = read_one(address).to(tl.float32, bitcast=True)
        second = read_one(address + 4).to(tl.float32, bitcast=True)
    else:
        both = read_one(address)
        first = both.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        second = (both >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return first, second
