"""Copies that one thread begins and the copy engine does (sm_90), and barriers that count their bytes.

As `shared_memory`, in inline assembly of one element a thread, elementwise, in the order of the text; addresses are
int32 [THREADS] in bytes. An instruction is for the threads where `mine` is true. Without copies that a warp's lanes
make themselves no load waits in line behind others that come from further away.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _where_described(kernel, number):
    """Return the instructions for `descriptor`; each is five parameters: itself, two sizes and two strides."""
    return f"{{ .reg .b64 a; mov.b64 a, {kernel}_param_{5 * number}; cvta.param.u64 $0, a; }}"


@triton.constexpr_function
def _bulk(size):
    """Return the instruction that copies `size` bytes."""
    copying = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    return f"{{ .reg .pred p; setp.ne.b32 p, $4, 0; mov.b32 $0, 0; @p {copying} [$1], [$2], {size}, [$3]; }}"


@triton.jit
def descriptor(tid, KERNEL: tl.constexpr, NUMBER: tl.constexpr):
    """Return the address of a kernel's NUMBER-th descriptor, int64 [THREADS]; they are its first parameters.

    Gluon's own copies are begun by one thread of a program, which would have to wait for all warps.
    """
    WHERE: tl.constexpr = _where_described(KERNEL, NUMBER)
    return tl.inline_asm_elementwise(WHERE, "=l,r", [tid], tl.int64, True, 1)


@triton.jit
def fetch_descriptor(where):
    """Have the copy engine read a descriptor before the first copy wants it."""
    tl.inline_asm_elementwise("mov.b32 $0, 0; prefetch.tensormap [$1];", "=r,l", [where], tl.int32, False, 1)


@triton.jit
def begin_barrier(barrier, mine):
    """Begin a barrier whose phases end when one thread has arrived, and with it all bytes that it announced."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p mbarrier.init.shared::cta.b64 [$1], 1; }",
        "=&r,r,r",
        [barrier, mine.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def barriers_are_begun(tid):
    """Have barriers that were begun seen by the copy engine."""
    tl.inline_asm_elementwise(
        "mov.b32 $0, $1; fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;",
        "=r,r",
        [tid],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def announce(barrier, size, mine):
    """Arrive at a barrier, which then waits for so many bytes; copies may have been begun before."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; mov.b32 $0, 0;"
        " @p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2; }",
        "=&r,r,r,r",
        [barrier, size, mine.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def copy_run(to, ptr, barrier, SIZE: tl.constexpr, mine):
    """Begin to copy SIZE bytes, a multiple of 16, that follow one another."""
    COPYING: tl.constexpr = _bulk(SIZE)
    operands = [to, ptr.to(tl.int64), barrier, mine.to(tl.int32)]
    tl.inline_asm_elementwise(COPYING, "=&r,r,l,r,r", operands, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def copy_box(to, where, column, row, barrier, mine):
    """Begin to copy the box of a described tensor that begins at (row, column)."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $6, 0; mov.b32 $0, 0; @p cp.async.bulk.tensor.2d.shared::cluster.global.tile"
        ".mbarrier::complete_tx::bytes [$1], [$2, {$3, $4}], [$5]; }",
        "=&r,r,l,r,r,r,r",
        [to, where, column, row, barrier, mine.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def wait_for(barrier, parity):
    """Wait until the last phase of this parity (0 or 1) is over."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; mov.b32 $0, 0; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2; @!p bra AGAIN; }",
        "=&r,r,r",
        [barrier, parity],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def give_back(tid):
    """Have all that a warp's lanes read be read before the copy engine, which waits for no load, writes over it."""
    tl.inline_asm_elementwise(
        "mov.b32 $0, $1; fence.proxy.async.shared::cta; bar.warp.sync 0xffffffff;",
        "=r,r",
        [tid],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
