"""The rate of a run that gives none, for users of TRL's trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, ViTConfig, ViTForImageClassification

import paca
from expert_models import mixtral
from models import llama
from paca.pretrained.location import locate
from paca.pretrained.quantizing import quantized_linear
from paca.pretrained.weight_size import size_of_loaded, weight_size
from paca.training.config.learning_rate import automatic_rate
from paca.training.trainers import trainer_kind


def test_it_is_that_of_paca_train(tmp_path: Path) -> None:
    weight = torch.full((64, 64), 0.5)
    save_file({"model.layers.0.self_attn.q_proj.weight": weight}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    for settings in ({"r": 8, "paca_alpha": 8}, {"r": 64}):
        rate = paca.learning_rate(tmp_path, paca.PacaConfig(**settings))
        assert rate == automatic_rate(trainer_kind({}), "paca", settings, 0.5)[0]
    assert paca.learning_rate(tmp_path, paca.PacaConfig(r=8, paca_alpha=8)) == 0.025  # 0.4 × 0.5 / 8
    as_of_lora = paca.learning_rate(tmp_path, peft.LoraConfig(r=4, lora_alpha=8))
    assert paca.learning_rate(tmp_path, paca.PacaConfig(r=8, paca_alpha=8), factor_rank=4) == as_of_lora
    with pytest.raises(ValueError, match="factor_rank is PaCA's"):
        paca.learning_rate(tmp_path, peft.LoraConfig(), factor_rank=4)
    for settings in ({"r": 16, "lora_alpha": 32}, {"r": 16, "lora_alpha": 32, "use_rslora": True}):
        rate = paca.learning_rate(tmp_path, peft.LoraConfig(**settings))
        assert rate == automatic_rate(trainer_kind({}), "lora", settings, 0.5)[0]
    for other in ({"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_alpha": 0}):
        with pytest.raises(ValueError, match="not plain LoRA"):
            paca.learning_rate(tmp_path, peft.LoraConfig(**other))
    assert paca.learning_rate(tmp_path, peft.LoraConfig(r=16, lora_alpha=32)) == 0.0022  # 0.025 × √8 / 32


@pytest.mark.parametrize("trainer", ["sft", "dpo", "grpo", "reward", "classification", "image_classification"])
def test_each_trainer_has_its_own(trainer: str, tmp_path: Path) -> None:
    weight = torch.full((64, 64), 0.5)
    save_file({"model.layers.0.self_attn.q_proj.weight": weight}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    kind = trainer_kind({"trainer": trainer})
    for config, method in ((paca.PacaConfig(), "paca"), (peft.LoraConfig(), "lora")):
        assert paca.learning_rate(tmp_path, config, trainer=trainer) == automatic_rate(kind, method, {}, 0.5)[0]
    of_factors = paca.learning_rate(tmp_path, paca.PacaConfig(), factor_rank=4, trainer=trainer)
    assert of_factors == automatic_rate(kind, "paca", {}, 0.5, 4)[0]


def test_a_model_of_images_has_that_of_images(tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32)
    model = ViTForImageClassification(config)
    model.save_pretrained(tmp_path)
    expected = automatic_rate(trainer_kind({"trainer": "image_classification"}), "paca", {}, size_of_loaded(model))[0]
    assert paca.learning_rate(tmp_path, paca.PacaConfig()) == expected
    adapted: Any = peft.get_peft_model(model, paca.PacaConfig(r=2))
    assert paca.learning_rate(adapted, paca.PacaConfig()) == expected
    assert paca.learning_rate(tmp_path, paca.PacaConfig(), trainer="sft") == pytest.approx(expected / 3, rel=0.05)


def test_a_trainer_that_there_is_not_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no trainer 'image_clasification'; there are sft, .*Did you mean 'image_cl"):
        paca.learning_rate(tmp_path, paca.PacaConfig(), trainer="image_clasification")


def test_a_loaded_model_has_the_rate_of_its_files(tmp_path: Path) -> None:
    llama(hidden_size=64, num_hidden_layers=6, intermediate_size=160, dtype=torch.bfloat16).save_pretrained(tmp_path)
    config = paca.PacaConfig()
    expected = paca.learning_rate(tmp_path, config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert size_of_loaded(model) == pytest.approx(weight_size(locate(str(tmp_path))), rel=1e-6)  # summed in one order
    assert paca.learning_rate(model, config) == expected
    nn.init.ones_(model.model.layers[3].mlp.up_proj.weight)  # the values in memory count, not those of the files
    assert paca.learning_rate(model, config) != expected


@pytest.mark.parametrize("method", ["paca", "lora"])
def test_weights_of_adapters_do_not_count(method: str) -> None:
    model: Any = llama(hidden_size=64, intermediate_size=96)
    expected = size_of_loaded(model)
    if method == "paca":
        settings: Any = paca.PacaConfig(r=32, target_modules=["q_proj", "down_proj"], modules_to_save=["up_proj"])
    else:
        settings = peft.LoraConfig(r=32, target_modules=["q_proj", "down_proj"], modules_to_save=["up_proj"])
    adapted = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad and parameter.dtype.is_floating_point:
                parameter.fill_(9.0)
    assert size_of_loaded(adapted) == size_of_loaded(nn.Sequential(adapted)) == pytest.approx(expected)


def test_experts_count_in_memory_and_in_files(tmp_path: Path) -> None:
    model = mixtral()
    model.save_pretrained(tmp_path)  # each expert by itself, gate and up apart
    assert size_of_loaded(model) == pytest.approx(weight_size(locate(str(tmp_path))), rel=0.1)
    kept = {f"model.layers.{n}.mlp.experts.gate_up_proj": torch.full((4, 96, 64), 0.5) for n in range(2)}
    save_file(kept, tmp_path / "model.safetensors")
    assert weight_size(locate(str(tmp_path))) == 0.5


def test_a_loaded_model_without_plain_weights_is_told() -> None:
    pytest.importorskip("bitsandbytes")
    quantized = nn.Sequential(quantized_linear(nn.Linear(64, 64), "nf4"), quantized_linear(nn.Linear(64, 64), "int8"))
    for model in (llama().to("meta"), nn.LayerNorm(64), quantized):
        with pytest.warns(UserWarning, match=rf"the loaded {type(model).__name__} can't be read. 0\.03 is assumed"):
            paca.learning_rate(model, paca.PacaConfig())


def test_what_is_neither_a_name_nor_a_model_is_refused() -> None:
    given: Any = {"model": "llama"}
    with pytest.raises(TypeError, match=r"is a dict; expected a folder, a \.gguf file or a hub id, or a loaded model"):
        paca.learning_rate(given, paca.PacaConfig())


def test_a_model_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(paca.PacaError, match="No model at"):
        paca.learning_rate(tmp_path / "none", paca.PacaConfig())


def test_a_misspelt_folder_is_no_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "my-models" / "llama").mkdir(parents=True)
    (tmp_path / "my-models" / "llama" / "config.json").write_text("{}")
    with pytest.raises(paca.PacaError, match=r"no file or folder .*Did you mean 'my-models/llama'\?.*hf download"):
        paca.learning_rate("my-models/lama", paca.PacaConfig())


def test_a_size_that_is_assumed_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"can't be read. 0\.03 is assumed"):
        paca.learning_rate(tmp_path, paca.PacaConfig())
