"""What one warp does together: vector loads, exchanges between lanes, integer tensor-core products, ordered sums.

Kernels that use this are written for threads: a tensor ``[THREADS]`` holds one register of every thread, element i that
of thread i. `THREADS` equals 32 times the number of warps, so no element is held twice and none is missing. Inline
assembly then sees the registers of a whole warp, as the matrix instructions want them. EMULATE spells the same out in
tensors for Triton's interpreter, which runs no assembly.

Fragments follow PTX's ``mma.m16n8k32``: lane ``4 g + t`` holds row (or column) g and four bytes of the products' depth.
"""

import triton
import triton.language as tl


@triton.jit
def _load_vector(ptr, COUNT: tl.constexpr, INSTRUCTION: tl.constexpr, EMULATE: tl.constexpr):
    """Load COUNT (1, 2 or 4) consecutive words a thread by one instruction.

    Never by Triton's own load: a compiler pass of it takes time that grows with the square of their number.
    """
    if EMULATE:
        words = ()
        for j in tl.static_range(COUNT):
            words = words + (tl.load(ptr + j).to(tl.int32, bitcast=True),)
    elif COUNT == 4:
        words = tl.inline_asm_elementwise(
            INSTRUCTION + ".v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l",
            [ptr.to(tl.int64)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    elif COUNT == 2:
        words = tl.inline_asm_elementwise(
            INSTRUCTION + ".v2.b32 {$0, $1}, [$2];",
            "=r,=r,l",
            [ptr.to(tl.int64)],
            dtype=(tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    else:
        word = tl.inline_asm_elementwise(
            INSTRUCTION + ".b32 $0, [$1];", "=r,l", [ptr.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )
        words = (word,)
    return words


@triton.jit
def stream_words(ptr, COUNT: tl.constexpr, EMULATE: tl.constexpr):
    """Load COUNT (1, 2 or 4) consecutive words a thread that are read once, past the L1 cache.

    Only for memory that no kernel writes that may still be running.

    Shapes: ptr to int32 [THREADS], aligned to ``4 COUNT`` bytes, valid in every lane; returns a tuple of int32
        [THREADS].
    """
    return _load_vector(ptr, COUNT, "ld.global.nc.L1::no_allocate", EMULATE)


@triton.jit
def read_words(ptr, COUNT: tl.constexpr, EMULATE: tl.constexpr):
    """Load COUNT (1, 2 or 4) consecutive words a thread that other warps read too: by way of the L1 cache.

    Shapes: ptr aligned to ``4 COUNT`` bytes, valid in every lane; returns a tuple of int32 [THREADS].
    """
    return _load_vector(ptr, COUNT, "ld.global", EMULATE)


@triton.jit
def thread_again(tid, EMULATE: tl.constexpr):
    """Return the numbers of a program's threads, read anew: what is computed from them takes no register before."""
    if not EMULATE:
        tid = tl.inline_asm_elementwise("mov.u32 $0, %tid.x;", "=r,r", [tid], tl.int32, False, 1)
    return tid


@triton.jit
def by_warps(tid, WARPS: tl.constexpr):
    """Return the numbers of a program's threads, of WARPS warps, as sums of a warp's number and a lane's.

    Warps have their numbers from their first lanes: the compiler then knows that what depends on no lane is the same in
    all of them, and has it in uniform registers, where copies and barriers want it. Else it takes a register a lane,
    and is brought from there each time.
    """
    tl.static_assert(WARPS & (WARPS - 1) == 0, "warps are a power of two")
    warp = tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [tid // 32], dtype=tl.int32, is_pure=False, pack=1
    )
    return (warp & (WARPS - 1)) * 32 + tid % 32


@triton.jit
def end_program(uniform):
    """End the program for threads that come to this: they have nothing left, and the compiler knows it."""
    tl.inline_asm_elementwise("mov.b32 $0, $1; exit;", "=r,r", [uniform], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def begin_next(when):
    """Let the next kernel begin, as far as this program goes (sm_90), if `when` is true in any of its threads."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $1, 0; mov.b32 $0, 0; @p griddepcontrol.launch_dependents; }",
        "=r,r",
        [when.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def load_words(ptr, mask, COUNT: tl.constexpr, EMULATE: tl.constexpr):
    """Load COUNT (1, 2 or 4) consecutive words a thread, zeros where the mask is false.

    Shapes: ptr aligned to ``4 COUNT`` bytes, and mask [THREADS]; returns a tuple of int32 [THREADS].
    """
    if EMULATE:
        words = ()
        for j in tl.static_range(COUNT):
            word = tl.load(ptr + j, mask=mask, other=0)
            words = words + (word.to(tl.int32, bitcast=True),)
    elif COUNT == 4:
        words = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
            " @p ld.global.v4.b32 {$0, $1, $2, $3}, [$4]; }",
            "=&r,=&r,=&r,=&r,l,r",
            [ptr.to(tl.int64), mask.to(tl.int32)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    elif COUNT == 2:
        words = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; mov.b32 $0, 0; mov.b32 $1, 0; @p ld.global.v2.b32 {$0, $1}, [$2]; }",
            "=&r,=&r,l,r",
            [ptr.to(tl.int64), mask.to(tl.int32)],
            dtype=(tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    else:
        word = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.b32 $0, [$1]; }",
            "=&r,l,r",
            [ptr.to(tl.int64), mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        words = (word,)
    return words


@triton.jit
def load_half(ptr, mask, EMULATE: tl.constexpr):
    """Load 16 bits a thread, zeros where the mask is false.

    Shapes: ptr to anything of 16 bits, and mask [THREADS]; returns int16 [THREADS].
    """
    if EMULATE:
        bits = tl.load(ptr, mask=mask, other=0).to(tl.int16, bitcast=True)
    else:
        bits = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b16 $0, 0; @p ld.global.b16 $0, [$1]; }",
            "=&h,l,r",
            [ptr.to(tl.int64), mask.to(tl.int32)],
            dtype=tl.int16,
            is_pure=False,
            pack=1,
        )
    return bits


@triton.jit
def filled(tensor, VALUE: tl.constexpr):
    """Return a tensor of one value as another of integers is: kernels in Gluon cannot fill one without its layout."""
    return tensor * 0 + VALUE


@triton.jit
def select_bits(above, below, KEEP: tl.constexpr, EMULATE: tl.constexpr):
    """Return the bits of `below` where KEEP has ones, those of `above` elsewhere: one instruction."""
    if EMULATE:
        bits = (above & ~KEEP) | (below & KEEP)
    else:
        bits = tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xe4;",
            "=r,r,r,r",
            [below, above, filled(below, KEEP)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return bits


@triton.jit
def prefetch_line(ptr, mask, EMULATE: tl.constexpr):
    """Bring the 128 bytes around an address into the L2 cache; changes nothing that a later load could see."""
    if not EMULATE:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p prefetch.global.L2 [$1]; }",
            "=&r,l,r",
            [ptr.to(tl.int64), mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.constexpr_function
def _butterfly(distance):
    """Return the instruction that exchanges a register between lanes l and ``l ^ distance``."""
    return f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;"


@triton.jit
def from_lanes_away(value, DISTANCE: tl.constexpr, EMULATE: tl.constexpr):
    """Return the value of lane ``l ^ DISTANCE``, a power of two below 32; int32 or float32 [THREADS]."""
    bits = value.to(tl.int32, bitcast=True)
    if EMULATE:
        pairs = tl.reshape(bits, [value.shape[0] // (2 * DISTANCE), 2, DISTANCE])
        both = tl.sum(pairs, axis=1)
        other = tl.reshape(both[:, None, :] - pairs, value.shape)
    else:
        other = tl.inline_asm_elementwise(_butterfly(DISTANCE), "=r,r", [bits], dtype=tl.int32, is_pure=False, pack=1)
    return other.to(value.dtype, bitcast=True)


@triton.jit
def split_between_groups(words, upper, HALF: tl.constexpr, EMULATE: tl.constexpr):
    """Give every lane of a quad its share of two groups, where lanes 0, 1 hold the first and lanes 2, 3 the second.

    A matrix product sums over the four lanes of a quad, so one product must see one group only. Afterwards lanes 0, 2,
    1, 3 hold quarters 0, 1, 2, 3 of either group (`quarter_of_lane`).

    Shapes: words, a tuple of 2 HALF int32 [THREADS]; upper bool [THREADS], true in lanes 2 and 3; returns two tuples of
        HALF tensors.
    """
    first = ()
    second = ()
    for j in tl.static_range(HALF):
        got = from_lanes_away(tl.where(upper, words[j], words[HALF + j]), 2, EMULATE)
        first = first + (tl.where(upper, got, words[j]),)
        second = second + (tl.where(upper, words[HALF + j], got),)
    return first, second


@triton.jit
def quarter_of_lane(t):
    """Return which quarter of a group's columns lane t of a quad holds: 0, 2, 1, 3."""
    return (t & 1) * 2 + (t >> 1)


@triton.jit
def _bytes_of(words, SIGNED: tl.constexpr):
    """Return the bytes of words as numbers, int32 [W, R, 8] -> float32 [W, R, 32]; for the emulation."""
    W: tl.constexpr = words.shape[0]
    R: tl.constexpr = words.shape[1]
    found = words[:, :, :, None] >> (8 * tl.arange(0, 4))[None, None, None, :]
    if SIGNED:
        found = (found << 24) >> 24
    else:
        found = found & 255
    return tl.reshape(found.to(tl.float32), [W, R, 32])


@triton.jit
def _emulated_tile(codes, b0, b1):
    """Return what `multiply_tile` adds, in few operations of the interpreter: sums of bytes are exact in float32."""
    a0, a1, a2, a3 = codes
    W: tl.constexpr = a0.shape[0] // 32
    # Of a lane: row g or g + 8, near or far words. Columns of both operands are ordered by depth, lane of a quad, byte.
    rows = tl.reshape(tl.join(tl.join(a0, a2), tl.join(a1, a3)), [W, 8, 4, 2, 2])
    rows = tl.reshape(tl.permute(rows, (0, 4, 1, 3, 2)), [W, 16, 8])
    columns = tl.reshape(tl.permute(tl.reshape(tl.join(b0, b1), [W, 8, 4, 2]), (0, 1, 3, 2)), [W, 8, 8])
    product = tl.dot(_bytes_of(rows, False), tl.permute(_bytes_of(columns, True), (0, 2, 1)), input_precision="ieee")
    lanes = tl.permute(tl.reshape(product.to(tl.int32), [W, 2, 8, 4, 2]), (0, 2, 3, 4, 1))
    even, odd = tl.split(tl.permute(tl.reshape(lanes, [W * 32, 2, 2]), (0, 2, 1)))
    d0, d2 = tl.split(even)
    d1, d3 = tl.split(odd)
    return d0, d1, d2, d3


@triton.jit
def multiply_tile(codes, b0, b1, c0, c1, c2, c3, EMULATE: tl.constexpr):
    """Add to a 16 x 8 tile the exact product of 16 x 32 unsigned and 32 x 8 signed bytes (``mma.m16n8k32``).

    Shapes: int32 [THREADS] each. codes: rows g and g + 8, then the same 16 deeper; b: column g, two depths; c: row g,
        columns 2 t and 2 t + 1 (c0, c1), row g + 8 likewise (c2, c3); returns the new c.
    """
    if EMULATE:
        d0, d1, d2, d3 = _emulated_tile(codes, b0, b1)
        c0, c1, c2, c3 = c0 + d0, c1 + d1, c2 + d2, c3 + d3
    else:
        a0, a1, a2, a3 = codes
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9},"
            " {$10, $11, $12, $13};",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
            [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    return c0, c1, c2, c3


@triton.jit
def sum_neighbours(parts):
    """Sum the last dimension of float32 [M, W], W a power of two, neighbours first: ((0 + 1) + (2 + 3)) + ...

    One written order: a library reduction may choose its own by shape; here a token's bits must not depend on its tile.
    Parts that were summed over a whole branch of this tree before give the same bits.
    """
    M: tl.constexpr = parts.shape[0]
    W: tl.constexpr = parts.shape[1]
    if W == 1:
        total = tl.reshape(parts, [M])
    else:
        left, right = tl.split(tl.reshape(parts, [M, W // 2, 2]))
        total = sum_neighbours(left + right)
    return total
