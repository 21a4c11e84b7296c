"""Columns of a quantized model that start from the original 16-bit values."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

import paca
from models import llama, tokens
from paca.layers import paca_layers
from paca.messages.errors import PacaError
from paca.tuner.original_weights import OriginalWeights

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(folder, max_shard_size="40KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def plain(checkpoint: Path):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)


def quantized(checkpoint: Path, **kwargs):
    settings = kwargs or {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**settings)
    ).train()


def start(checkpoint: Path, **settings):
    config = paca.PacaConfig(**{"r": 8, "paca_alpha": 16, "original_weights": str(checkpoint), **settings})
    return peft.get_peft_model(quantized(checkpoint), config)


def test_the_first_forward_pass_sees_the_original_columns_bitwise(checkpoint):
    model, original = start(checkpoint), plain(checkpoint)
    for name, layer in model.named_modules():
        if layer in paca_layers(model):
            idx = layer.paca_indices["default"]
            weight = layer.base_layer.patched_weight(torch.bfloat16, (layer.columns_of("default"),))
            stored = original.get_submodule(name.removeprefix("base_model.model.")).weight
            assert torch.equal(weight[:, idx], stored[:, idx])
            assert not torch.equal(layer.base_columns(idx).to(stored), stored[:, idx])


def test_with_every_column_the_model_is_the_original_one(checkpoint):
    model = start(checkpoint, r=64, rank_pattern={"down_proj": 128})
    want = plain(checkpoint)(tokens()).logits.detach()
    found = model(tokens()).logits.detach()
    with model.disable_adapter():
        without = model(tokens()).logits.detach()
    torch.testing.assert_close(found, want, rtol=0.02, atol=0.02)
    assert (found - want).norm() < 0.1 * (without - want).norm()


def test_the_saved_adapter_stands_alone(checkpoint, tmp_path):
    model = start(checkpoint)
    want = model(tokens()).logits
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["original_weights"] is None
    assert saved["base_quantization"] == "nf4 without double quantization"
    again = peft.PeftModel.from_pretrained(quantized(checkpoint), tmp_path).train()
    assert torch.equal(again(tokens()).logits, want)


def test_an_adapter_on_weights_of_another_quantization_warns(checkpoint, tmp_path):
    start(checkpoint).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="made for weights quantized as 'nf4 without double quantization'.*'int8'"):
        peft.PeftModel.from_pretrained(quantized(checkpoint, load_in_8bit=True), tmp_path)
    with pytest.warns(UserWarning, match="but those of this model are 'none'"):
        peft.PeftModel.from_pretrained(plain(checkpoint), tmp_path)


def test_a_resumed_second_adapter_may_have_its_own(checkpoint):
    model = start(checkpoint)
    model.add_adapter("second", paca.PacaConfig(r=4, random_seed=1, original_weights=str(checkpoint)))
    layer = paca_layers(model)[0]
    assert layer.paca_delta["second"].abs().max() > 0


def test_only_slices_are_read(checkpoint, monkeypatch):
    opened = []

    class Spy:
        def __init__(self, path, framework):
            from safetensors import safe_open

            self.file = safe_open(path, framework=framework)
            opened.append(Path(path).name)

        def keys(self):
            return self.file.keys()

        def get_slice(self, key):
            return self.file.get_slice(key)

    monkeypatch.setattr("paca.tuner.original_weights.safe_open", Spy)
    originals = OriginalWeights(str(checkpoint))
    columns = originals.columns("model.layers.1.mlp.up_proj", torch.tensor([3, 60]), (128, 64))
    assert torch.equal(columns, plain(checkpoint).model.layers[1].mlp.up_proj.weight[:, [3, 60]])
    assert len(opened) == 1  # of several shards


def test_names_with_more_or_fewer_parts_in_front_are_found(checkpoint):
    originals, idx = OriginalWeights(str(checkpoint)), torch.tensor([0])
    want = originals.columns("model.layers.0.mlp.up_proj", idx, (128, 64))
    for name in ("layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj"):
        assert torch.equal(originals.columns(name, idx, (128, 64)), want)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.7.mlp.up_proj", (128, 64), "no single weight for the layer model.layers.7.mlp.up_proj"),
        ("mlp.up_proj", (128, 64), "several"),
        ("model.layers.0.mlp.up_proj", (128, 32), r"has shape \(128, 64\), but the layer"),
    ],
)
def test_a_layer_that_the_checkpoint_lacks(checkpoint, name, shape, message):
    with pytest.raises(PacaError, match=message):
        OriginalWeights(str(checkpoint)).columns(name, torch.tensor([0]), shape)


def test_no_checkpoint_there(tmp_path):
    with pytest.raises(PacaError, match=r"neither model.safetensors.index.json nor model.safetensors"):
        OriginalWeights(str(tmp_path))
    with pytest.raises(PacaError, match=r"nor model\.safetensors in the local cache, and the hub can't be reached"):
        OriginalWeights("nobody/nothing")


def test_a_broken_and_a_missing_shard(checkpoint, tmp_path):
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    originals, name = OriginalWeights(str(tmp_path)), "model.layers.0.mlp.up_proj"
    shard = tmp_path / index["weight_map"][f"{name}.weight"]
    with pytest.raises(PacaError, match=f"not complete: {shard.name} is missing"):
        originals.columns(name, torch.tensor([0]), (128, 64))
    shard.write_bytes(b"not a tensor")
    with pytest.raises(PacaError, match="the file is broken"):
        originals.columns(name, torch.tensor([0]), (128, 64))


def test_another_models_weights_are_refused_and_the_model_left_as_it_was(checkpoint, tmp_path):
    llama(seed=5, hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(tmp_path)
    model = quantized(checkpoint)
    stock = type(model.model.layers[0].mlp.up_proj)
    with pytest.raises(ValueError, match=r"q_proj: the original columns differ.*not what was quantized"):
        peft.get_peft_model(model, paca.PacaConfig(original_weights=str(tmp_path)))
    assert type(model.model.layers[0].mlp.up_proj) is stock


def test_a_plain_model_needs_none(checkpoint):
    with pytest.raises(ValueError, match="none of the adapted layers is quantized"):
        peft.get_peft_model(plain(checkpoint), paca.PacaConfig(original_weights=str(checkpoint)))


@pytest.mark.parametrize("target", ["c_attn", "attn.c_proj", "c_fc"])
def test_a_conv1d_is_read_as_it_is_stored(target, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4, n_positions=64)
    original = GPT2LMHeadModel(config).to(torch.bfloat16)
    original.save_pretrained(tmp_path)
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantized, dtype=torch.bfloat16)
    settings = {"r": 16, "target_modules": [target], "original_weights": str(tmp_path), "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(base, paca.PacaConfig(**settings))
    (layer,) = paca_layers(model)
    (name,) = [n for n, m in model.get_base_model().named_modules() if m is layer]
    now = layer.base_layer.patched_weight(torch.bfloat16, (layer.columns_of("default"),))
    columns = layer.paca_indices["default"]
    assert torch.equal(now[:, columns], original.get_submodule(name).weight.T[:, columns])
