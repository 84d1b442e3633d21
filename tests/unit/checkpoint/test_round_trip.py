"""What is saved comes back to the bit, and saving never costs what was there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

import mobiquant_compiler as mq
from mobiquant_compiler import checkpoint
from mobiquant_compiler.checkpoint import files
from mobiquant_compiler.errors import (
    CheckpointInTheWay,
    CheckpointMismatch,
    CheckpointTensor,
    NotElastic,
    WeightNotInCheckpoint,
)
from mobiquant_compiler.linear import MobiLinear, elastic_linears
from mobiquant_compiler.quantize import fingerprint
from mobiquant_compiler.runtime.budget import CalibratedTable, StaticTable
from tests.checkpoint_cases import Q_PROJ, TOKENS, edit_tensors, stored, tiny_llama


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
