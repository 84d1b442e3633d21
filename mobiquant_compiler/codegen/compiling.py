"""Kernels compiled side by side by child processes, into Triton's cache on disk, from where launches load them.

Children are started by a command of their own: a process that uses CUDA must not be forked, and what multiprocessing
spawns runs the user's script again. They see no GPU, which compiling does not need.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import IO

from mobiquant_compiler.codegen import cache, toolchain
from mobiquant_compiler.codegen.signature import Dtypes
from mobiquant_compiler.config import environment_with
from mobiquant_compiler.spec import Family, KernelSpec

log = logging.getLogger(__name__)
Job = tuple[KernelSpec, int, Dtypes]  # what to compile, for which compute capability, for which dtypes
_MOST = 32  # processes where nobody asks for a number: each takes the better part of a gigabyte
_LOOKUP_S = 0.5  # seconds within which a binary is found; to compile one takes longer
_SLOWEST_FIRST = (Family.BATCH_WGMMA, Family.SLICED_WGMMA, Family.SLICED_MMA)


def workers_for(jobs: int, asked: int | None = None) -> int:
    """Return how many processes to start: as many as asked for, or one a core but one, at most one a job.

    0 means that compiling in this process is as fast: one child would only have to be started.
    """
    wanted = min(_cores() - 1, _MOST) if asked is None else asked
    found = min(wanted, jobs)
    return found if found > 1 else 0


def _cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compile_all(jobs: Sequence[Job], asked: int | None, progress: Callable[[int], None] = lambda done: None) -> int:
    """Have kernels in Triton's cache, side by side if any is missing there.

    This process looks them up, the quickest to compile first; as soon as one takes longer than that, children do the
    rest. So what is cached costs no process, and a cold start hardly waits for the first.

    Args:
        jobs: What to compile.
        asked: As `workers_for` takes it.
        progress: Called with the number of jobs that are done.

    Returns:
        How many processes were started.
    """
    workers = workers_for(len(jobs), asked)
    if not workers:
        return 0
    toolchain.triton()  # takes a second to import, which must not count
    left = sorted(jobs, key=_place)
    while left:
        start = time.perf_counter()
        _compile(left.pop())
        progress(len(jobs) - len(left))
        if time.perf_counter() - start > _LOOKUP_S:
            break
    workers = workers_for(len(left), asked)
    if workers:
        known = len(jobs) - len(left)
        compile_beside(left, workers, lambda done: progress(known + done))
    return workers


def compile_beside(jobs: Sequence[Job], workers: int, progress: Callable[[int], None] = lambda done: None) -> list[str]:
    """Compile kernels in `workers` child processes.

    Args:
        jobs: What to compile; what Triton's cache holds already is only looked up.
        workers: Processes, 1 or more.
        progress: Called with the number of jobs that are done.

    Returns:
        What went wrong, one line each. A launch compiles such a kernel itself, and raises what there is to raise.
    """
    queue = deque(sorted(jobs, key=_place))
    done: list[Job] = []

    def finished(job: Job) -> None:  # list.append and len need no lock
        done.append(job)
        progress(len(done))

    with ThreadPoolExecutor(workers) as threads:
        found = [threads.submit(_serve, queue, finished) for _ in range(workers)]
        failed = [line for future in found for line in future.result()]
    for line in failed:
        log.warning("%s", line)
    return failed


def _place(job: Job) -> tuple[int, int]:
    """Order jobs so that what takes longest is begun first."""
    spec = job[0]
    family = _SLOWEST_FIRST.index(spec.family) if spec.family in _SLOWEST_FIRST else len(_SLOWEST_FIRST)
    return family, -spec.consumers * len(spec.widths)


def _serve(queue: deque[Job], finished: Callable[[Job], None]) -> list[str]:
    """Feed one child from the queue until that is empty, or the child ends; returns what went wrong."""
    failed = []
    with tempfile.TemporaryFile() as errors, _child(errors) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        while queue:
            try:
                job = queue.popleft()
            except IndexError:  # another thread was faster
                break
            try:
                pickle.dump(job, child.stdin)
                child.stdin.flush()
                answer = pickle.load(child.stdout)
            except (OSError, EOFError):
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip().splitlines()
                failed.append(
                    f"{job[0].name}: the process that compiles it ended: {said[-1] if said else 'no message'}"
                )
                break
            if answer:
                failed.append(f"{job[0].name}: {answer}")
            finished(job)
        with suppress(OSError):  # what a child that ended did not read
            child.stdin.close()
    return failed


def _compile(job: Job) -> str:
    """Compile in this process; returns what went wrong, "" where all went well."""
    try:
        cache.compile_for(*job)
    except Exception as error:  # noqa: BLE001  whatever it is, the launch will meet it again and raise it
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _child(errors: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a process that compiles what it is sent."""
    path = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=environment_with(PYTHONPATH=path, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"),
    )


def main() -> int:
    """Compile the jobs that come by standard input; an answer each, empty where all went well."""
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what compilers print must not come between answers
        while True:
            try:
                spec, cc, dtypes = pickle.load(sys.stdin.buffer)
            except EOFError:
                return 0
            pickle.dump(_compile((spec, cc, dtypes)), answers)
            answers.flush()


if __name__ == "__main__":
    sys.exit(main())
