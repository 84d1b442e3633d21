"""Two to eight tokens times tile after tile of 16 rows, whose words come ahead of the products in shared memory.

Copies (``cp.async``, sm_80) fill a warp's ring while it multiplies, so that it does not wait for memory with nothing to
do, and that takes no registers. A ring holds one step and is its warp's own: no warp waits for another before the sums
of a tile are added. It goes on from one tile to the next, whose first words are there when the last products of the one
before are. Scales and zero points of the next tile come meanwhile, all of them at once, copied by all warps.

Shared memory is kept small, since the L1 cache has what it leaves: activations come from there, for every tile again.
That is why copies go past that cache, and why there are rings only for columns whose activations it holds.

Names are those of `products`. A step is a pair of groups of 16 rows. weights are what each weight of the launch has:
slices, scales, zero points, outputs, biases (or outputs), rows. asked is what is asked for next: (block of rows, step,
side, pointers to a lane's words of row g and of row g + 8, words of a slice); tiles take sides in turn.
"""

import triton
import triton.language as tl

from mobiquant_compiler.codegen import chains, fragments, parts, products, steps, tiles


@triton.constexpr_function
def facts_bytes(groups, size):
    """Return how many bytes of shared memory a row's scales take: 16 more than there are, against bank conflicts."""
    return groups * size + 16


@triton.constexpr_function
def places(slices, groups, size):
    """Return where in a program's shared memory sums and scales begin, behind the rings, and where they end.

    There is room for the scales of two tiles, and for the sums of two where that is little in all.
    """
    rings, facts = 8 * 1024 * slices, 2 * 32 * facts_bytes(groups, size)
    sides = 2 if rings + facts + 8192 <= 46 * 1024 else 1
    return rings, rings + 4096 * sides, rings + 4096 * sides + facts


@triton.constexpr_function
def _declaration(size):
    """Return the instructions that reserve shared memory and give its address."""
    return f"{{ .shared .align 128 .b8 mobiquant_ring[{size}]; mov.u32 $0, mobiquant_ring; }}"


@triton.constexpr_function
def _meeting(threads):
    """Return the instruction that has a program's threads wait for one another."""
    return f"mov.b32 $0, $1; bar.sync 1, {threads};"


@triton.jit
def reserve(SLICES: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Return the address of a program's shared memory; each call reserves its own."""
    DECLARATION: tl.constexpr = _declaration(places(SLICES, GROUPS, SIZE)[2])
    return tl.inline_asm_elementwise(DECLARATION, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _run(INSTRUCTION: tl.constexpr, tid):
    """Run an instruction for what it does."""
    tl.inline_asm_elementwise(INSTRUCTION, "=r,r", [tid], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def copy(to, ptr, wanted, mask):
    """Begin to copy 16 bytes a thread to shared memory where the mask is true: zeros where they are not wanted."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $4, 0; mov.b32 $0, 0; @p cp.async.cg.shared.global [$1], [$2], 16, $3; }",
        "=&r,r,l,r,r",
        [to, ptr.to(tl.int64), tl.where(wanted, 16, 0), mask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def wait_for_copies(tid):
    """Wait until all that a warp's lanes have copied is there."""
    _run("mov.b32 $0, $1; cp.async.wait_all; bar.warp.sync 0xffffffff;", tid)


@triton.jit
def meet(tid):
    """Have all threads of a program wait for one another."""
    MEETING: tl.constexpr = _meeting(tid.shape[0])
    _run(MEETING, tid)


@triton.jit
def read_two(address):
    """Read 8 bytes a thread of shared memory; two int32 [THREADS]."""
    return tl.inline_asm_elementwise(
        "ld.shared.v2.b32 {$0, $1}, [$2];", "=r,=r,r", [address], dtype=(tl.int32, tl.int32), is_pure=False, pack=1
    )


@triton.jit
def read_one(address):
    """Read four bytes a thread of shared memory, int32 [THREADS]."""
    return tl.inline_asm_elementwise("ld.shared.b32 $0, [$1];", "=r,r", [address], tl.int32, False, 1)


@triton.jit
def write_one(address, value):
    """Write a float32 a thread to shared memory."""
    tl.inline_asm_elementwise("mov.b32 $0, 0; st.shared.b32 [$1], $2;", "=&r,r,f", [address, value], tl.int32, False, 1)


@triton.jit
def read_pair(address, DTYPE: tl.constexpr):
    """Read the scales (or zero points) of a pair of groups from shared memory; two float32 [THREADS]."""
    if DTYPE.primitive_bitwidth == 32:
        first = read_one(address).to(tl.float32, bitcast=True)
        second = read_one(address + 4).to(tl.float32, bitcast=True)
    else:
        both = read_one(address)
        first = both.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        second = (both >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return first, second


@triton.jit
def weight_of(block, weights):
    """Return slices, scales, zero points and rows of the weight that a block of rows is of, and its first row."""
    part, own = parts.which_part(block, weights[5], 16)
    slices_ptr, scale_ptr = parts.of_part(part, weights[0]), parts.of_part(part, weights[1])
    return (slices_ptr, scale_ptr, parts.of_part(part, weights[2])), parts.of_part(part, weights[5]), own * 16


@triton.jit
def begin_tile(ring, block, side, weights, tid, SLICES: tl.constexpr, GROUPS: tl.constexpr):
    """Ask for a tile's scales and zero points, those of even tiles on one side and those of odd ones on the other.

    Returns where a lane's words of its first step are, of row g and of row g + 8, and how many words a slice has.
    """
    weight, n_rows, first_row = weight_of(block, weights)
    SIZE: tl.constexpr = weight[1].dtype.element_ty.primitive_bitwidth // 8
    EACH: tl.constexpr = GROUPS * SIZE // 16  # copies a row
    tl.static_assert(GROUPS * SIZE % 16 == 0 and tid.shape[0] >= 32 * EACH, "a thread copies 16 bytes of a row")
    FACTS: tl.constexpr = places(SLICES, GROUPS, SIZE)[1]
    # Rows 0 to 15 are scales, the others zero points.
    row = tid // EACH % 32
    at = tl.minimum(first_row + row % 16, n_rows - 1) * GROUPS + tid % EACH * (16 // SIZE)
    to = ring + FACTS + (side * 32 + row) * facts_bytes(GROUPS, SIZE) + tid % EACH * 16
    copy(
        to,
        tl.where(row < 16, weight[1], weight[2]) + at,
        tid * 0 + block < parts.blocks_of(weights[5], 16),
        tid < 32 * EACH,
    )
    lane, chain = tid % 32, tid // 32
    row = first_row + lane // 4
    word = chain * 16 + lane % 4 * 4
    upper = weight[0] + (tl.minimum(row, n_rows - 1).to(tl.int64) * (GROUPS * 8) + word)
    lower = weight[0] + (tl.minimum(row + 8, n_rows - 1).to(tl.int64) * (GROUPS * 8) + word)
    return upper, lower, tl.cast(n_rows, tl.int64) * (GROUPS * 8)


@triton.jit
def ask(ring, asked, weights, tid, COUNT: tl.constexpr, SLICES: tl.constexpr, GROUPS: tl.constexpr):
    """Ask for the words of a step, of COUNT slices; behind the last tile nothing comes.

    A row's words of the first group stand before those of the second, or, in every other pair of rows, behind them:
    lanes that read one group then meet no bank twice.
    """
    block, step, _, upper, lower, words = asked
    lane = tid % 32
    here = tid * 0 + block < parts.blocks_of(weights[5], 16)
    if GROUPS % 16 != 0:
        # A chain may end before others do; of an even number of groups a pair is there or is not.
        here = here & (step * 8 + tid // 32 < GROUPS // 2)
    to = ring + tid // 32 * (1024 * SLICES) + lane // 4 * 64 + (lane % 4 ^ lane // 8 % 2 * 2) * 16
    for half in tl.static_range(2):
        source = upper if half == 0 else lower
        for index in tl.static_range(COUNT):
            copy(to + (half * SLICES + index) * 512, source + index * words, here, lane >= 0)


@triton.jit
def ask_after(ring, asked, weights, tid, SLICES: tl.constexpr, GROUPS: tl.constexpr):
    """Return what to ask for behind a step: the next of the same tile, or the first of the program's next."""
    block, step, side, upper, lower, words = asked
    step += 1
    upper += 128
    lower += 128
    if step == (GROUPS + 15) // 16:
        step = step * 0
        side = 1 - side
        block += tl.num_programs(1)
        upper, lower, words = begin_tile(ring, block, side, weights, tid, SLICES, GROUPS)
    return block, step, side, upper, lower, words


@triton.jit
def take(ring, side, step, tid, DTYPE: tl.constexpr, COUNT: tl.constexpr, SLICES: tl.constexpr, GROUPS: tl.constexpr):
    """Read a step, once it is there: words as `device.split_words` returns them, and scales as `load_chunk` does."""
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    ROW: tl.constexpr = facts_bytes(GROUPS, SIZE)
    FACTS: tl.constexpr = places(SLICES, GROUPS, SIZE)[1]
    lane = tid % 32
    wait_for_copies(tid)
    words = ()
    grids = ()
    swapped = lane // 8 % 2 * 32
    at = ring + tid // 32 * (1024 * SLICES) + lane // 4 * 64 + fragments.quarter_of_lane(lane % 4) * 8
    for half in tl.static_range(2):
        for index in tl.static_range(COUNT):
            row = at + (half * SLICES + index) * 512
            words = words + ((read_two(row + swapped), read_two(row + (32 - swapped))),)
    pair = step * 8 + tid // 32
    here = pair < GROUPS // 2
    if GROUPS % 16 != 0:
        pair = tl.minimum(pair, GROUPS // 2 - 1)
    for half in tl.static_range(2):
        fact = ring + FACTS + (side * 32 + lane // 4 + 8 * half) * ROW + pair * (2 * SIZE)
        grid = read_pair(fact, DTYPE) + read_pair(fact + 16 * ROW, DTYPE)
        if GROUPS % 16 != 0:
            # A group that is not there adds nothing.
            grid = (tl.where(here, grid[0], 0.0), tl.where(here, grid[1], 0.0), grid[2], grid[3])
        grids = grids + (grid,)
    fragments.hold_loads(tid)  # now the words may be written over
    return words, grids


@triton.jit
def add_chains(sums, room, tid, SIDES: tl.constexpr):
    """Return the sums of all chains, float32 [THREADS]: of a lane's four that of number ``warp % 4``.

    Chains are added as `fragments.sum_neighbours` does. room: memory of which the next tile writes another side, if
    there are two SIDES.
    """
    if SIDES == 1:
        meet(tid)
    for number in tl.static_range(4):
        write_one(room + (tid // 32 * 128 + number * 32 + tid % 32) * 4, sums[number])
    meet(tid)
    found = ()
    for warp in tl.static_range(8):
        found = found + (read_one(room + (warp * 128 + tid % 128) * 4).to(tl.float32, bitcast=True),)
    left = (found[0] + found[1]) + (found[2] + found[3])
    return left + ((found[4] + found[5]) + (found[6] + found[7]))


@triton.jit
def store_tile(total, place, tid, HAS_BIAS: tl.constexpr):
    """Add the bias and write a tile of eight tokens by 16 rows, given what `add_chains` returns."""
    y_ptr, bias_ptr, first_row, tokens, n_rows = place
    number, lane = tid // 32 % 4, tid % 32
    row = first_row + lane // 4 + number // 2 * 8
    token = lane % 4 * 2 + number % 2
    if HAS_BIAS:
        total += tl.load(bias_ptr + row, mask=row < n_rows, other=0.0).to(tl.float32)
    at = token.to(tl.int64) * n_rows + row
    mine = (row < n_rows) & (token < tokens) & (tid < 128)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=mine)


@triton.jit
def first_group(step, tid):
    """Return the first of a warp's two groups of a step."""
    return step * 16 + tid // 32 * 2


@triton.jit
def load_group(acts, group, tid, GROUPS: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr):
    """Load what there is of eight tokens and a group."""
    return products.load_all(acts, products.existing(group, GROUPS), tid % 32, GROUP, ACTIVATION, False)


@triton.jit
def multiply_tiles(
    acts,
    weights,
    given,
    ring,
    COUNT: tl.constexpr,
    ALIKE: tl.constexpr,
    WIDTHS: tl.constexpr,
    GROUP: tl.constexpr,
    LAYOUT: tl.constexpr,
    K_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Multiply up to eight tokens by every tile of 16 rows that is the program's, and write the results.

    Tiles of a program are as far apart as there are programs. Each of eight warps has a chain (`chains`).

    Args: acts are the pointers (high, low, affine); given is (pointer to counts, thread numbers, the largest count,
        tokens).
    """
    counts_ptr, tid, most, tokens = given
    tl.static_assert(tid.shape[0] == 256, "each of eight warps has a chain")
    tl.static_assert(K_PADDED > 16 * GROUP, "a tile has two steps: scales of the next have come before its last")
    SLICES: tl.constexpr = len(WIDTHS)
    GROUPS: tl.constexpr = K_PADDED // GROUP
    STEPS: tl.constexpr = (GROUPS + 15) // 16
    DTYPE: tl.constexpr = weights[1][0].dtype.element_ty
    # Of up to so many slices there are registers for the activations of the group behind the one that is multiplied.
    AHEAD: tl.constexpr = 2
    SUMS: tl.constexpr = places(SLICES, GROUPS, DTYPE.primitive_bitwidth // 8)[0]
    SIDES: tl.constexpr = (places(SLICES, GROUPS, DTYPE.primitive_bitwidth // 8)[1] - SUMS) // 4096
    shrinks = ()
    if not ALIKE:
        shrinks = tiles.shrinks_of(counts_ptr, 0, tid % 4, tokens, 1, WIDTHS, False)
    block = tl.program_id(1)
    side = block * 0
    upper, lower, each = begin_tile(ring, block, side, weights, tid, SLICES, GROUPS)
    asked = (block, side, side, upper, lower, each)
    ask(ring, asked, weights, tid, COUNT, SLICES, GROUPS)
    asked = ask_after(ring, asked, weights, tid, SLICES, GROUPS)
    ahead = load_group(acts, first_group(0, tid), tid, GROUPS, GROUP, ACTIVATION)
    wait_for_copies(tid)
    meet(tid)  # the first tile's scales are others' copies; those of later ones were waited for when sums were added
    for block in tl.range(tl.program_id(1), parts.blocks_of(weights[5], 16), tl.num_programs(1)):
        sums = chains.zeros_for(tid, 4)
        for step in tl.range(0, STEPS):
            words, grids = take(ring, side, step, tid, DTYPE, COUNT, SLICES, GROUPS)
            ask(ring, asked, weights, tid, COUNT, SLICES, GROUPS)
            asked = ask_after(ring, asked, weights, tid, SLICES, GROUPS)
            for which in tl.static_range(2):
                now = ahead
                if COUNT <= AHEAD:
                    group = first_group(step, tid) + 1 if which == 0 else first_group((step + 1) % STEPS, tid)
                    ahead = load_group(acts, group, tid, GROUPS, GROUP, ACTIVATION)
                else:
                    now = load_group(acts, first_group(step, tid) + which, tid, GROUPS, GROUP, ACTIVATION)
                sums = steps.add_group(
                    sums,
                    acts,
                    (words,),
                    (grids,),
                    (0,),
                    tid % 32,
                    (now,),
                    shrinks,
                    most,
                    COUNT,
                    True,
                    ALIKE,
                    which,
                    WIDTHS,
                    LAYOUT,
                    GROUP,
                    ACTIVATION,
                    False,
                )
        part, own = parts.which_part(block, weights[5], 16)
        y_ptr, bias_ptr = parts.of_part(part, weights[3]), parts.of_part(part, weights[4])
        place = (y_ptr, bias_ptr, own * 16, tokens, parts.of_part(part, weights[5]))
        store_tile(add_chains(sums, ring + SUMS + side % SIDES * 4096, tid, SIDES), place, tid, HAS_BIAS)
        side = 1 - side
