"""Result files of the linear benchmark, made up: times follow from bytes, as on a GPU that only waits for memory."""

from __future__ import annotations

from typing import Any

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (8192, 28672))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
READ_TB_S = 3.0


def rivals_of(n: int, k: int, tokens: int) -> dict[str, float]:
    """Return times of the rivals: bf16 at full bandwidth or 700 TFLOP/s, the others in proportion to their bits."""
    memory, compute = n * k / 1e6, 2 * n * k * tokens / 7e8
    bits4 = 0.29 * memory / READ_TB_S + 3 + 1.6 * compute
    bf16 = 2 * memory / READ_TB_S + 2
    return {
        "bf16_us": max(bf16, compute),
        "tinygemm4_us": bits4 * 1.5 + 5 * compute,
        "gemlite4_us": bits4 * 1.7,
        "gemlite2_us": bits4 * 1.6,
    }


def row(n: int, k: int, tokens: int, slices: int, counts: str = "uniform", slower: float = 1.0) -> dict[str, Any]:
    """Return a row of ours, `slower` times as slow as its bytes at 95 % of the bandwidth (prefill: as bf16)."""
    size = n * k * slices // 4 + n * k // 32 + 2 * tokens * (n + k)
    rivals = rivals_of(n, k, tokens)
    time_us = slower * (rivals["bf16_us"] if tokens > 64 else size / (0.95 * READ_TB_S * 1e6))
    return {
        "n": n,
        "k": k,
        "tokens": tokens,
        "slices": slices,
        "mean_slices": float(slices),
        "counts": counts,
        "activation": "a16",
        "layout": "slice_major",
        "time_us": time_us,
        "total_us": time_us + (1.0 if tokens <= 64 else 0.0),
        "spread_us": 0.1,
        **rivals,
        "bytes": size,
        "bandwidth_tb_s": size / time_us / 1e6,
        "relative_error": 0.002,
    }


def rows() -> list[dict[str, Any]]:
    """Return what a complete run gives, without the other activation and layout."""
    found = []
    for n, k in SHAPES:
        for tokens in TOKENS:
            if tokens > 64:
                found += [row(n, k, tokens, 2), row(n, k, tokens, 4, "mixed"), row(n, k, tokens, 4, "full")]
                continue
            found += [row(n, k, tokens, slices) for slices in (1, 2, 3, 4)]
            found += [row(n, k, tokens, slices, "mixed") for slices in (2, 4) if slices <= tokens]
    return found


def result() -> dict[str, Any]:
    """Return the content of a result file."""
    return {
        "device": "NVIDIA H100 80GB HBM3",
        "versions": {"torch": "2.11.0", "triton": "3.6.0", "gemlite": None},
        "commit": "0123456789abcdef",
        "date": "2026-01-02",
        "bandwidth": {"copy_tb_s": 2.9, "read_tb_s": READ_TB_S},
        "prepare": [{"k": 4096, "tokens": 1, "time_us": 3.0}],
        "rows": rows(),
    }
