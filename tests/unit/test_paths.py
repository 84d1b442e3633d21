"""Which path a call takes, by shapes, dtype and device alone, and the record of it."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from mobiquant_compiler import wiring
from mobiquant_compiler.codegen.crossover import NEVER, Crossover, Row
from mobiquant_compiler.linear import MobiLinear
from mobiquant_compiler.runtime import launch, paths
from mobiquant_compiler.runtime import prefill as workspace
from mobiquant_compiler.runtime.paths import execution_paths, reset_execution_paths
from mobiquant_compiler.spec import PREFILL_TOKENS, Path, Prefill, SliceSpec

SPEC = SliceSpec()
N, K = 4096, 4096
FEW, MANY = PREFILL_TOKENS, PREFILL_TOKENS + 1
INTEGER, WORKSPACE, REFERENCE = Path.INTEGER, Path.WORKSPACE, Path.REFERENCE


@pytest.fixture(autouse=True)
def capability(monkeypatch: pytest.MonkeyPatch):
    """Let there be a device, of a compute capability that tests may change; count paths from nothing."""
    found = [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: tuple(found))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some Accelerator 9000")
    launch.refusal.cache_clear()
    reset_execution_paths()
    yield found
    launch.refusal.cache_clear()
    reset_execution_paths()


def tokens_on(device: str, tokens: int, dtype: torch.dtype = torch.bfloat16) -> SimpleNamespace:
    """Return what a choice of path may look at, of activations on a device that need not be there."""
    shape = torch.Size((tokens, K))
    return SimpleNamespace(
        is_cuda=device == "cuda", device=torch.device(device), dtype=dtype, shape=shape, numel=shape.numel
    )


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> Crossover:
    """Let the device have grouped GEMMs, for bfloat16, which pay from 300 tokens on."""
    table = Crossover("test", (Row(N, K, 300), Row(64, 64, NEVER)))
    monkeypatch.setattr(wiring, "_crossover", lambda device: table)
    monkeypatch.setattr(
        workspace, "supports", lambda x, n, k: None if x.is_cuda and x.dtype is torch.bfloat16 else "no"
    )
    return table


@pytest.mark.usefixtures("grouped")
@pytest.mark.parametrize(
    ("device", "tokens", "prefill", "path"),
    [
        ("cuda", 1, Prefill.ROUTED, INTEGER),
        ("cuda", FEW, Prefill.FULL, INTEGER),
        ("cuda", MANY, Prefill.ROUTED, INTEGER),  # the table says so
        ("cuda", 299, Prefill.ROUTED, INTEGER),
        ("cuda", 300, Prefill.ROUTED, WORKSPACE),
        ("cuda", MANY, Prefill.FULL, WORKSPACE),  # all tokens alike: a library's GEMM
        ("cuda", 100000, Prefill.EXACT, INTEGER),
        ("cpu", 100000, Prefill.ROUTED, INTEGER),
        ("cpu", MANY, Prefill.FULL, INTEGER),
        ("cpu", MANY, Prefill.EXACT, INTEGER),
    ],
)
def test_paths_follow_tokens_prefill_and_device(device: str, tokens: int, prefill: Prefill, path: Path) -> None:
    assert wiring.path_of(tokens_on(device, tokens), N, SPEC, prefill) is path


@pytest.mark.usefixtures("grouped")
@pytest.mark.parametrize(("dtype", "path"), [(torch.float16, INTEGER), (torch.float32, INTEGER)])
def test_dtypes_without_grouped_gemm_stay_on_the_integer_path(dtype: torch.dtype, path: Path) -> None:
    assert wiring.path_of(tokens_on("cuda", 100000, dtype), N, SPEC, Prefill.ROUTED) is path
    assert wiring.path_of(tokens_on("cuda", 100000, dtype), N, SPEC, Prefill.FULL) is WORKSPACE


@pytest.mark.parametrize("prefill", list(Prefill))
@pytest.mark.parametrize("tokens", [1, FEW, MANY])
def test_dtypes_that_no_kernel_takes_go_to_the_reference(tokens: int, prefill: Prefill) -> None:
    assert wiring.path_of(tokens_on("cuda", tokens, torch.float64), N, SPEC, prefill) is REFERENCE


@pytest.mark.usefixtures("grouped")
@pytest.mark.parametrize(
    ("major", "minor", "path"), [(7, 0, REFERENCE), (7, 5, REFERENCE), (8, 0, INTEGER), (12, 0, INTEGER)]
)
def test_devices_without_products_of_bytes_go_to_the_reference(
    major: int, minor: int, path: Path, capability: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    capability[:] = [major, minor]
    launch._note_fallback.cache_clear()
    assert wiring.path_of(tokens_on("cuda", 1), N, SPEC, Prefill.ROUTED) is path
    assert ("Some Accelerator 9000 has no 16 x 8 x 32 products of bytes" in caplog.text) == (path is REFERENCE)
    assert wiring.path_of(tokens_on("cpu", 1), N, SPEC, Prefill.ROUTED) is INTEGER


@pytest.mark.usefixtures("grouped")
def test_where_a_workspace_never_paid_it_is_never_taken() -> None:
    assert wiring.path_of(tokens_on("cuda", 1 << 20), 64, SPEC, Prefill.ROUTED) is WORKSPACE  # K decides as much
    small = tokens_on("cuda", 1 << 20)
    small.shape = torch.Size((1 << 20, 64))
    assert wiring.path_of(small, 64, SPEC, Prefill.ROUTED) is INTEGER


def test_calls_are_counted_by_path_and_number_of_tokens() -> None:
    for tokens in (1, 2, 8, 9, 64, 65, 512, 4096, 4097, 100000):
        paths.note(INTEGER, tokens, 1)
    paths.note(WORKSPACE, 65, 3)
    paths.note(REFERENCE, 65, 2)
    assert execution_paths() == [
        {"path": "integer", "tokens": "1", "calls": 1},
        {"path": "integer", "tokens": "2..8", "calls": 2},
        {"path": "integer", "tokens": "9..64", "calls": 2},
        {"path": "integer", "tokens": "65..512", "calls": 2},
        {"path": "reference", "tokens": "65..512", "calls": 2},
        {"path": "workspace", "tokens": "65..512", "calls": 3},
        {"path": "integer", "tokens": "513..4096", "calls": 1},
        {"path": "integer", "tokens": "4097..", "calls": 2},
    ]


def test_counting_starts_anew() -> None:
    paths.note(INTEGER, 1, 1)
    reset_execution_paths()
    assert execution_paths() == []


def test_threads_lose_no_call() -> None:
    def work() -> None:
        for _ in range(2000):
            paths.note(INTEGER, 1, 1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert execution_paths() == [{"path": "integer", "tokens": "1", "calls": 8000}]


def test_calls_on_a_cpu_are_not_counted() -> None:
    linear = MobiLinear.from_weight(torch.randn(8, 32), None, SliceSpec((2, 2), 32))
    assert linear(torch.randn(3, 32)).shape == (3, 8)
    assert execution_paths() == []


@pytest.mark.parametrize(
    ("asked", "done"),
    [(Prefill.FULL, Prefill.ROUTED), (Prefill.ROUTED, Prefill.ROUTED), (Prefill.EXACT, Prefill.EXACT)],
)
def test_ops_that_are_given_counts_honour_them(asked: Prefill, done: Prefill) -> None:
    """Only where route is part of the op are all counts of a long call known to be equal."""
    assert wiring._counts_as_given(lambda *args: args)("x", "counts", asked) == ("x", "counts", done)
