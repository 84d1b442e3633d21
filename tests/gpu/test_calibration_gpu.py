"""Calibration on a device: slices as good as on a CPU, a state that either goes on from, trained routers compiled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mobiquant_compiler as mq
from mobiquant_compiler.baselines.compare import measure_static
from mobiquant_compiler.calibration.tuning import HELD_BITS
from mobiquant_compiler.linear import elastic_linears
from tests.models_tiny import VOCABULARY, seeded, tiny_llama, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
IDS = tokens(16, 64, seed=4)
WHERE = "cuda"
CONFIG = mq.CalibrationConfig(tune_steps=20, router="mlp", router_steps=60)


def model_on(device: str) -> nn.Module:
    return tiny_llama().to(device)


def wide_llama(layers: int) -> nn.Module:
    """Return a model whose blocks are large beside what lies between them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=64,
    )
    return seeded(LlamaForCausalLM(config))


def calibrated(device: str, state: Path | None = None) -> nn.Module:
    model = model_on(device)
    mq.calibrate_(model, IDS, CONFIG, state=state)
    return model


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids.to(next(model.parameters()).device)).logits.float().cpu()


def distances(model: nn.Module, plain: Tensor, ids: Tensor) -> list[float]:
    found = []
    for bits in (2.0, 3.0, 4.0, 6.0, 8.0):
        with mq.budget(model, bits):
            found.append(float((logits(model, ids) - plain).norm() / plain.norm()))
    return found


def test_slices_are_as_good_as_on_a_cpu() -> None:
    ids = tokens(4, 64, seed=5)
    plain = logits(model_on("cpu"), ids)
    here, there = (distances(calibrated(device), plain, ids) for device in ("cpu", WHERE))
    assert here[0] > 3 * here[-1]
    for one, other in zip(here, there, strict=True):
        assert other == pytest.approx(one, rel=0.15, abs=2e-3)


def test_a_state_made_on_a_device_goes_on_on_a_cpu(tmp_path: Path) -> None:
    made = calibrated(WHERE, tmp_path / "state")
    (tmp_path / "state" / "tuning.safetensors").unlink()
    for path in (tmp_path / "state").glob("router-*"):
        path.unlink()
    resumed = calibrated("cpu", tmp_path / "state")
    for name, linear in elastic_linears(made).items():
        other = elastic_linears(resumed)[name]
        held = slice(0, HELD_BITS)  # slices beyond these are chosen again on the grid that either device has tuned
        assert torch.equal(linear.slices[held].cpu(), other.slices[held])
        torch.testing.assert_close(linear.scale.cpu().float(), other.scale.float(), rtol=0.1, atol=1e-4)
    ids = tokens(2, 64, seed=8)
    with mq.budget(made, 8), mq.budget(resumed, 8):
        one, two = logits(made, ids), logits(resumed, ids)
    assert float((one - two).norm() / one.norm()) < 0.05


def test_an_interrupted_run_goes_on_and_gives_the_same(tmp_path: Path) -> None:
    whole = calibrated(WHERE, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for path in (tmp_path / "two").glob("router-*"):
        path.unlink()
    again = calibrated(WHERE, tmp_path / "two")
    for name, linear in elastic_linears(whole).items():
        other = elastic_linears(again)[name]
        assert torch.equal(linear.slices, other.slices)
        assert torch.equal(linear.scale, other.scale)


def test_trained_routers_compile_and_follow_the_budget() -> None:
    model = calibrated(WHERE)
    compiled = torch.compile(model, backend="mobiquant")
    ids = tokens(8, 64, seed=6)
    found = []
    for bits in (2.0, 3.0, 5.0, 8.0):
        with mq.budget(model, bits):
            eager = logits(model, ids)
            mq.reset_telemetry(model)
            torch.testing.assert_close(logits(compiled, ids), eager, rtol=2e-2, atol=2e-2)
            found.append(mq.achieved_bits(model).total)
    assert found == sorted(found)
    assert found[0] == 2.0
    assert found[-1] == 8.0


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq"])
def test_static_methods_run(method: str) -> None:
    ids, found = tokens(2, 32, seed=7), []
    for device in ("cpu", WHERE):
        rows = measure_static(model_on(device), ids, [method], [4], calibration=IDS[:4])
        found.append(next(iter(rows)).perplexity)
    assert found[1] == pytest.approx(found[0], rel=0.25)


def test_a_model_in_main_memory_is_calibrated_a_block_at_a_time() -> None:
    made = []
    for home, device in ((WHERE, None), ("cpu", WHERE)):
        model = model_on(home)
        mq.calibrate_(model, IDS, CONFIG, device=device)
        assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {home}
        made.append(elastic_linears(model))
    for name, linear in made[0].items():
        other = made[1][name]
        assert torch.equal(linear.slices.cpu(), other.slices)
        torch.testing.assert_close(linear.scale.cpu().float(), other.scale.float(), rtol=1e-2, atol=1e-5)


def test_memory_on_the_device_does_not_grow_with_the_number_of_blocks() -> None:
    peaks = []
    for layers in (2, 10):
        model = wide_llama(layers)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        mq.calibrate_(model, IDS[:2], mq.CalibrationConfig(tune_steps=2, router="mlp", router_steps=2), device=WHERE)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    block = sum(p.numel() * 4 for p in wide_llama(1).model.layers.parameters())
    assert peaks[1] - peaks[0] < block, f"{peaks} bytes with a block of {block}"
