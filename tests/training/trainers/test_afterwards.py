"""What is done with finished runs: `paca merge`, `paca chat`, `paca evaluate`, and plain PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from paca.convert.merged import merge_to_folder
from paca.messages.errors import PacaError
from paca.pretrained.generation import load_for_generation, load_saved, stream_reply
from paca.pretrained.purpose import classifier_in
from paca.training import RunResult, load_run_config, train
from paca.training.planned_run import target_of_run

Finished = Callable[..., RunResult]


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_a_language_model_answers_and_merges(finished: Finished, tmp_path: Path, name: str) -> None:
    folder = finished(name).folder
    loaded = load_for_generation(folder)
    assert isinstance("".join(stream_reply(loaded, [{"role": "user", "content": "a?"}], max_new_tokens=3)), str)
    merged = merge_to_folder(folder, tmp_path / "merged")
    assert merged.difference is not None
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


@pytest.mark.parametrize(
    ("name", "what", "labels"),
    [
        ("reward", "a reward model", ["reward"]),
        ("classification", "a classifier of texts", ["animal", "other"]),
        ("image_classification", "a classifier of images", ["blue", "red"]),
    ],
)
def test_a_classifier_says_what_it_is_and_merges(
    finished: Finished, tmp_path: Path, name: str, what: str, labels: list[str]
) -> None:
    folder = finished(name).folder
    with pytest.raises(PacaError, match=f"is {what} .labels: {', '.join(labels)}.*paca merge"):
        load_for_generation(folder)
    merged = merge_to_folder(folder, tmp_path / "merged")
    assert merged.difference is not None  # compared with the adapted model, and the same within rounding
    auto = AutoModelForImageClassification if name.startswith("image") else AutoModelForSequenceClassification
    model = auto.from_pretrained(tmp_path / "merged")
    assert list(model.config.id2label.values()) == labels
    with pytest.raises(PacaError, match=what):
        load_for_generation(tmp_path / "merged")
    if name.startswith("image"):
        AutoImageProcessor.from_pretrained(tmp_path / "merged")


def test_the_trained_head_is_what_the_saved_adapter_brings(finished: Finished) -> None:
    """By the code in the adapter's card: the base with a new head, then the adapter."""
    folder = finished("classification").folder / "adapter"
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "AutoModelForSequenceClassification.from_pretrained(" in card
    base = str(classifier_base(card))
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(base, config=config, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(model, folder).eval()
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, load_saved(folder).model(input_ids=tokens).logits)


def classifier_base(card: str) -> str:
    line = next(line for line in card.splitlines() if line.startswith("model = AutoModelFor"))
    return line.partition('("')[2].partition('"')[0]


def test_a_whole_model_of_a_full_run_says_what_it_is(workspace: Path, tmp_path: Path) -> None:

    (tmp_path / "a.yaml").write_text(
        (workspace / "classification.yaml").read_text().replace("paca: {r: 4}", "full: {}")
    )
    train(load_run_config(tmp_path / "a.yaml", [f"output.dir={tmp_path / 'run'}"]), console=Console(quiet=True))
    assert classifier_in(tmp_path / "run") is not None
    with pytest.raises(PacaError, match="is a classifier of texts"):
        load_for_generation(tmp_path / "run")


def test_a_plan_of_memory_is_for_sft_alone(workspace: Path) -> None:
    with pytest.raises(PacaError, match=r"train\.trainer: dpo, whose memory is not foretold"):
        target_of_run(workspace / "dpo.yaml", [], "cpu", None, None)
