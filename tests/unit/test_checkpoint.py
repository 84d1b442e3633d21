"""Checkpoints: what is saved comes back to the bit, and every kind of damage has its own error."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import mobiquant_compiler as mq
from mobiquant_compiler import checkpoint
from mobiquant_compiler.checkpoint import files
from mobiquant_compiler.errors import (
    BadOption,
    CheckpointCorrupt,
    CheckpointForeign,
    CheckpointInTheWay,
    CheckpointMismatch,
    CheckpointMissing,
    CheckpointTensor,
    CheckpointTooNew,
    NotElastic,
    WeightNotInCheckpoint,
)
from mobiquant_compiler.linear import MobiLinear, elastic_linears
from mobiquant_compiler.quantize import fingerprint
from mobiquant_compiler.runtime.budget import CalibratedTable, StaticTable

TOKENS = torch.arange(64).view(4, 16) * 7 % 97
Q_PROJ = "model.layers.0.self_attn.q_proj"


def tiny_llama(layers: int = 2, hidden: int = 64, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    model = tiny_llama()
    mq.quantize_(model, mq.SliceConfig(group=32, floor={"*.down_proj": 2}), calibration=TOKENS, budget=4.5)
    return model


@pytest.fixture(scope="module")
def saved(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.save(model, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit_config(directory: Path, change: dict) -> None:
    """Change fields of quantization_config, by dotted path."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for dotted, value in change.items():
        *parents, last = dotted.split("/")
        target = config["quantization_config"]
        for key in parents:
            target = target[int(key) if isinstance(target, list) else key]
        target[last] = value
    path.write_text(json.dumps(config))


def edit_tensors(directory: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors of the one shard; None takes one out."""
    path = directory / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(path).items()} | change
    save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, path, {"format": "pt"})


def stored(directory: Path, name: str) -> torch.Tensor:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return file.get_tensor(name)


class TestRoundTrip:
    def test_outputs_and_budget_come_back_exactly(self, model: LlamaForCausalLM, saved: Path) -> None:
        loaded = checkpoint.load(saved)
        assert not loaded.training
        assert mq.get_budget(loaded) == 4.5
        for bits in (4.5, 3.0, 7.25):
            with torch.no_grad(), mq.budget(model, bits), mq.budget(loaded, bits):
                assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)

    def test_every_linear_comes_back_with_its_limits_and_fingerprint(
        self, model: LlamaForCausalLM, saved: Path
    ) -> None:
        ours, theirs = elastic_linears(checkpoint.load(saved)), elastic_linears(model)
        assert list(ours) == list(theirs)
        for name, linear in ours.items():
            assert (linear.spec, linear.fingerprint) == (theirs[name].spec, theirs[name].fingerprint)
            assert (linear.router.floor, linear.router.params) == (
                theirs[name].router.floor,
                theirs[name].router.params,
            )
        assert ours["model.layers.0.mlp.down_proj"].router.floor == 2
        assert isinstance(ours[Q_PROJ].router.state.table, CalibratedTable)

    def test_shared_routers_stay_shared_and_are_stored_once(self, saved: Path) -> None:
        loaded = elastic_linears(checkpoint.load(saved))
        assert loaded[Q_PROJ].router is loaded[Q_PROJ.replace("q_proj", "v_proj")].router
        names = load_file(saved / "model.safetensors").keys()
        assert sum(name.endswith("router.energy") for name in names) == 8  # qkv, o, gate+up, down in two layers

    def test_tied_weights_are_stored_once_and_tied_again(self, saved: Path) -> None:
        assert "lm_head.weight" not in load_file(saved / "model.safetensors")
        loaded = checkpoint.load(saved)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight

    def test_static_table_and_scope_linear(self, tmp_path: Path) -> None:
        model = tiny_llama()
        mq.quantize_(model, mq.SliceConfig(scope="linear", layout="bit_major", widths=(2, 3, 3)), budget=5)
        loaded = checkpoint.load(checkpoint.save(model, tmp_path / "c"))
        assert isinstance(elastic_linears(loaded)[Q_PROJ].router.state.table, StaticTable)
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)

    def test_many_shards(self, model: LlamaForCausalLM, tmp_path: Path) -> None:
        path = checkpoint.save(model, tmp_path / "c", shard_bytes=20_000)
        shards = sorted(path.glob("*.safetensors"))
        assert len(shards) > 3
        assert all(shard.stat().st_size < 60_000 for shard in shards)
        assert torch.equal(checkpoint.load(path)(TOKENS).logits, model(TOKENS).logits)

    def test_dtype_casts_parameters_but_neither_slices_nor_rotary_tables(self, saved: Path) -> None:
        loaded = checkpoint.load(saved, dtype=torch.bfloat16)
        linear = elastic_linears(loaded)[Q_PROJ]
        assert (loaded.dtype, linear.weight.dtype, linear.scale.dtype) == (
            torch.bfloat16,
            torch.bfloat16,
            torch.float16,
        )
        assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
        assert loaded(TOKENS).logits.dtype == torch.bfloat16

    def test_compiled_wrapper_is_saved_under_plain_names(self, model: LlamaForCausalLM, tmp_path: Path) -> None:
        wrapped = nn.ModuleDict({"inner": torch.compile(model, backend="eager")})
        path = checkpoint.save(wrapped, tmp_path / "c")
        assert not any("_orig_mod" in name for name in load_file(path / "model.safetensors"))
        fresh = checkpoint.load_into(nn.ModuleDict({"inner": tiny_llama()}), path)
        assert torch.equal(fresh["inner"](TOKENS).logits, model(TOKENS).logits)

    def test_bias_buffers_and_a_linear_with_two_names(self, tmp_path: Path) -> None:
        def build(linear: nn.Module) -> nn.ModuleDict:
            return nn.ModuleDict({"a": linear, "b": linear, "norm": nn.BatchNorm1d(32)})

        torch.manual_seed(3)
        plain, x = nn.Linear(64, 32), torch.randn(3, 64)
        model = build(MobiLinear.from_weight(plain.weight, plain.bias, mq.SliceSpec(group=32)))
        model["norm"](model["a"](x))  # counts a batch
        loaded = checkpoint.load_into(build(nn.Linear(64, 32)), checkpoint.save(model, tmp_path / "c"))
        assert loaded["a"] is loaded["b"]
        assert torch.equal(loaded["b"](x), model["b"](x))
        assert loaded["norm"].num_batches_tracked == 1

    def test_conv1d_and_unquantized_dtype(self, tmp_path: Path) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        config = GPT2Config(vocab_size=97, n_embd=64, n_layer=1, n_head=4, n_positions=32)
        model = GPT2LMHeadModel(config).eval()
        mq.quantize_(model, calibration=TOKENS[:2])
        loaded = checkpoint.load(checkpoint.save(model, tmp_path / "c"))
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


class TestMemory:
    def test_load_never_makes_a_full_precision_weight(self, tmp_path: Path) -> None:
        """No tensor as large as a linear's weight is created with memory while loading."""
        from torch.utils._python_dispatch import TorchDispatchMode

        model = tiny_llama(layers=1, hidden=256)
        mq.quantize_(model)
        path = checkpoint.save(model, tmp_path / "c")
        largest = [0]

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                if isinstance(out, torch.Tensor) and not out.is_meta and out.is_floating_point():
                    largest[0] = max(largest[0], out.untyped_storage().nbytes())
                return out

        with Watch():
            checkpoint.load(path)
        embedding = 97 * 256 * 4
        assert 0 < largest[0] <= embedding
        assert embedding < 256 * 256 * 4


class TestReadLinears:
    def test_finds_a_linear_by_its_original_weight(self, model: LlamaForCausalLM, saved: Path) -> None:
        makers = checkpoint.read_linears(saved)
        plain = tiny_llama().get_submodule(Q_PROJ)
        linear = makers[fingerprint(plain.weight)]()
        assert isinstance(linear, MobiLinear)
        x = torch.randn(5, 64)
        with torch.no_grad():
            assert torch.equal(linear(x), model.get_submodule(Q_PROJ)(x))

    def test_makers_share_routers_and_budget(self, saved: Path) -> None:
        made = [make() for make in checkpoint.read_linears(saved).values()]
        assert len({id(linear.router.state) for linear in made}) == 1
        assert made[0].router.state.budget == 4.5

    def test_damage_shows_when_a_linear_is_made(self, copy: Path) -> None:
        edit_tensors(copy, {f"{Q_PROJ}.scale": torch.full_like(stored(copy, f"{Q_PROJ}.scale"), torch.inf)})
        makers = checkpoint.read_linears(copy)
        with pytest.raises(CheckpointTensor, match=f"{Q_PROJ}.scale has values"):
            makers[fingerprint(tiny_llama().get_submodule(Q_PROJ).weight)]()


class TestWeightSource:
    """What the backend asks when a plain model is compiled with ``options={"checkpoint": ...}``."""

    def test_gives_the_slices_of_a_known_weight(self, model: LlamaForCausalLM, saved: Path) -> None:
        weight = tiny_llama().get_submodule(Q_PROJ).weight
        linear = checkpoint.weight_source(saved)(weight, mq.SliceSpec(group=32), Q_PROJ)
        assert torch.equal(linear.slices, model.get_submodule(Q_PROJ).slices)

    def test_refuses_other_weights_by_name(self, saved: Path) -> None:
        with pytest.raises(WeightNotInCheckpoint, match=r"weight h\.0 \(64 x 64\) matches no linear"):
            checkpoint.weight_source(saved)(torch.randn(64, 64), mq.SliceSpec(group=32), "h.0")

    def test_refuses_another_slicing(self, saved: Path) -> None:
        weight = tiny_llama().get_submodule(Q_PROJ).weight
        with pytest.raises(CheckpointMismatch, match="sliced otherwise"):
            checkpoint.weight_source(saved)(weight, mq.SliceSpec(group=64), Q_PROJ)


class TestWriting:
    def test_replaces_an_older_checkpoint_and_keeps_what_a_user_added(
        self, copy: Path, model: LlamaForCausalLM
    ) -> None:
        (copy / "NOTES.md").write_text("mine")
        (copy / "model-00007-of-00009.safetensors").write_text("stale")
        with mq.budget(model, 3.5):
            checkpoint.save(model, copy)
        assert mq.get_budget(checkpoint.load(copy)) == 3.5
        assert (copy / "NOTES.md").read_text() == "mine"
        assert not list(copy.glob("model-*"))

    def test_failure_leaves_the_older_checkpoint(self, copy: Path, model: LlamaForCausalLM, monkeypatch) -> None:
        def broken(*args: object) -> None:
            raise OSError("no space left on device")

        before = (copy / "model.safetensors").read_bytes()
        monkeypatch.setattr(files, "save_file", broken)
        with pytest.raises(OSError, match="no space"):
            checkpoint.save(model, copy)
        assert (copy / "model.safetensors").read_bytes() == before
        assert os.listdir(copy.parent) == ["copy"]

    def test_failed_swap_puts_the_older_checkpoint_back(self, copy: Path, model: LlamaForCausalLM, monkeypatch) -> None:
        rename = Path.rename

        def broken(self: Path, target: Path) -> Path:
            if target == copy and not self.name.endswith(".old"):
                raise OSError("busy")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", broken)
        with pytest.raises(OSError, match="busy"):
            checkpoint.save(model, copy)
        monkeypatch.undo()
        assert mq.get_budget(checkpoint.load(copy)) == 4.5
        assert os.listdir(copy.parent) == ["copy"]

    def test_never_overwrites_another_kind_of_directory(self, tmp_path: Path, model: LlamaForCausalLM) -> None:
        (tmp_path / "thesis.tex").write_text("dear")
        with pytest.raises(CheckpointInTheWay, match=r"thesis\.tex"):
            checkpoint.save(model, tmp_path)
        assert (tmp_path / "thesis.tex").read_text() == "dear"

    def test_plain_model(self, tmp_path: Path) -> None:
        with pytest.raises(NotElastic, match="save: LlamaForCausalLM has no elastic linear"):
            checkpoint.save(tiny_llama(1), tmp_path / "c")
        assert not (tmp_path / "c").exists()

    def test_part_of_a_model(self, model: LlamaForCausalLM, tmp_path: Path) -> None:
        with pytest.raises(CheckpointMismatch, match="part of a model"):
            checkpoint.save(model.model.layers[0], tmp_path / "c")

    def test_files_are_readable_by_others_where_config_is(self, saved: Path) -> None:
        assert (saved / "model.safetensors").stat().st_mode == (saved / "config.json").stat().st_mode


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

    def test_dtype_that_nothing_of_ours_has(self, copy: Path) -> None:
        edit_tensors(copy, {"model.norm.weight": torch.zeros(64, dtype=torch.uint16)})
        with pytest.raises(CheckpointTensor, match="U16"):
            checkpoint.load(copy)


class TestOtherModels:
    def test_newer_format(self, copy: Path) -> None:
        edit_config(copy, {"format_version": 2})
        with pytest.raises(CheckpointTooNew, match="version 2 is newer"):
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
