"""Many tokens by way of a workspace: slices dequantized once, then a library's GEMM, and no word from the device.

Everything here can be captured into a CUDA graph: sizes follow from shapes, what depends on data is read by kernels.

Numerics: this is not the integer path. Weights are rounded to the dtype of the activations (bfloat16: a relative error
of up to 2e-3 each), and sums are those of the library, whose order may depend on the number of tokens. Results differ
from `reference.routed_linear` by about a thousandth of their size, and may differ from batch to batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from mobiquant_compiler.runtime.launch import LaunchableKernel, Weight, capability, ceil_div
from mobiquant_compiler.spec import MAX_BITS, Family

# Layers use the same memory in turn, but it stays reserved, again for each pool of captured graphs. With 16 bits and
# four counts, the largest layer of an 8B model fits in one piece and that of a 70B model in two, large GEMMs both.
WORKSPACE_BYTES = 1 << 30
CHUNK_ROWS = 256  # chunks are whole tiles of the library's GEMMs, of which the widest has 256 output rows
# torch._grouped_mm reads offsets on the device for these compute capabilities, and copies them to the host for others.
_GROUPED_MAJORS = (9, 10)


@dataclass(frozen=True, slots=True)
class SortedTokens:
    """Tokens brought together by slice count, for any number of linears that share their decision.

    Attributes:
        x: [T, K_padded], in the order of their counts; padding columns hold zero.
        places: int64 [T], where in `x` a token went.
        offsets: int32 [E + 1], on the device; tokens of count c are ``offsets[c - 1] : offsets[c]``.
    """

    x: Tensor
    places: Tensor
    offsets: Tensor


def supports(x: Tensor, n: int, k: int) -> str | None:
    """Return why `workspace_linears` cannot take these activations, None where it can (`uniform_linear` takes any).

    Args:
        x: [..., K]; only its dtype and device matter.
        n: Output rows of the weight.
        k: Input columns.
    """
    if not x.is_cuda or torch.version.hip is not None:
        return f"grouped GEMMs with offsets on the device need a CUDA device, activations are on {x.device}"
    if x.dtype is not torch.bfloat16:
        return f"torch._grouped_mm waits for the device unless activations are bfloat16; they are {x.dtype}"
    if not hasattr(torch, "_grouped_mm"):
        return f"torch {torch.__version__} has no _grouped_mm"
    major, minor = capability(x.device)
    if major not in _GROUPED_MAJORS:
        return f"torch._grouped_mm waits for the device on sm_{major}{minor}"
    if MAX_BITS * min(n, CHUNK_ROWS) * k * x.element_size() > WORKSPACE_BYTES:
        return f"{CHUNK_ROWS} rows of {k} columns, for up to {MAX_BITS} slice counts, are more than the workspace holds"
    return None


def chunk_rows(n: int, row_bytes: int) -> int:
    """Return how many output rows are dequantized at a time: chunks of equal size, whole tiles, within the limit.

    Args:
        n: Output rows of the weight.
        row_bytes: Workspace that one row takes, of all counts together.
    """
    most = max(CHUNK_ROWS, WORKSPACE_BYTES // row_bytes // CHUNK_ROWS * CHUNK_ROWS)
    return ceil_div(ceil_div(n, ceil_div(n, most)), CHUNK_ROWS) * CHUNK_ROWS


def dequantize(kernel: LaunchableKernel, weight: Weight, used: Tensor, workspace: Tensor, first_row: int = 0) -> None:
    """Write rows of a weight, from `first_row` on, for every slice count in use.

    Args:
        kernel: dequantize.
        weight: What to read; its bias does not matter.
        used: With ``sorted_rows`` the offsets of `SortedTokens`; without it int32 counts, of which the first is that of
            all tokens.
        workspace: [E, rows, K_padded] with ``sorted_rows``, else [rows, K_padded]; contiguous, aligned to 16 bytes.
            Weights of counts that are not in use are left as they are.
        first_row: First row of the weight to write.
    """
    spec, rows = kernel.spec, workspace.shape[-2]
    assert spec.family is Family.DEQUANTIZE, f"{spec.family} dequantizes nothing"
    kernel.launch(
        (ceil_div(rows * spec.k, spec.block_n * spec.block_w),),
        slices_ptr=weight.slices.contiguous(),
        scale_ptr=weight.scale.contiguous(),
        zero_ptr=weight.zero.contiguous(),
        offsets_ptr=used,
        counts_ptr=used,
        workspace_ptr=workspace,
        n_rows=weight.rows,
        first_row=first_row,
        rows=rows,
    )


def sort_tokens(x: Tensor, counts: Tensor, num_slices: int, padded: int) -> SortedTokens:
    """Bring tokens of equal slice count together, in their order, and pad their columns.

    Shapes: x [T, K]; counts int32, T of them in any shape; values outside 1..num_slices count as the nearest.
    """
    tokens, k = x.shape
    ordered, rows = torch.sort(counts.reshape(-1).clamp(1, num_slices), stable=True)
    limits = torch.arange(num_slices + 1, dtype=ordered.dtype, device=x.device)
    offsets = torch.searchsorted(ordered, limits, right=True, out_int32=True)
    places = torch.empty_like(rows).scatter_(0, rows, torch.arange(tokens, device=x.device))
    gathered = torch.empty(tokens, padded, dtype=x.dtype, device=x.device)
    if k < padded:
        gathered[:, k:] = 0
    torch.index_select(x, 0, rows, out=gathered[:, :k])
    return SortedTokens(gathered, places, offsets)


def workspace_linears(kernel: LaunchableKernel, x: Tensor, counts: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
    """Multiply each token by the weights of its slice count: `reference.routed_linears` with rounded weights.

    On the device wherever `supports` says nothing; on a CPU, where the interpreter runs kernels, groups are multiplied
    one by one.

    Args:
        kernel: dequantize with ``sorted_rows``.
        x: [..., K].
        counts: int32 [...] in 1..E.
        weights: Linears that share input and decision; tokens are sorted once for all.

    Returns:
        [..., N] of each, in the dtype of x.

    Numerics: weights are rounded to the dtype of x, sums are float32 and rounded once, and once more after the bias.
    """
    spec, flat = kernel.spec, x.reshape(-1, x.shape[-1])
    assert spec.sorted_rows, "tokens differ in their counts"
    if flat.shape[0] == 0:
        return [x.new_empty(*x.shape[:-1], weight.rows) for weight in weights]
    with torch.cuda.device_of(x):
        tokens = sort_tokens(flat, counts, len(spec.widths), spec.k)
        return [_sorted_linear(kernel, tokens, weight).view(*x.shape[:-1], weight.rows) for weight in weights]


def _sorted_linear(kernel: LaunchableKernel, tokens: SortedTokens, weight: Weight) -> Tensor:
    """Multiply sorted tokens by a weight; returns [T, N] in their order before sorting."""
    x, counts = tokens.x, len(kernel.spec.widths)
    y = torch.empty(x.shape[0], weight.rows, dtype=x.dtype, device=x.device)
    for start, stop, workspace in _chunks(x, weight.rows, counts, kernel.spec.k):
        dequantize(kernel, weight, tokens.offsets, workspace, start)
        product = _grouped_product(x, workspace, tokens.offsets)
        # Gathered by places, not scattered to rows: torch copies 16 bytes at a time in the one, a value in the other.
        torch.index_select(product, 0, tokens.places, out=y[:, start:stop])
    return y if weight.bias is None else y.add_(weight.bias)


def uniform_linear(kernel: LaunchableKernel, x: Tensor, counts: Tensor, weight: Weight) -> Tensor:
    """Multiply tokens that all have one slice count, which the device knows, by its weight in the library's GEMM.

    Args:
        kernel: dequantize without ``sorted_rows``.
        x: [..., K] bfloat16, float16 or float32.
        counts: int32 [...], all of one value in 1..E; the first is read, on the device.
        weight: What to multiply by.

    Returns:
        [..., N] in the dtype of x.

    Numerics: weights are rounded to the dtype of x; the rest is `torch.nn.functional.linear`.
    """
    k, padded = x.shape[-1], kernel.spec.k
    assert not kernel.spec.sorted_rows, "tokens have one count"
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], weight.rows)
    bias = None if weight.bias is None else weight.bias.to(x.dtype)
    parts = []
    with torch.cuda.device_of(x):
        for start, stop, workspace in _chunks(x, weight.rows, 1, padded):
            dequantize(kernel, weight, counts, workspace[0], start)
            # Padding columns are left out by strides, which GEMMs take as they are.
            parts.append(functional.linear(x, workspace[0, :, :k], None if bias is None else bias[start:stop]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _chunks(x: Tensor, n: int, counts: int, padded: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield where chunks of rows start and stop, each with its workspace [counts, rows, padded], one memory for all."""
    rows = chunk_rows(n, counts * padded * x.element_size())
    memory = torch.empty(counts * min(rows, n) * padded, dtype=x.dtype, device=x.device)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        yield start, stop, memory[: counts * (stop - start) * padded].view(counts, stop - start, padded)


def _grouped_product(x: Tensor, workspace: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each group of rows by its own weight.

    Shapes: x [T, K], rows in the order of their groups; workspace [E, N, K]; offsets int32 [E + 1]; returns [T, N].
    """
    if x.is_cuda:
        return torch._grouped_mm(x, workspace.transpose(-2, -1), offs=offsets[1:])
    product = x.new_empty(x.shape[0], workspace.shape[1])
    limits = offsets.tolist()
    for weight, (start, stop) in zip(workspace, pairwise(limits), strict=True):
        torch.mm(x[start:stop], weight.t(), out=product[start:stop])
    return product
