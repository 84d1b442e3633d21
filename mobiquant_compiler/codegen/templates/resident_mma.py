"""Two to eight tokens in shared memory times sliced weights: programs go from tile to tile of rows (sm_90)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from mobiquant_compiler.codegen import copy_engine, device, fragments, parts, resident_tiles, rings, shared_memory


@gluon.jit
def counts_between(found, tokens, NUM_SLICES: gl.constexpr, NUM_WARPS: gl.constexpr):
    """Return the largest and the least of up to eight tokens' counts; every warp finds them itself."""
    offs = gl.arange(0, 8, gl.BlockedLayout([1], [32], [NUM_WARPS], [0]))
    counts = gl.minimum(gl.maximum(found, 1), NUM_SLICES)
    return gl.max(counts, axis=0), gl.min(gl.where(offs < tokens, counts, NUM_SLICES), axis=0)


@gluon.jit
def of_each(p0, p1, p2, p3, PARTS: gl.constexpr):
    """Return the arguments of the launch's weights as a tuple."""
    found = (p0,)
    if PARTS > 1:
        found = found + (p1,)
    if PARTS > 2:
        found = found + (p2,)
    if PARTS > 3:
        found = found + (p3,)
    return found


@gluon.jit
def multiply_by_count(
    acts,
    weights,
    given,
    places,
    least,
    WIDTHS: gl.constexpr,
    NUM_SLICES: gl.constexpr,
    GROUP: gl.constexpr,
    LAYOUT: gl.constexpr,
    K_PADDED: gl.constexpr,
    ACTIVATION: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """Take the body for the largest count of the tokens.

    Most threads end in it, where no tile is left (`shared_memory.leave`); the others right behind it. Nothing stands
    behind a body: what tells bodies apart would be kept in local memory, whose first read comes from far away
    (`sliced_mma`).

    given: as `resident_tiles.multiply_tiles` has it; places: addresses of shared memory and of barriers.
    """
    most = given[2]
    for count in gl.static_range(1, NUM_SLICES + 1):
        # Tokens of one count get a body that multiplies once and tells nothing apart.
        for alike in gl.static_range(1 if count == 1 else 0, 2):
            if (most == count) & ((count == 1) | ((least == most) == (alike == 1))):
                resident_tiles.multiply_tiles(
                    acts,
                    weights,
                    given,
                    places[0],
                    places[1],
                    count,
                    alike == 1,
                    WIDTHS,
                    GROUP,
                    LAYOUT,
                    K_PADDED,
                    ACTIVATION,
                    HAS_BIAS,
                )
                fragments.end_program(most)


@gluon.jit(
    do_not_specialize=("counts_ptr", "bias_ptr", "bias1_ptr", "bias2_ptr", "bias3_ptr", "tokens")
    + ("n_rows", "n1_rows", "n2_rows", "n3_rows")
)
def resident_mma(
    slices_desc,
    slices1_desc,
    slices2_desc,
    slices3_desc,
    high_ptr,
    low_ptr,
    affine_ptr,
    counts_ptr,
    slices_ptr,
    slices1_ptr,
    slices2_ptr,
    slices3_ptr,
    scale_ptr,
    scale1_ptr,
    scale2_ptr,
    scale3_ptr,
    zero_ptr,
    zero1_ptr,
    zero2_ptr,
    zero3_ptr,
    bias_ptr,
    bias1_ptr,
    bias2_ptr,
    bias3_ptr,
    y_ptr,
    y1_ptr,
    y2_ptr,
    y3_ptr,
    tokens,
    n_rows,
    n1_rows,
    n2_rows,
    n3_rows,
    WIDTHS: gl.constexpr,
    NUM_SLICES: gl.constexpr,
    GROUP: gl.constexpr,
    LAYOUT: gl.constexpr,
    K_PADDED: gl.constexpr,
    ACTIVATION: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    PARTS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    NUM_WARPS: gl.constexpr,
    PREFETCH: gl.constexpr,
):
    """Multiply up to eight tokens by one to four weights, of as many slices as each token's count says.

    A program goes from tile to tile of 16 rows with two teams of eight warps, which share the activations; it reads
    slices up to the largest count. Counts are read on the device.

    Shapes: as `sliced_mma`, and descriptors of slices int32 [NUM_SLICES N_i, K_PADDED / 16], whose places among the
        kernel's parameters `copy_engine.descriptor` knows; Grid: (1, at most one program a tile): without a tile a
        program would end while its activations are under way.
    Numerics: the bits of `sliced_mma`.
    """
    gl.static_assert(WIDTHS == (2,) * NUM_SLICES and NUM_SLICES <= 4, "one to four slices of two bits")
    gl.static_assert(LAYOUT == "slice_major" and GROUP == 128, "groups of 128 columns, slices packed whole")
    gl.static_assert(ACTIVATION == "a16" or ACTIVATION == "a8", "activations have 16 or 8 bits")
    gl.static_assert(PARTS >= 1 and PARTS <= 4, "one launch serves 1 to 4 weights")
    gl.static_assert(BLOCK_M == 8 and BLOCK_N == 16, "a tile has eight tokens and 16 rows")
    gl.static_assert(NUM_WARPS == 16, "each of eight warps of two teams has a chain")
    gl.static_assert(K_PADDED > 16 * GROUP, "a tile has two steps, as many as a ring may hold")
    gl.static_assert(K_PADDED % (2 * GROUP) == 0, "groups come in pairs")
    rows = of_each(p0=n_rows, p1=n1_rows, p2=n2_rows, p3=n3_rows, PARTS=PARTS)
    slices_ptrs = of_each(p0=slices_ptr, p1=slices1_ptr, p2=slices2_ptr, p3=slices3_ptr, PARTS=PARTS)
    scale_ptrs = of_each(p0=scale_ptr, p1=scale1_ptr, p2=scale2_ptr, p3=scale3_ptr, PARTS=PARTS)
    zero_ptrs = of_each(p0=zero_ptr, p1=zero1_ptr, p2=zero2_ptr, p3=zero3_ptr, PARTS=PARTS)
    y_ptrs = of_each(p0=y_ptr, p1=y1_ptr, p2=y2_ptr, p3=y3_ptr, PARTS=PARTS)
    bias_ptrs = y_ptrs
    if HAS_BIAS:
        bias_ptrs = of_each(p0=bias_ptr, p1=bias1_ptr, p2=bias2_ptr, p3=bias3_ptr, PARTS=PARTS)
    # Read by place only (`copy_engine.descriptor`); named here, they stay parameters.
    descs = of_each(p0=slices_desc, p1=slices1_desc, p2=slices2_desc, p3=slices3_desc, PARTS=PARTS)
    tid = gl.arange(0, 32 * NUM_WARPS, gl.BlockedLayout([1], [32], [NUM_WARPS], [0]))
    tid = fragments.by_warps(tid, NUM_WARPS)
    # Have the base slice come near while the kernel before ends; only then read its work.
    for number in gl.static_range(len(descs)):
        copy_engine.fetch_descriptor(copy_engine.descriptor(tid, rings.KERNEL, number))
    if PREFETCH > 0:
        part, own = parts.which_part(2 * gl.program_id(1), rows, BLOCK_N)
        first, rows_here = parts.of_part(part, slices_ptrs), parts.of_part(part, rows)
        device.prefetch_base(
            first, own * BLOCK_N, tid, rows_here, WIDTHS, LAYOUT, K_PADDED, 2 * BLOCK_N, PREFETCH, False
        )
    GROUPS: gl.constexpr = K_PADDED // GROUP
    SIZE: gl.constexpr = scale_ptr.dtype.element_ty.primitive_bitwidth // 8
    HALVES: gl.constexpr = 2 if ACTIVATION == "a16" else 1
    BYTES: gl.constexpr = rings.laid_out("total_bytes", GROUPS, SIZE, HALVES, NUM_SLICES)
    memory = gl.allocate_shared_memory(gl.int32, [BYTES // 128, 32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # Triton sees this being written, and reserves it all until it is let go.
    mark = gl.arange(0, 32, gl.BlockedLayout([1], [32], [NUM_WARPS], [0]))
    memory.index(BYTES // 128 - 1).store(mark)
    base = shared_memory.reserved()
    ready = base + rings.laid_out("barriers_at", GROUPS, SIZE, HALVES, NUM_SLICES)
    resident_tiles.begin_barriers(ready, tid, rings.laid_out("places", GROUPS, SIZE, HALVES), GROUPS)
    gdc_wait()
    # Counts are under way while the first copies are begun.
    offs = gl.arange(0, 8, gl.BlockedLayout([1], [32], [NUM_WARPS], [0]))
    counts = gl.load(counts_ptr + offs, mask=offs < tokens, other=1)
    acts, weights = (high_ptr, low_ptr, affine_ptr), (scale_ptrs, zero_ptrs, y_ptrs, bias_ptrs, rows)
    resident_tiles.ask_first(acts, weights, base, ready, tid, NUM_SLICES, GROUPS, HALVES)
    most, least = counts_between(found=counts, tokens=tokens, NUM_SLICES=NUM_SLICES, NUM_WARPS=NUM_WARPS)
    multiply_by_count(
        acts=acts,
        weights=weights,
        given=(counts_ptr, tid, most, tokens),
        places=(base, ready),
        least=least,
        WIDTHS=WIDTHS,
        NUM_SLICES=NUM_SLICES,
        GROUP=GROUP,
        LAYOUT=LAYOUT,
        K_PADDED=K_PADDED,
        ACTIVATION=ACTIVATION,
        HAS_BIAS=HAS_BIAS,
    )
    memory._keep_alive()
