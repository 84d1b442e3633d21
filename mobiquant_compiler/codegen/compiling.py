"""Kernels compiled side by side by child processes, into Triton's cache on disk, from where launches load them.

Children are started by a command of their own: a process that uses CUDA must not be forked, and what multiprocessing
spawns runs the user's script again. They see no GPU, which compiling does not need, and answer by a socket, so that
whatever they print comes between no answers.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import IO, Any

from mobiquant_compiler.codegen import cache, toolchain
from mobiquant_compiler.codegen.signature import Dtypes
from mobiquant_compiler.config import environment_with
from mobiquant_compiler.spec import Family, KernelSpec

log = logging.getLogger(__name__)
Job = tuple[KernelSpec, int, Dtypes]  # what to compile, for which compute capability, for which dtypes
Event = tuple[Job | None, str]  # a job that is done, None for a child that is no more; and what went wrong
_MOST = 32  # processes where nobody asks for a number: each takes the better part of a gigabyte
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_SLOWEST_FIRST = (Family.BATCH_WGMMA, Family.SLICED_WGMMA, Family.RESIDENT_MMA, Family.SLICED_MMA)


def workers_for(jobs: int, asked: int | None = None) -> int:
    """Return how many processes to start.

    Args:
        jobs: Kernels to compile; there is no use in more processes.
        asked: How many somebody wants; None is one a core but one, at most `_MOST`.

    Returns:
        The number. It is 0 where this process does as well alone, and where no interpreter can be started.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        return 0
    found = min(min(_cores() - 1, _MOST) if asked is None else asked, jobs)
    return found if found > 1 else 0


def _cores() -> int:
    """Return how many cores this process may use: by its affinity, and by the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text(encoding="utf-8").split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or no quota ("max")
        return cores


def compile_all(jobs: Sequence[Job], asked: int | None, progress: Callable[[int], None] = lambda done: None) -> int:
    """Have kernels in Triton's cache, side by side if any is missing there.

    This process looks them up, the quickest to compile first; as soon as one is not there, children do the rest. So
    what is cached costs no process, and a cold start hardly waits for the first.

    Args:
        jobs: What to compile.
        asked: As `workers_for` takes it.
        progress: Called with the number of jobs that are done; not for those that are left to their launches.

    Returns:
        How many processes were started.

    Raises:
        TritonMissing: triton cannot be imported.
    """
    if not workers_for(len(jobs), asked):
        return 0
    left, was_there = sorted(jobs, key=_place), True
    while left and was_there:
        job = left.pop()
        wrong, was_there = _compile(job)
        if wrong:
            log.warning("%s: %s", job[0].name, wrong)
        progress(len(jobs) - len(left))
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
        progress: Called with the number of jobs that are done, by this thread. What it raises ends the children.

    Returns:
        What went wrong, one line each. A launch compiles such a kernel itself, and raises what there is to raise.
    """
    waiting = deque(sorted(jobs, key=_place))
    events: SimpleQueue[Event] = SimpleQueue()
    children: list[subprocess.Popen[bytes]] = []
    threads = [Thread(target=_serve, args=(waiting, events, children), daemon=True) for _ in range(workers)]
    failed, done, running = [], 0, workers
    try:
        for thread in threads:
            thread.start()
        while running:
            job, wrong = events.get()
            if wrong:
                failed.append(wrong)
            if job is None:
                running -= 1
            else:
                done += 1
                progress(done)
    except BaseException:
        waiting.clear()
        for child in children:
            child.terminate()
        raise
    if waiting:
        failed.append(f"{len(waiting)} kernels are left to their launches: all processes that compile ended")
    for line in failed:
        log.warning("%s", line)
    return failed


def _place(job: Job) -> tuple[int, int]:
    """Order jobs so that what takes longest is begun first."""
    spec = job[0]
    family = _SLOWEST_FIRST.index(spec.family) if spec.family in _SLOWEST_FIRST else len(_SLOWEST_FIRST)
    return family, -spec.consumers * len(spec.widths)


def _serve(waiting: deque[Job], events: SimpleQueue[Event], children: list[subprocess.Popen[bytes]]) -> None:
    """Feed one child until nothing waits, or the child ends."""
    wrong = ""
    try:
        with tempfile.TemporaryFile() as said:
            here, there = socket.socketpair()
            with here:
                with there:
                    child = _child(there.fileno(), said)
                children.append(child)
                channel = here.makefile("rwb")
                name = _feed(channel, waiting, events)
                with suppress(OSError):  # what a child that ended did not read
                    channel.close()
            child.wait()
            if name:
                said.seek(0)
                lines = said.read().decode(errors="replace").strip().splitlines()
                wrong = f"{name}: the process that compiles it ended: {lines[-1] if lines else 'no message'}"
    except OSError as error:
        wrong = f"no process to compile in: {error}"
    finally:
        events.put((None, wrong))


def _feed(channel: Any, waiting: deque[Job], events: SimpleQueue[Event]) -> str:
    """Send jobs to a child, one after another; returns the name of the kernel at which it ended, "" if it did not."""
    while waiting:
        try:
            job = waiting.popleft()
        except IndexError:  # another thread was faster
            break
        try:
            pickle.dump(job, channel)
            channel.flush()
            answer = pickle.load(channel)
        except (OSError, EOFError, pickle.UnpicklingError):
            return job[0].name
        events.put((job, f"{job[0].name}: {answer}" if answer else ""))
    return ""


def _child(descriptor: int, said: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a process that compiles what it is sent by the socket of a descriptor; what it prints goes to a file."""
    path = os.pathsep.join(part or str(Path.cwd()) for part in sys.path if isinstance(part, str))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, str(descriptor)],
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=said,
        pass_fds=(descriptor,),
        env=environment_with(PYTHONPATH=path, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"),
    )


def _compile(job: Job) -> tuple[str, bool]:
    """Compile in this process; returns what went wrong, "" where all went well, and whether it was cached."""
    try:
        return "", toolchain.was_cached(lambda: cache.compile_for(*job))
    except Exception as error:  # noqa: BLE001  whatever it is, the launch will meet it again and raise it
        return f"{type(error).__name__}: {error}".splitlines()[0], False


def main() -> int:
    """Compile jobs that come by the socket of the descriptor given; answers are what went wrong, "" for nothing."""
    with socket.socket(fileno=int(sys.argv[1])) as own, own.makefile("rwb") as channel:
        while True:
            try:
                job = pickle.load(channel)
            except EOFError:
                return 0
            pickle.dump(_compile(job)[0], channel)
            channel.flush()


if __name__ == "__main__":
    sys.exit(main())
