"""Compiles what the benchmark will launch, in processes of their own, so that it finds every kernel in the disk caches.

GemLite compiles up to 19 candidates for each weight and number of tokens: minutes one after another, seconds on all
cores. A job that fails or comes too late costs time later and nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

# Tokens that share kernels, in GemLite and in ours.
CLASSES = ((1,), (8,), (16, 32), (64,), (1024, 256, 4096), (2, 4))


@dataclass(frozen=True, slots=True)
class Job:
    """Kernels of one linear for some numbers of tokens."""

    method: str
    n: int
    k: int
    tokens: tuple[int, ...]


def jobs(shapes: Sequence[tuple[int, int]], tokens: Sequence[int], methods: Sequence[str]) -> list[Job]:
    """Return what there is to compile, the most urgent first."""
    known = {t for members in CLASSES for t in members}
    classes = [tuple(t for t in members if t in tokens) for members in (*CLASSES, tuple(set(tokens) - known))]
    compiled = [m for m in methods if m == "ours" or m.startswith("gemlite")]
    return [Job(m, n, k, c) for c, (n, k), m in product(classes, shapes, compiled) if c]


def warm(job: Job, slices: Sequence[int]) -> float:
    """Build the weight of a job and call it once for each number of tokens; returns seconds."""
    start, device = time.monotonic(), torch.device("cuda")
    with torch.no_grad():
        if job.method == "ours":
            _warm_ours(job, slices, device)
        else:
            _warm_rival(job, device)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return time.monotonic() - start


def _warm_ours(job: Job, slices: Sequence[int], device: torch.device) -> None:
    from linear_ours import SMALL_BATCH, Case, Weights, calls_of, cases, counts_of

    weights: dict[str, Weights] = {}
    for tokens in job.tokens:
        x = torch.randn(tokens, job.k, device=device, dtype=torch.bfloat16)
        for case in cases(job.n, job.k, tokens, slices):
            if case.layout not in weights:
                weights[case.layout] = Weights(job.n, job.k, case.layout, device, copies=1)
            alone, whole, _ = calls_of(weights[case.layout], case, x, counts_of(case, tokens, device))
            alone[0]()
            whole[0]()
        if tokens <= SMALL_BATCH:
            weights["slice_major"].prepare(x, Case(2), trained=True)()


def _warm_rival(job: Job, device: torch.device) -> None:
    from linear_rivals import BUILDERS, run_once, tune_gemlite

    tune_gemlite(run_once)
    rival = BUILDERS[job.method](job.n, job.k, device, copies=1)
    for tokens in job.tokens:
        rival.copies[0](torch.randn(tokens, job.k, device=device, dtype=torch.bfloat16))


def warm_all(todo: Sequence[Job], slices: Sequence[int], workers: int, limit_s: float) -> list[str]:
    """Do jobs in `workers` processes until `limit_s` have passed; returns what did not work, one line each."""
    workers = min(workers, len(todo), (os.cpu_count() or 1) - 1)
    if workers < 1:
        return []
    failed, deadline = [], time.monotonic() + limit_s
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        results = [(job, pool.apply_async(warm, (job, slices))) for job in todo]
        for job, result in results:
            result.wait(max(0.0, deadline - time.monotonic()))
            if not result.ready():
                failed.append(f"{job}: not done after {limit_s:.0f} s")
            elif not result.successful():
                failed.append(f"{job}: {_reason(result)}")
    for line in failed:
        print(f"warm-up: {line}", file=sys.stderr, flush=True)
    return failed


def _reason(result: multiprocessing.pool.AsyncResult) -> str:
    try:
        result.get()
    except Exception as error:  # noqa: BLE001  whatever it is, the measurement will meet it again and record it
        return f"{type(error).__name__}: {error}"[:200]
    return ""
