"""Kernels that child processes compile: this process finds them in Triton's cache."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mobiquant_compiler.codegen import cache, compiling, toolchain
from mobiquant_compiler.codegen.configs import Target, TokenClass, kernel_spec
from mobiquant_compiler.codegen.signature import Dtypes
from mobiquant_compiler.spec import Family, KernelSpec, Layout, SliceSpec

SPEC = SliceSpec((2,), 64)


def job(family: Family, k: int, cc: int = 90) -> compiling.Job:
    """Return a kernel that compiles quickly."""
    return kernel_spec(family, SPEC, k, TokenClass.MANY, Target.of(90)), cc, Dtypes()


@pytest.fixture
def binaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache of Triton that is empty."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("MOBIQUANT_CACHE", str(tmp_path / "ours"))
    return tmp_path / "triton"


def kept(binaries: Path) -> set[Path]:
    return set(binaries.rglob("*.cubin"))


def test_what_children_compile_is_found(binaries: Path, caplog: pytest.LogCaptureFixture) -> None:
    jobs = [
        job(Family.DEQUANTIZE, 64),
        job(Family.DEQUANTIZE, 128),
        job(Family.GATHER_TOKENS, 64),
        job(Family.DEQUANTIZE, 64, 10),
    ]
    told: list[int] = []
    (line,) = compiling.compile_beside(jobs, 2, told.append)
    assert line.startswith(f"{jobs[3][0].name}: "), "one that cannot be compiled costs no other"
    assert line in caplog.text
    assert told == [1, 2, 3, 4]
    assert len(kept(binaries)) == 3
    before = kept(binaries)
    for spec, cc, dtypes in jobs[:3]:
        assert cache.compile_for(spec, cc, dtypes).asm["cubin"]
    assert kept(binaries) == before, "nothing was compiled again"


def test_what_is_cached_starts_no_process(binaries: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [job(Family.DEQUANTIZE, k) for k in (64, 128, 192)]
    told: list[int] = []
    assert compiling.compile_all(jobs, 2, told.append) == 2, "the first was not there: children compile the others"
    assert told == [1, 2, 3]
    assert len(kept(binaries)) == 3
    monkeypatch.setattr(compiling, "compile_beside", lambda *args: pytest.fail("nothing is left to compile"))
    assert compiling.compile_all(jobs, 2, told.append) == 0
    assert told[3:] == [1, 2, 3]
    assert compiling.compile_all(jobs, 0, told.append) == 0
    assert len(told) == 6, "this process compiles when it launches"


def test_what_cannot_be_compiled_here_is_said(binaries: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert compiling.compile_all([job(Family.DEQUANTIZE, 64, 10), job(Family.DEQUANTIZE, 128, 10)], 2) == 0
    assert caplog.text.count("dequantize") >= 1


def test_listeners_of_others_still_hear(binaries: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[bool] = []
    knobs = toolchain.triton().knobs.compilation
    monkeypatch.setattr(knobs, "listener", lambda **facts: heard.append(facts["cache_hit"]))
    listener, one = knobs.listener, job(Family.DEQUANTIZE, 64)
    assert [toolchain.was_cached(lambda: cache.compile_for(*one)) for _ in range(2)] == [False, True]
    assert heard == [False, True]
    assert knobs.listener is listener


def test_a_child_that_ends_is_named(binaries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dies = tmp_path / "dies"
    dies.write_text("#!/bin/sh\necho no memory >&2\nexit 1\n")
    dies.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dies))
    jobs = [job(Family.DEQUANTIZE, k) for k in (64, 128, 192)]
    first, rest = compiling.compile_beside(jobs, 1)
    assert first.endswith("the process that compiles it ended: no memory")
    assert rest == "2 kernels are left to their launches: all processes that compile ended"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    assert "No such file or directory" in compiling.compile_beside(jobs, 1)[0]
    assert not kept(binaries)


def test_surroundings_of_children_do_not_matter(
    binaries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something prints at their start, a path is none, and the folder has modules of the same name."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "random.py").write_text("raise SystemExit('the wrong random')")
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("print('hello')")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path, tmp_path])
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    monkeypatch.chdir(folder)
    assert compiling.compile_beside([job(Family.DEQUANTIZE, 64)], 1) == []
    assert len(kept(binaries)) == 1


def test_what_progress_raises_ends_children(binaries: Path) -> None:
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    jobs = [job(Family.DEQUANTIZE, 64 * k) for k in range(1, 30)]
    with pytest.raises(KeyboardInterrupt):
        compiling.compile_beside(jobs, 2, stop)
    assert len(kept(binaries)) < 10


def test_what_takes_longest_is_begun_first() -> None:
    def of(family: Family, slices: int, consumers: int = 1) -> compiling.Job:
        return KernelSpec(family, (2,) * slices, 64, Layout.SLICE_MAJOR, 64, consumers=consumers), 90, Dtypes()

    wanted = [
        of(Family.BATCH_WGMMA, 4, 2),
        of(Family.BATCH_WGMMA, 4),
        of(Family.SLICED_MMA, 4),
        of(Family.SLICED_MMA, 1),
        of(Family.DEQUANTIZE, 4),
    ]
    assert sorted(wanted[2:] + wanted[:2], key=compiling._place) == wanted


@pytest.mark.parametrize(
    ("jobs", "asked", "wanted"), [(9, 4, 4), (3, 8, 3), (9, 1, 0), (9, 0, 0), (1, 8, 0), (0, None, 0)]
)
def test_how_many_processes(jobs: int, asked: int | None, wanted: int) -> None:
    assert compiling.workers_for(jobs, asked) == wanted


def test_a_process_a_core_but_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_cores", lambda: 16)
    assert (compiling.workers_for(99), compiling.workers_for(5)) == (15, 5)
    monkeypatch.setattr(compiling, "_cores", lambda: 256)
    assert (compiling.workers_for(99), compiling.workers_for(99, 40)) == (32, 40)
    monkeypatch.setattr(sys, "executable", None)
    assert compiling.workers_for(99) == 0, "nothing can be started"


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("", 8)])
def test_cores_of_a_container(quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(compiling, "_QUOTA", tmp_path / "cpu.max")
    if quota:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert compiling._cores() == cores
