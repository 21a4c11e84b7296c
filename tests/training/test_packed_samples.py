"""Packed examples do not read each other, or the run is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel
from trl import SFTConfig, SFTTrainer

import paca
from models import llama
from paca.messages.errors import PacaError
from paca.training import load_run_config
from paca.training.packed_samples import check_apart, gradient_by_the_first
from tiny_checkpoint import byte_tokenizer, save_base

FIRST, SECOND = list(range(40, 60)), list(range(70, 85))


def adapted(model: PreTrainedModel) -> Any:
    model = get_peft_model(model, paca.PacaConfig(r=4, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "paca_delta" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def packing(folder: Path, model: Any, **settings: Any) -> SFTTrainer:
    """A trainer of one sequence, in which FIRST comes before SECOND."""
    rows = [{"input_ids": ids, "labels": ids} for ids in (FIRST, SECOND)]
    settings = {"packing": True, "max_length": 48, "bf16": False} | settings
    arguments = SFTConfig(str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **settings)
    return SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=byte_tokenizer())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_another_first_example_leaves_the_loss_of_the_second_as_it_is(
    base: Path, tmp_path: Path, strategy: str, training: bool
) -> None:
    model = adapted(LlamaForCausalLM.from_pretrained(base, attn_implementation="sdpa"))
    trainer = packing(tmp_path, model, packing_strategy=strategy)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].tolist() == [FIRST + SECOND]
    trainer.model.train(training)

    def losses(first: list[int]) -> tuple[float, float]:
        """Of the second example, and of the first."""
        ids = torch.tensor([first + SECOND])
        other = {**batch, "input_ids": ids, "labels": torch.where(batch["position_ids"] == 0, -100, ids)}
        second = {**other, "labels": other["labels"].index_fill(1, torch.arange(len(FIRST)), -100)}
        with torch.no_grad():
            return (
                float(trainer.compute_loss(trainer.model, second)),
                float(trainer.compute_loss(trainer.model, other)),
            )

    one, two = losses(FIRST), losses(FIRST[::-1])
    assert one[0] == two[0]
    assert one[1] != two[1]  # they did differ


def test_a_model_that_lets_packed_examples_read_each_other_is_refused(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=300,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        init_std=0.2,
    )
    trainer = packing(tmp_path, adapted(OPTForCausalLM(config)))
    with pytest.raises(PacaError, match=r"train\.packing would let the .* OPTForCausalLM takes no .* Leave out"):
        check_apart(trainer)
    check_apart(packing(tmp_path, adapted(OPTForCausalLM(config)), packing=False))


def test_the_look_at_a_model_finds_what_a_mask_would_forget(tmp_path: Path) -> None:
    model = llama(vocab_size=300)
    trainer = packing(tmp_path, model)
    check_apart(trainer)
    assert model.training

    def without_positions(examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {"input_ids": trainer.data_collator(examples)["input_ids"]}

    assert float(gradient_by_the_first(model, without_positions).abs().max()) > 0


def test_what_a_model_says_of_packing_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = packing(tmp_path, llama(vocab_size=300))

    def refuse(**given: Any) -> None:
        raise ValueError("kernels are missing.")

    monkeypatch.setattr(trainer.model, "forward", refuse)
    with pytest.raises(PacaError, match=r"packing does not go with LlamaForCausalLM here: kernels are missing\."):
        check_apart(trainer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{packing: true, packing_strategy: wrapped}", "line 3: train.packing_strategy: wrapped would let the"),
        ("{eval_packing: true}", "line 3: train.eval_packing goes with train.packing: true"),
    ],
)
def test_settings_that_mix_examples_are_refused(tmp_path: Path, settings: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{name: a/b}}\ndata: {{train: c/d}}\ntrain: {settings}\n")
    with pytest.raises(PacaError, match=message):
        load_run_config(file)


def test_a_run_looks_before_it_trains(
    config_file: Path, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paca.training.trainers import sft

    def refuse(trainer: Any) -> None:
        raise PacaError(f"asked with padding_free={trainer.padding_free}")

    monkeypatch.setattr(sft, "check_apart", refuse)
    with pytest.raises(PacaError, match="asked with padding_free=True"):
        finished("train.packing=true")


def test_it_is_tried_in_the_precision_of_training(base: Path, tmp_path: Path) -> None:
    """Some kernels take 16 bits alone, which float32 weights have within autocast."""
    model, seen = adapted(LlamaForCausalLM.from_pretrained(base, attn_implementation="sdpa")), []
    model.get_base_model().lm_head.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    check_apart(packing(tmp_path, model, bf16=True))
    check_apart(packing(tmp_path, model))
    assert seen == [True, False]
