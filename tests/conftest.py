"""What every test starts from: one thread, a fixed seed, a fresh Dynamo, no settings from the environment."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # `pytest` without `python -m` leaves the project's root out
    sys.path.insert(0, str(ROOT))

torch.set_num_threads(1)
settings.register_profile(
    "fixed", derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for name in ("MOBIQUANT_DUMP", "MOBIQUANT_PASSES", "MOBIQUANT_STRICT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fresh_dynamo():
    """Forget compiled code before and after: counts of compiles start at zero."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
