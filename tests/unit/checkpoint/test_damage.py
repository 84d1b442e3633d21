"""Every kind of damage has its own error, which names tensor and file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import mobiquant_compiler as mq
from mobiquant_compiler import checkpoint
from mobiquant_compiler.checkpoint import files
from mobiquant_compiler.checkpoint.summary import summarize
from mobiquant_compiler.errors import (
    BadOption,
    CheckpointCorrupt,
    CheckpointForeign,
    CheckpointMismatch,
    CheckpointMissing,
    CheckpointTensor,
    CheckpointTooNew,
)
from tests.checkpoint_cases import Q_PROJ, edit_config, edit_tensors, stored, tiny_llama


class TestMissing:
    def test_no_directory(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointMissing, match="the directory is missing"):
            checkpoint.load(tmp_path / "nowhere")

    def test_no_config(self, copy: Path) -> None:
        (copy / "config.json").unlink()
        with pytest.raises(CheckpointMissing, match=r"config\.json is missing"):
            checkpoint.load(copy)

    def test_no_weights(self, copy: Path) -> None:
        (copy / "model.safetensors").unlink()
        with pytest.raises(CheckpointMissing, match=r"shard model\.safetensors is missing"):
            checkpoint.load(copy)

    def test_no_shard(self, model: LlamaForCausalLM, tmp_path: Path) -> None:
        path = checkpoint.save(model, tmp_path / "c", shard_bytes=20_000)
        sorted(path.glob("*.safetensors"))[1].unlink()
        with pytest.raises(CheckpointMissing, match="shard model-00002-of-"):
            checkpoint.load(path)

    def test_index_names_a_tensor_that_no_shard_holds(self, model: LlamaForCausalLM, tmp_path: Path) -> None:
        path = checkpoint.save(model, tmp_path / "c", shard_bytes=20_000)
        index = json.loads((path / files.INDEX).read_text())
        index["weight_map"]["ghost"] = "model-00001-of-" + f"{len(list(path.glob('*.safetensors'))):05}.safetensors"
        (path / files.INDEX).write_text(json.dumps(index))
        with pytest.raises(CheckpointMissing, match="tensor ghost"):
            checkpoint.load(path)

    @pytest.mark.parametrize("key", [f"{Q_PROJ}.slices", f"{Q_PROJ}.router.energy", "mobiquant.table.0.quantiles"])
    def test_no_tensor(self, copy: Path, key: str) -> None:
        edit_tensors(copy, {key: None})
        with pytest.raises(CheckpointMissing, match=f"tensor {key}"):
            checkpoint.load(copy)

    def test_model_that_is_not_of_transformers(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Linear(64, 64))
        mq.quantize_(model)
        with pytest.raises(CheckpointMissing, match="use load_into"):
            checkpoint.load(checkpoint.save(model, tmp_path / "c"))


class TestCorrupt:
    def test_truncated_shard(self, copy: Path) -> None:
        path = copy / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors cannot be read"):
            checkpoint.load(copy)

    def test_garbage_instead_of_a_shard(self, copy: Path) -> None:
        (copy / "model.safetensors").write_bytes(b"\x80\x04pickle" * 100)
        with pytest.raises(CheckpointCorrupt, match=r"model\.safetensors"):
            checkpoint.load(copy)

    @pytest.mark.parametrize("text", ["{", "[]", ""])
    def test_config_that_is_not_json(self, copy: Path, text: str) -> None:
        (copy / "config.json").write_text(text)
        with pytest.raises(CheckpointCorrupt, match=r"config\.json"):
            checkpoint.load(copy)

    def test_index_without_a_map(self, copy: Path) -> None:
        (copy / files.INDEX).write_text("{}")
        with pytest.raises(CheckpointCorrupt, match="no weight_map"):
            checkpoint.load(copy)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({f"linears/{Q_PROJ}/group": 100}, "group"),
            ({f"linears/{Q_PROJ}/widths": [2, 9]}, "widths"),
            ({f"linears/{Q_PROJ}/in_features": -64}, "in_features"),
            ({f"linears/{Q_PROJ}/scale_dtype": "int4"}, "scale_dtype"),
            ({f"linears/{Q_PROJ}/colour": "red"}, "colour"),
            ({"states/0/routers/0/kind": "astrology"}, "astrology"),
            ({"states/0/routers/0/floor": 9}, "floor"),
            ({"states/0/routers/0/ceiling": 9}, "ceiling 9"),
            ({"states/0/routers/0/linears": [Q_PROJ]}, "do not name the same layers"),
            ({"states/0/table": "oracle"}, "oracle"),
            ({"states/0/budget": "lots"}, "lots"),
            ({"format_version": None}, "format_version"),
            ({"linears": {}}, "do not name the same layers"),
        ],
    )
    def test_config_that_makes_no_sense(self, copy: Path, change: dict, words: str) -> None:
        edit_config(copy, change)
        with pytest.raises(CheckpointCorrupt, match=words):
            checkpoint.load(copy)

    def test_unknown_architecture(self, copy: Path) -> None:
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"model_type": "llamma"}))
        with pytest.raises(CheckpointCorrupt, match="llamma"):
            checkpoint.load(copy)


class TestTensors:
    @pytest.mark.parametrize(
        ("name", "change", "words"),
        [
            (f"{Q_PROJ}.slices", lambda t: t[:4], r"slices has shape \(4, 64, 2\); wanted \(8, 64, 2\)"),
            (f"{Q_PROJ}.slices", lambda t: t.long(), "slices has dtype torch.int64"),
            (f"{Q_PROJ}.scale", lambda t: t.float(), "scale has dtype torch.float32"),
            (f"{Q_PROJ}.scale", lambda t: t * torch.nan, "scale has values"),
            (f"{Q_PROJ}.scale", lambda t: -t, "scale has values"),
            (f"{Q_PROJ}.zero", lambda t: t + torch.inf, "zero has values"),
            (f"{Q_PROJ}.router.energy", lambda t: t[:-1], "energy has shape"),
            (f"{Q_PROJ}.router.energy", lambda t: t / 0, "energy has values"),
            ("mobiquant.table.0.quantiles", lambda t: t[:, :-1], "quantiles has shape"),
            ("mobiquant.table.0.quantiles", lambda t: t.flip(-1), "quantiles has values"),
            ("mobiquant.table.0.anchors", lambda t: t.flip(-1), "anchors has values"),
            ("model.norm.weight", lambda t: t[:-1], "norm.weight has shape"),
            ("model.norm.weight", lambda t: t.to(torch.int8), "norm.weight has dtype torch.int8"),
        ],
    )
    def test_damage_names_tensor_and_file(self, copy: Path, name: str, change, words: str) -> None:
        edit_tensors(copy, {name: change(stored(copy, name))})
        with pytest.raises(CheckpointTensor, match=words) as info:
            checkpoint.load(copy)
        assert str(copy / "model.safetensors") in str(info.value)

    def test_scales_that_no_load_takes_have_no_range(self, copy: Path) -> None:
        name = f"{Q_PROJ}.scale"
        edit_tensors(copy, {name: stored(copy, name) * torch.nan})
        with pytest.raises(CheckpointTensor, match="scale has values"):
            summarize(copy)

    def test_dtype_that_nothing_of_ours_has(self, copy: Path) -> None:
        edit_tensors(copy, {"model.norm.weight": torch.zeros(64, dtype=torch.uint16)})
        with pytest.raises(CheckpointTensor, match="U16"):
            checkpoint.load(copy)


class TestOtherModels:
    def test_newer_format(self, copy: Path) -> None:
        edit_config(copy, {"format_version": 3})
        with pytest.raises(CheckpointTooNew, match="version 3 is newer"):
            checkpoint.load(copy)

    @pytest.mark.parametrize("ours", [{"quant_method": "gptq", "bits": 4}, None])
    def test_foreign(self, copy: Path, ours: dict | None) -> None:
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"quantization_config": ours}))
        with pytest.raises(CheckpointForeign, match=f"quant_method is {(ours or {}).get('quant_method')!r}"):
            checkpoint.load(copy)
        assert not checkpoint.is_checkpoint(copy)

    @pytest.mark.parametrize(
        ("other", "words"),
        [
            (lambda: tiny_llama(layers=1), "has no layer model.layers.1"),
            (lambda: tiny_llama(layers=3), "the model has tensors that it has not"),
            (lambda: tiny_llama(hidden=128), "got a linear of 128 x 128, wanted a linear of 64 x 64"),
            (lambda: nn.ModuleDict({"model": nn.Identity()}), "has no layer"),
        ],
    )
    def test_wrong_model_is_refused_and_left_alone(self, saved: Path, other, words: str) -> None:
        model = other()
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(CheckpointMismatch, match=words):
            checkpoint.load_into(model, saved)
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(t, model.state_dict()[name]) for name, t in before.items())

    def test_tensor_that_the_model_has_not(self, copy: Path) -> None:
        edit_tensors(copy, {"model.layers.0.mlp.extra": torch.zeros(3)})
        with pytest.raises(CheckpointMismatch, match=r"1, as model\.layers\.0\.mlp\.extra"):
            checkpoint.load(copy)

    def test_budget_that_the_routers_do_not_allow(self, copy: Path) -> None:
        edit_config(copy, {"states/0/budget": 11})
        with pytest.raises(CheckpointMismatch, match="budget in force is impossible; got 11"):
            checkpoint.load(copy)

    def test_dtype_to_cast_to(self, saved: Path) -> None:
        with pytest.raises(BadOption, match="dtype"):
            checkpoint.load(saved, dtype=torch.int8)
