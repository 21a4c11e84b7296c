"""Models that answer in turn, and share their base model."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from paca.messages.errors import PacaError
from paca.pretrained.generation import LoadedModel, load_for_generation
from paca.pretrained.in_turn import ModelsInTurn
from tiny_checkpoint import byte_tokenizer, save_adapter, save_base

TOKENS = torch.arange(2, 26).reshape(2, 12)


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(input_ids=TOKENS).logits


@functools.cache
def alone(path: Path) -> tuple[torch.Tensor, torch.Tensor, str | None]:
    """What an adapter that is loaded alone computes, then what its base does; and its chat template."""
    loaded = load_for_generation(path)
    adapted = logits(loaded)
    with loaded.model.disable_adapter():
        return adapted, logits(loaded), loaded.tokenizer.chat_template


def plain_of(loaded: LoadedModel) -> object:
    return loaded.model.get_base_model() if loaded.adapter is not None else loaded.model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of one base model: three of PaCA, a LoRA, and a LoRA that changes biases of the model for good."""
    folder = tmp_path_factory.mktemp("adapters")
    base = save_base(folder / "model", attention_bias=True)
    for seed, name in enumerate(("one", "two", "three"), 1):
        save_adapter(folder / name, base, seed=seed)
    for name, bias in (("lora", "none"), ("biased", "all")):
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", bias=bias)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if key.endswith("bias"):
                    parameter.add_(1.0)
        adapted.save_pretrained(folder / name)
    byte_tokenizer(chat_template=None).save_pretrained(folder / "two")
    return folder


def test_adapters_of_one_base_share_it_and_answer_as_if_loaded_alone(folder: Path) -> None:
    models = ModelsInTurn()
    order = ("one", "two", "one", "lora", "two", "three", "one", "three")
    assert len({str(alone(folder / name)[0]) for name in order}) == 4
    shared = set()
    for name, other in zip(order, (*order[1:], "one"), strict=True):
        loaded = models.load(folder / name, beside=folder / other)
        adapted, plain, template = alone(folder / name)
        assert torch.equal(logits(loaded), adapted), name
        with loaded.model.disable_adapter():
            assert torch.equal(logits(loaded), plain), name
        assert loaded.adapter == folder / name
        assert loaded.tokenizer.chat_template == template
        assert not loaded.model.training
        shared.add(plain_of(loaded))
    assert len(shared) == 1


def test_two_adapters_of_one_method_lie_beside_each_other(folder: Path) -> None:
    models = ModelsInTurn()
    first = models.load(folder / "one", beside=folder / "two")
    assert models.load(folder / "two", beside=folder / "one").model is first.model
    assert list(first.model.peft_config) == ["default", "beside"]


def test_an_adapter_that_changes_the_base_for_good_has_one_of_its_own(folder: Path) -> None:
    models = ModelsInTurn()
    biased = models.load(folder / "biased", beside=folder / "one")
    one = models.load(folder / "one", beside=folder / "biased")
    assert plain_of(one) is not plain_of(biased)
    assert torch.equal(logits(one), alone(folder / "one")[0])


def test_what_neither_needs_is_dropped(folder: Path) -> None:
    models = ModelsInTurn()
    plain = models.load(folder / "model", beside=folder / "one")
    assert models.load(folder / "one", beside=folder / "model").model is not plain.model
    assert models.load(folder / "model", beside=folder / "one").model is plain.model
    assert torch.equal(logits(plain), logits(load_for_generation(folder / "model")))
    one = plain_of(models.load(folder / "one", beside=folder / "two"))
    assert models.load(folder / "model").model is not plain.model
    assert plain_of(models.load(folder / "one")) is not one


def test_a_broken_adapter_leaves_the_others_as_they_are(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder / "two", tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    models = ModelsInTurn()
    models.load(folder / "one", beside=broken)
    with pytest.raises(PacaError, match="is broken"):
        models.load(broken, beside=folder / "one")
    again = models.load(folder / "one", beside=tmp_path / "nowhere")
    assert torch.equal(logits(again), alone(folder / "one")[0])
