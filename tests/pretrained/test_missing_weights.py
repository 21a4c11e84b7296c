"""Weights that a checkpoint lacks: of a classifier, a pooler is trained and saved; a truncated trunk is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    MobileViTConfig,
    MobileViTForSemanticSegmentation,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from paca.convert.exported import export_adapter
from paca.convert.merged import merge_to_folder
from paca.messages.errors import PacaError
from paca.pretrained import load_pretrained
from paca.pretrained.generation import load_saved
from paca.pretrained.loading import modules_made_anew
from paca.training import describe, load_run_config, train
from tiny_checkpoint import byte_tokenizer, save_base


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bert` from masked-language pretraining, which has no pooler; `cut`, which lacks a layer; labelled texts."""
    folder = tmp_path_factory.mktemp("classifiers")
    torch.manual_seed(0)
    tokenizer: PreTrainedTokenizerFast = byte_tokenizer(chat_template=None)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0, **settings)
    BertForMaskedLM(bert).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    weights = load_file(save_base(folder / "cut") / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.1." not in name}
    save_file(kept, folder / "cut" / "model.safetensors", {"format": "pt"})
    rows = [{"text": f"{label} {number}", "label": label} for number in range(8) for label in ("good", "bad")]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_of(place: Path, folder: Path, model: str, method: str, *overrides: str):
    text = f"model: {{name: {place / model}}}\ndata: {{train: {place / 'labelled.jsonl'}}}\n{method}\n"
    text += "train: {trainer: classification, max_steps: 2, learning_rate: 1e-2, save_strategy: 'no'}\n"
    (folder / "run.yaml").write_text(text + f"output: {{dir: {folder / 'run'}}}\n")
    return load_run_config(folder / "run.yaml", overrides)


@pytest.mark.parametrize("method", ["paca: {r: 4}", "paca: {r: 4, target_modules: all-linear}", "lora: {r: 2}"])
def test_a_pooler_that_is_made_anew_is_trained_and_saved(place: Path, tmp_path: Path, method: str) -> None:
    config = config_of(place, tmp_path, "bert", method)
    assert dict(describe(config).lines())["trained whole"] == "bert.pooler, classifier"
    train(config, console=Console(quiet=True))
    logits = []
    for _ in range(2):  # each with another random start of what the base model's checkpoint lacks
        with torch.no_grad():
            logits.append(load_saved(tmp_path / "run").model(input_ids=torch.tensor([[3, 4, 5]])).logits)
    assert torch.equal(*logits)
    merge_to_folder(tmp_path / "run", tmp_path / "merged", verify=False)
    with torch.no_grad():
        merged = load_saved(tmp_path / "merged").model(input_ids=torch.tensor([[3, 4, 5]])).logits
    torch.testing.assert_close(merged, logits[0])
    if method.startswith("paca"):
        export_adapter(tmp_path / "run", tmp_path / "exported", "lora")
        exported = load_saved(tmp_path / "exported").model(input_ids=torch.tensor([[3, 4, 5]])).logits
        torch.testing.assert_close(exported.detach(), logits[0])


def test_a_head_of_several_layers_is_merged(place: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    RobertaForMaskedLM(RobertaConfig(vocab_size=300, pad_token_id=0, **settings)).save_pretrained(tmp_path / "roberta")
    byte_tokenizer(chat_template=None).save_pretrained(tmp_path / "roberta")
    train(config_of(place, tmp_path, str(tmp_path / "roberta"), "paca: {r: 4}"), console=Console(quiet=True))
    merge_to_folder(tmp_path / "run", tmp_path / "merged", verify=False)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        trained, merged = (load_saved(tmp_path / name).model(input_ids=ids).logits for name in ("run", "merged"))
    torch.testing.assert_close(merged, trained)


def test_models_that_name_no_embeddings_are_read(tmp_path: Path) -> None:
    sizes = {"hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 8], "image_size": 32}
    MobileViTForSemanticSegmentation(MobileViTConfig(**sizes)).save_pretrained(tmp_path / "seen")
    image: Any = AutoModelForImageClassification
    new = modules_made_anew(str(tmp_path / "seen"), None, False, image, ["a", "b"], fetch=True)
    assert new == ["mobilevit.conv_1x1_exp"]


def test_a_folder_without_weights_may_be_planned(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "bert", tmp_path / "bert", ignore=shutil.ignore_patterns("*.safetensors"))
    config = config_of(place, tmp_path, str(tmp_path / "bert"), "paca: {r: 4}")
    assert dict(describe(config).lines())["trained whole"] == "classifier"


def test_in_full_it_is_trained_anyway(place: Path, tmp_path: Path) -> None:
    train(config_of(place, tmp_path, "bert", "full: {}"), console=Console(quiet=True))
    assert "bert.pooler.dense.weight" in load_file(tmp_path / "run" / "model" / "model.safetensors")


@pytest.mark.parametrize("trainer", ["classification", "reward"])
def test_a_truncated_checkpoint_is_refused_by_name(place: Path, tmp_path: Path, trainer: str) -> None:
    pair = {"question": "why?", "chosen": "so", "rejected": "no"}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 4)
    data = [f"data.train={tmp_path / 'pairs.jsonl'}"] if trainer == "reward" else []
    config = config_of(place, tmp_path, "cut", "lora: {r: 2}", f"train.trainer={trainer}", *data)
    message = r"lacks weights of LlamaForSequenceClassification.*: model\.layers\.1\.input_layernorm\.weight, .* 5 more"
    with pytest.raises(PacaError, match=message):
        describe(config)
    with pytest.raises(PacaError, match=message):
        load_pretrained(str(place / "cut"), auto_class=AutoModelForSequenceClassification, labels=["a", "b"])
