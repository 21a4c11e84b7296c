"""What PEFT's own PaCA (>= 0.22, here a stand-in) makes of our adapters, and the form that it takes."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import paca
import pefts_own_paca
from convert.saved_adapters import logits, save_adapted
from expert_models import mixtral
from models import adapt, adapted_perceptron, gpt2, llama, tokens
from paca.convert.adapter import AdaptedLayer, Adapter, adapter_in_model
from paca.convert.exported import export_adapter
from paca.convert.pefts_paca import saved_layers, to_pefts_paca, why_not, write_pefts_paca
from paca.messages.errors import PacaError

TARGETS = {"target_modules": ["q_proj", "down_proj", "up_proj"]}
UNEVEN = {"r": 3, "rank_pattern": {"layers.1.self_attn.q_proj": 5, "down_proj": 1}, **TARGETS}
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {"r": 4, "paca_alpha": 8, **TARGETS},
    "uneven ranks": {**UNEVEN, "paca_alpha": 3},
    "uneven scales": {"r": 4, "paca_alpha": 8, "alpha_pattern": {"down_proj": 2}, **TARGETS},
    "both, no powers of two": {**UNEVEN, "paca_alpha": 7, "alpha_pattern": {"down_proj": 2.5}},
    "columns by hand": {"r": 4, "paca_alpha": 8, "indices": {"q_proj": [1, 2], "down_proj": [0, 5, 9]}, **TARGETS},
    "every column": {"r": 32, "paca_alpha": 32, "target_modules": ["q_proj", "up_proj"]},
    "one block": {"r": 4, "paca_alpha": 4, "layers_to_transform": [1], **TARGETS},
}


def answer(folder: Path) -> str | None:
    """What the card says, for the model and the config that are in `folder`."""
    model = peft.PeftModel.from_pretrained(llama(), str(folder))
    config = json.loads((folder / "adapter_config.json").read_text())
    return why_not(config, saved_layers(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_the_exported_adapter_gives_the_same_outputs_there(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    base = llama(initializer_range=0.15).to(dtype)
    adapted = save_adapted(tmp_path, base, **SETTINGS[name])
    expected = logits(adapted, tokens())
    export_adapter(tmp_path / "adapter", tmp_path / "theirs", "peft")
    there = logits(pefts_own_paca.load(llama(initializer_range=0.15).to(dtype), tmp_path / "theirs"), tokens())
    ours = peft.PeftModel.from_pretrained(llama(initializer_range=0.15).to(dtype), str(tmp_path / "theirs")).eval()
    assert torch.equal(logits(ours, tokens()), there)
    scales = {layer.scale for layer in adapter_in_model(adapted).layers.values()}
    if all((torch.tensor(scale).log2() % 1) == 0 for scale in scales):
        assert torch.equal(there, expected)
    else:
        assert (there - expected).abs().max() <= 32 * torch.finfo(dtype).eps * expected.abs().max()
    assert (there - logits(llama(initializer_range=0.15).to(dtype), tokens())).abs().max() > 0.1


@pytest.mark.parametrize("name", list(SETTINGS))
def test_the_card_says_yes_exactly_where_the_adapter_loads_there_as_it_is(tmp_path: Path, name: str) -> None:
    expected = logits(save_adapted(tmp_path, llama(), **SETTINGS[name]), tokens())
    found = None
    with pytest.warns(UserWarning, match="are ignored"), suppress(RuntimeError):  # "size mismatch"
        found = logits(pefts_own_paca.load(llama(), tmp_path / "adapter"), tokens())
    loads = found is not None and torch.equal(found, expected)
    reason = answer(tmp_path / "adapter")
    assert (reason is None) == loads == (name in ("as it is", "every column", "one block"))
    if name == "columns by hand":
        assert reason == "model.layers.0.self_attn.q_proj has 2 columns, and it gives all layers r=4"
    if name == "uneven scales":
        assert reason == "model.layers.0.mlp.down_proj has the scale 0.5, and it gives all layers 2"
    export_adapter(tmp_path / "adapter", tmp_path / "theirs", "peft")
    assert answer(tmp_path / "theirs") is None


def test_the_settings_are_those_that_it_knows(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    save_adapted(tmp_path, llama(), **UNEVEN, modules_to_save=["lm_head"], revision="v2")
    (tmp_path / "adapter/tokenizer.json").write_text("{}")
    export_adapter(tmp_path / "adapter", tmp_path / "theirs", "peft")
    recwarn.clear()
    config = pefts_own_paca.read_config(tmp_path / "theirs")
    assert not recwarn.list
    assert (config.r, config.paca_alpha, config.random_seed, config.revision) == (5, 5, None, "v2")
    assert config.target_modules == ["down_proj", "q_proj", "up_proj"]
    assert config.modules_to_save == ["lm_head"]
    assert (tmp_path / "theirs/tokenizer.json").is_file()
    before, after = (load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("adapter", "theirs"))
    assert torch.equal(before["base_model.model.lm_head.weight"], after["base_model.model.lm_head.weight"])


def test_an_adapter_of_the_untied_output_layer_loads_there(tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=True)
    assert paca.untie_embeddings(base)
    adapted = save_adapted(tmp_path, base, target_modules=["lm_head", "q_proj"])
    assert why_not({"r": 3, "paca_alpha": 6}, saved_layers(adapted)) is None
    there = pefts_own_paca.load(llama(tie_word_embeddings=True), tmp_path / "adapter")
    assert torch.equal(logits(there, tokens()), logits(adapted, tokens()))


def test_a_rotated_adapter_loads_there_as_the_union_of_its_columns(tmp_path: Path) -> None:
    adapted = save_adapted(tmp_path, llama(), r=4, paca_alpha=4, selection="random_blocks", **TARGETS)
    paca.rotate(adapted, None, 1)
    adapted.save_pretrained(tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert stored["r"] == 8
    assert why_not(stored, saved_layers(adapted)) is None
    expected = logits(peft.PeftModel.from_pretrained(llama(), str(tmp_path / "adapter")).eval(), tokens())
    assert torch.equal(logits(pefts_own_paca.load(llama(), tmp_path / "adapter"), tokens()), expected)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Embedding])
def test_a_layer_that_it_cannot_adapt_is_refused_by_name(kind: type[nn.Module]) -> None:
    layer = AdaptedLayer(torch.zeros(4, 2), torch.arange(2), 1.0, 8, kind)
    adapter = Adapter(paca.PacaConfig(target_modules=["stem"]), {"a.stem": layer}, {}, {"a.stem"}, None)
    with pytest.raises(PacaError, match=rf"a\.stem is a {kind.__name__}, which PEFT >= 0\.22 can't adapt.*--to merged"):
        to_pefts_paca(adapter)


@pytest.mark.parametrize(
    ("base", "settings", "name"),
    [
        (gpt2, {"target_modules": ["c_attn"]}, "transformer.h.0.attn.c_attn is a Conv1D"),
        (llama, {"target_modules": ["embed_tokens"]}, "model.embed_tokens is a Embedding"),
        (
            mixtral,
            {"target_parameters": ["experts.gate_up_proj"]},
            "model.layers.0.mlp.experts.gate_up_proj is a ExpertStack",
        ),
    ],
)
def test_layers_that_are_no_linear_ones_are_named_as_the_reason(base: Any, settings: dict[str, Any], name: str) -> None:
    model = adapt(base(), **settings)
    assert why_not({"r": 3, "paca_alpha": 6}, saved_layers(model)) == f"{name}, and it adapts Linear layers only"
    with pytest.raises(PacaError, match=rf"{name}.*--to merged"):
        to_pefts_paca(adapter_in_model(model))


def test_a_layer_with_fewer_inputs_than_the_largest_rank_is_refused_by_name(tmp_path: Path) -> None:
    save_adapted(tmp_path, llama(), target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 40})
    with pytest.raises(PacaError, match=r"q_proj has 32 input columns, but another layer trains 40"):
        export_adapter(tmp_path / "adapter", tmp_path / "theirs", "peft")
    assert not (tmp_path / "theirs").exists()


def test_the_quantization_it_was_made_for_is_kept(tmp_path: Path) -> None:
    save_adapted(tmp_path, llama(), **TARGETS)
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_quantization": "nf4"}))
    export_adapter(tmp_path / "adapter", tmp_path / "theirs", "peft")
    with pytest.warns(UserWarning, match="base_quantization"):
        pefts_own_paca.load(llama(), tmp_path / "theirs")
    with pytest.warns(UserWarning, match="made for weights quantized as 'nf4'"):
        peft.PeftModel.from_pretrained(llama(), str(tmp_path / "theirs"))


def test_its_card_says_what_loads_it_and_that_every_scale_is_one(tmp_path: Path) -> None:
    adapter = adapter_in_model(adapted_perceptron(r=2, rank_pattern={"lin1": 3}))
    write_pefts_paca(adapter, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "# PaCA adapter for its base model" in card
    assert "2 layers (lin1, lin2) of rank 3, each at scale 1" in card
    assert "PEFT >= 0.22 is enough" in card
    assert "lora" not in card.casefold()
