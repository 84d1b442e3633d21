"""Marks by which programs of a launch hear of one another, without a GPU: whose they are, and what if none are left."""

from __future__ import annotations

from itertools import pairwise
from threading import get_ident
from types import SimpleNamespace

import pytest
import torch

from mobiquant_compiler.runtime import marks

GPU = torch.device("cuda", 0)


class Device:
    """A CUDA device whose memory is the CPU's: which stream is current, and whether it is being captured."""

    def __init__(self) -> None:
        self.stream, self.capturing, self.allocated = 1, False, 0
        self.threads: set[int] = set()

    def zeros(self, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self.allocated += 1
        self.threads.add(get_ident())
        return torch.full(shape, 0, dtype=dtype)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Let marks be those of a device that is not there."""
    device = Device()
    stream = lambda where: SimpleNamespace(cuda_stream=device.stream, synchronize=lambda: None)  # noqa: E731
    cuda = SimpleNamespace(current_stream=stream, is_current_stream_capturing=lambda: device.capturing)
    monkeypatch.setattr(marks, "torch", SimpleNamespace(cuda=cuda, zeros=device.zeros, int32=torch.int32))
    monkeypatch.setattr(marks, "_STORES", {})
    monkeypatch.setattr(marks, "_LAUNCHES", 8)
    return device


def test_marks_are_allocated_where_no_pool_of_graphs_is_in_the_way(gpu: Device) -> None:
    """Calls before a capture may allocate from the pool of graphs, which torch says thread by thread."""
    marks.marks_for(GPU)
    assert gpu.threads
    assert get_ident() not in gpu.threads


def test_what_goes_wrong_is_said(gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*shape: int, **options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(marks.torch, "zeros", full)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        marks.marks_for(GPU)


def test_a_stream_keeps_its_own(gpu: Device) -> None:
    first = marks.marks_for(GPU)
    assert first.shape == (marks.MARKS,)
    assert not first.any()
    assert marks.marks_for(GPU) is first
    gpu.stream = 2
    assert marks.marks_for(GPU).data_ptr() != first.data_ptr()
    assert marks.marks_for(torch.device("cuda", 1)).data_ptr() != first.data_ptr()
    assert gpu.allocated == 2, "once a device"


def test_each_captured_launch_has_marks_of_its_own_and_calls_make_room(gpu: Device) -> None:
    found = [marks.marks_for(GPU)]
    for _ in range(5):
        gpu.capturing = True
        found += [marks.marks_for(GPU) for _ in range(4)]
        gpu.capturing = False
        assert marks.marks_for(GPU) is found[0]
    assert len({each.data_ptr() for each in found}) == len(found) == 21
    assert gpu.allocated == 4, "eight at a time, whenever fewer than four are left"
    places = sorted(each.data_ptr() for each in found)
    assert min(b - a for a, b in pairwise(places)) >= 4 * marks.MARKS


def test_without_room_the_capture_zeroes_its_own(gpu: Device) -> None:
    gpu.capturing = True
    marks.marks_for(GPU)
    assert not marks._STORES, "what a capture allocates is the graph's"
    gpu.capturing = False
    marks.marks_for(GPU)
    gpu.capturing = True
    before = gpu.allocated
    found = [marks.marks_for(GPU) for _ in range(9)]
    assert len({each.data_ptr() for each in found}) == 9
    assert gpu.allocated - before == 2, "seven were left"


def test_the_interpreter_needs_none_of_this() -> None:
    assert marks.marks_for(torch.device("cpu")).tolist() == [0] * marks.MARKS
