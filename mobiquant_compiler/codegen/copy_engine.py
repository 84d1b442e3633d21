"""Copies that one thread begins and the copy engine does (sm_90), and barriers that count their bytes.

As `shared_memory`, in inline assembly of one element a thread, elementwise, in the order of the text; addresses are
int32 [THREADS] in bytes. Without copies that a warp's lanes make themselves no load waits in line behind others that
come from further away.

One thread of a warp announces bytes at a barrier and begins copies, inside one branch, for which it is elected: ptxas
knows then that there is one, and puts no loop over threads around each copy.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _where_described(kernel, number):
    """Return the instructions for `descriptor`; each is five parameters: itself, two sizes and two strides."""
    return f"{{ .reg .b64 a; mov.b64 a, {kernel}_param_{5 * number}; cvta.param.u64 $0, a; }}"


@triton.constexpr_function
def _beginning(count):
    """Return the instructions for `begin_barrier`."""
    return f"{{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p mbarrier.init.shared::cta.b64 [$1], {count}; }}"


@triton.constexpr_function
def _boxes(first, count, apart):
    """Return the instructions for `copy_boxes`."""
    copying = "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
    start = f" mad.lo.s32 r, $5, {first}, $4; add.s32 a, $1, {first * apart};"
    each = f" {copying} [a], [$2, {{$3, r}}], [$6]; add.s32 a, a, {apart}; add.s32 r, r, $5;"
    return (
        "{ .reg .pred p; .reg .b32 a, r; mov.b32 $0, 0; elect.sync _|p, 0xffffffff; @!p bra DONE;"
        " mbarrier.arrive.expect_tx.shared::cta.b64 _, [$6], $7; setp.ne.b32 p, $7, 0; @!p bra DONE;"
        f"{start}{each * (count - first)} DONE: }}"
    )


@triton.constexpr_function
def _copying_step(apart, least, last, halves, passing):
    """Return the instructions for `copy_step` or, passing, for `pass_on`.

    Of each group come 1024 bytes of a half, and 64 of steps and shifts.
    """
    copying = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    only = " setp.ne.b32 p, $8, 0; @!p bra DONE;"
    elected = " elect.sync _|p, 0xffffffff; @!p bra DONE;"
    # All that lanes have read is behind them; the last warp has it so for all others, and for the copy engine.
    arriving = (
        " bar.warp.sync 0xffffffff; elect.sync _|p, 0xffffffff; @!p bra DONE;"
        " mbarrier.arrive.shared::cta.b64 s, [$9], $10; mbarrier.pending_count.b64 n, s; setp.eq.b32 p, n, $10;"
        " @!p bra DONE;"
    )
    fences = " fence.acq_rel.cta; fence.proxy.async.shared::cta;"
    low = f" add.s32 a, $1, {apart}; mul.wide.s32 s, $7, 16384; add.s64 s, s, $5; {copying} [a], [s], n, [$3];"
    return (
        "{ .reg .pred p; .reg .b32 n, a; .reg .b64 s; mov.b32 $0, 0;"
        f"{arriving + only + fences if passing else only + elected}"
        f" setp.eq.b32 p, $7, {last}; selp.b32 n, {least}, 16, p;"
        f" mul.lo.s32 a, n, {1024 * halves + 64}; mbarrier.arrive.expect_tx.shared::cta.b64 _, [$3], a;"
        f" mul.lo.s32 a, n, 64; mul.wide.s32 s, $7, 1024; add.s64 s, s, $6; {copying} [$2], [s], a, [$3];"
        f" mul.lo.s32 n, n, 1024; mul.wide.s32 s, $7, 16384; add.s64 s, s, $4; {copying} [$1], [s], n, [$3];"
        f"{low if halves == 2 else ''} DONE: }}"
    )


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
def begin_barrier(barrier, mine, COUNT: tl.constexpr = 1):
    """Begin a barrier whose phases end when COUNT threads have arrived, and with them all bytes that they announced."""
    BEGINNING: tl.constexpr = _beginning(COUNT)
    tl.inline_asm_elementwise(BEGINNING, "=&r,r,r", [barrier, mine.to(tl.int32)], tl.int32, False, 1)


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
def copy_box(to, where, column, row, barrier, mine):
    """Begin to copy the box of a described tensor that begins at (row, column), in warps where `mine` is true."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; mov.b32 $0, 0; setp.ne.b32 p, $6, 0; @!p bra DONE; elect.sync _|p, 0xffffffff; @!p bra DONE;"
        " cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [$1], [$2, {$3, $4}], [$5];"
        " DONE: }",
        "=&r,r,l,r,r,r,r",
        [to, where, column, row, barrier, mine.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def copy_boxes(
    to, where, column, row, rows, barrier, size, FIRST: tl.constexpr, COUNT: tl.constexpr, APART: tl.constexpr
):
    """Announce `size` bytes at a barrier and, unless that is none, begin to copy boxes FIRST to COUNT - 1.

    Boxes are `rows` rows apart in memory, and come APART bytes apart. Copies may have been begun before.
    """
    COPYING: tl.constexpr = _boxes(FIRST, COUNT, APART)
    operands = [to, where, column, row, rows, barrier, size]
    tl.inline_asm_elementwise(COPYING, "=&r,r,l,r,r,r,r,r", operands, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def copy_step(
    to,
    to_facts,
    full,
    acts,
    step,
    mine,
    APART: tl.constexpr,
    LEAST: tl.constexpr,
    LAST: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Announce a step of activations, and begin to copy it.

    Args:
        to: Where high halves come; low ones APART bytes behind.
        to_facts: Where steps and shifts come.
        full: The barrier that waits for them.
        acts: Pointers (high, low, affine).
        step: Which one; step LAST has LEAST groups, all others 16.
        mine: In which warp.
    """
    COPYING: tl.constexpr = _copying_step(APART, LEAST, LAST, HALVES, False)
    operands = [to, to_facts, full, acts[0].to(tl.int64), acts[1].to(tl.int64), acts[2].to(tl.int64), step]
    operands = operands + [mine.to(tl.int32)]
    tl.inline_asm_elementwise(COPYING, "=&r,r,r,r,l,l,l,r,r", operands, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def pass_on(
    taken,
    times,
    to,
    to_facts,
    full,
    acts,
    step,
    more,
    APART: tl.constexpr,
    LEAST: tl.constexpr,
    LAST: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Arrive at a barrier, one thread a warp; who is the last does what `copy_step` says, if there are more steps.

    Args:
        taken: The barrier.
        times: As how many warps a warp arrives.
        more: Whether a step is left; for the others see `copy_step`.
    """
    PASSING: tl.constexpr = _copying_step(APART, LEAST, LAST, HALVES, True)
    operands = [to, to_facts, full, acts[0].to(tl.int64), acts[1].to(tl.int64), acts[2].to(tl.int64), step]
    operands = operands + [more.to(tl.int32), taken, times]
    tl.inline_asm_elementwise(PASSING, "=&r,r,r,r,l,l,l,r,r,r,r", operands, dtype=tl.int32, is_pure=False, pack=1)


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
