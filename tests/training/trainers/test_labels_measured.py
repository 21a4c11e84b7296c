"""A finished classifier measured: on its held-out data as in training, on new data, and interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, EvalPrediction
from typer.testing import CliRunner

from evaluation.tally import Tally
from paca.cli import app
from paca.comparison.divergence import diverged
from paca.comparison.rows import row_of
from paca.evaluation import own_run
from paca.messages.errors import PacaError
from paca.pretrained.generation import load_saved
from paca.training import RunResult, load_run_config, train
from paca.training.folder.run_folder import RunFolder
from paca.training.trainers.classification import Accuracy

Finished = Callable[..., RunResult]


def scores_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "summary.json").read_text())["scores"]["after"]


@pytest.mark.parametrize("name", ["classification", "image_classification"])
def test_on_its_own_data_it_is_what_training_measured(finished: Finished, tmp_path: Path, name: str) -> None:
    folder, output = finished(name).folder, tmp_path / "out"
    done = CliRunner().invoke(app, ["evaluate", str(folder), "--output", str(output), "--batch-size", "3"])
    assert done.exit_code == 0, done.output
    assert "Measuring accuracy on the run's held-out data" in done.output
    found, trained = json.loads((output / "own_data.json").read_text()), scores_of(folder)
    assert found.keys() == {"data", "adapter"}
    assert found["data"] == "data.eval: 8"
    assert found["adapter"]["accuracy"] == trained["accuracy"]
    assert found["adapter"]["accuracy_stderr"] == pytest.approx(trained["accuracy_stderr"])
    assert found["adapter"]["right"] == trained["right"]
    loss = json.loads((folder / "summary.json").read_text())["eval_loss_after"]
    assert found["adapter"]["loss"] == pytest.approx(loss, rel=1e-5)
    row = row_of(RunFolder(folder), "paca")
    assert row is not None
    assert row["right"] == trained["right"]  # so that a comparison pairs the examples


def test_the_examples_are_those_of_the_best_weights_where_later_ones_score_the_same(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last evaluation has the best one's accuracy, of other weights: its answers were taken for those kept."""
    # Before training, at both evaluations, and once more: of the weights of the first one, which are kept.
    answers = iter([("00000000", 0.0), ("11110000", 0.5), ("00001111", 0.5), ("10101010", 0.5)])
    logits: list[np.ndarray] = []
    real = Accuracy.__call__

    def told(self: Accuracy, prediction: EvalPrediction) -> dict[str, float]:
        real(self, prediction)
        logits.append(np.array(prediction.predictions))
        self.right, accuracy = next(answers)
        return {"accuracy": accuracy}

    monkeypatch.setattr(Accuracy, "__call__", told)
    overrides = ["load_best_model_at_end=true", "metric_for_best_model=accuracy", "eval_steps=2", "save_steps=2"]
    folder = finished("classification", *(f"train.{one}" for one in overrides)).folder
    assert scores_of(folder)["right"] == "10101010"
    _, best, last, again = logits
    assert np.array_equal(again, best)
    assert not np.allclose(again, last)
    points = (folder / "metrics.jsonl").read_text().count("eval_accuracy")
    assert points == 3  # no point of the curve comes from what was evaluated for the examples' sake


def test_a_run_that_ended_before_its_results_were_written_has_them_once_it_is_resumed(
    finished: Finished, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished("classification").folder, run)
    whole, adapter = scores_of(run), (run / "adapter" / "adapter_model.safetensors").read_bytes()
    (run / "summary.json").unlink()
    config = load_run_config(run / "config.yaml", [f"output.dir={run}"])
    train(config, resume=True, console=Console(quiet=True))
    assert scores_of(run) == whole
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_weights_that_diverged_have_no_accuracy(finished: Finished) -> None:
    """Of outputs that are NaN the first label was taken for the highest: a run without any use had a score."""
    overrides = ["train.learning_rate=1e30", "train.max_steps=1"]  # its loss was finite, before the step
    folder = finished("classification", *overrides).folder
    row = row_of(RunFolder(folder), "paca")
    assert row is not None
    assert row["score"] is None
    assert diverged(row)


def test_examples_grouped_by_length_are_in_no_known_order(finished: Finished) -> None:
    assert "right" not in scores_of(finished("classification", "train.train_sampling_strategy=group_by_length").folder)


def test_new_texts_are_labelled_by_the_model_alone(
    workspace: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the training data, nor all labels, need be there."""
    folder, texts = finished("classification").folder, ["the cat", "a dog runs and runs and runs", "no"]
    new = tmp_path / "new.jsonl"
    new.write_text("".join(json.dumps({"text": text, "label": "other"}) + "\n" for text in texts))
    hidden = (workspace / "labelled.jsonl").rename(workspace / "elsewhere.jsonl")
    try:
        config = own_run.config_of_run(folder, str(new))
        loaded = own_run.load_run(folder, config)
        score = own_run.evaluate_run(loaded, config, own_run.other_data(folder, config), None, 2, None, Tally())
    finally:
        hidden.rename(workspace / "labelled.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    plain = load_saved(folder).model
    for text, sample in zip(texts, score["adapter"].samples, strict=True):
        with torch.no_grad():
            logits = plain(**tokenizer(text, return_tensors="pt")).logits
        assert sample == {
            "question": text, "reference": "other", "answer": ("animal", "other")[int(logits.argmax())],
        }  # fmt: skip


def test_images_of_one_label_keep_its_number(workspace: Path, finished: Finished, tmp_path: Path) -> None:
    folder = finished("image_classification").folder
    shutil.copytree(workspace / "images" / "red", tmp_path / "new" / "red")
    config = own_run.config_of_run(folder, str(tmp_path / "new"))
    examples = own_run.other_data(folder, config)
    assert set(examples.dataset["labels"]) == {1}  # blue, red


def test_what_was_labelled_before_ctrl_c_is_not_asked_again(finished: Finished, tmp_path: Path) -> None:
    folder = finished("image_classification").folder
    config = own_run.config_of_run(folder)
    data, loaded = own_run.held_out_of(folder, config)[0], own_run.load_run(folder, config)
    whole = own_run.evaluate_run(loaded, config, data, None, 2, None, Tally())
    with pytest.raises(KeyboardInterrupt):
        own_run.evaluate_run(loaded, config, data, None, 2, tmp_path, Tally(stop_after=3))
    rest = Tally()
    resumed = own_run.evaluate_run(loaded, config, data, None, 2, tmp_path, rest)
    assert resumed["adapter"].values == pytest.approx(whole["adapter"].values)  # other batches, other last bits
    assert resumed["adapter"].samples == whole["adapter"].samples
    assert rest.done == len(data.dataset) - 3


def test_other_labels_are_refused_by_name(finished: Finished, tmp_path: Path) -> None:
    folder, new = finished("classification").folder, tmp_path / "new.jsonl"
    new.write_text(json.dumps({"text": "a cow", "label": "cattle"}) + "\n")
    config = own_run.config_of_run(folder, str(new))
    with pytest.raises(PacaError, match="'cattle', which is none of the training data's: animal, other"):
        own_run.other_data(folder, config)
