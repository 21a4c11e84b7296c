"""Runs by `train.trainer: dpo | grpo | reward | classification | image_classification`, from config to folder."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import paca
from paca.evaluation.labelled import measure_labels
from paca.evaluation.own_run import held_out_of, load_run
from paca.messages.errors import PacaError
from paca.pretrained import load_pretrained
from paca.training import RunResult, describe, load_run_config, run, train
from paca.training.interrupt import StopOnSignal
from paca.training.trainers import TRAINERS
from training.tiny_run import adapter, rows, same_adapter

Finished = Callable[..., RunResult]
OTHERS = ("dpo", "grpo", "reward", "classification", "image_classification")


def logged(folder: Path) -> list[dict[str, Any]]:
    """What of the metrics must be the same in the same run: all but times and memory."""
    measured = ("seconds", "tokens_per_second", "train_seconds", "peak_memory_bytes", "eval_seconds")
    return [{name: value for name, value in row.items() if name not in measured} for row in rows(folder)]


def summary_of(result: RunResult) -> dict[str, Any]:
    assert result.summary is not None
    return result.summary


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_leaves_a_whole_folder(finished: Finished, name: str) -> None:
    folder = finished(name).folder
    assert {"adapter", "checkpoints", "config.yaml", "metrics.jsonl", "report.html", "summary.json"} <= {
        entry.name for entry in folder.iterdir()
    }
    losses = [row["loss"] for row in rows(folder) if "loss" in row]
    assert len(losses) == summary_of(finished(name))["steps"] > 2
    assert all(math.isfinite(loss) for loss in losses)
    assert summary_of(finished(name))["tokens"] > 0
    assert any(delta.any() for key, delta in adapter(folder).items() if key.endswith("paca_delta"))


@pytest.mark.parametrize("name", ["dpo", "reward", "image_classification"])
def test_what_can_be_learned_is_learned(finished: Finished, name: str) -> None:
    summary = summary_of(finished(name))
    assert summary["eval_loss_after"] < 0.8 * summary["eval_loss_before"]
    score = TRAINERS[name].score
    assert summary["scores"]["after"][score] == 1.0


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_a_score_is_over_examples_whatever_the_size_of_a_batch(finished: Finished, name: str) -> None:
    in_one, in_three_and_one = (
        finished(name, "train.learning_rate=3e-3", "train.max_steps=1", f"train.per_device_eval_batch_size={size}")
        for size in (4, 3)
    )
    of_one, of_both = (rows(result.folder)[-1] for result in (in_one, in_three_and_one))
    measured = [f"eval_{key}" for key in _MEANS if f"eval_{key}" in of_one]
    assert len(measured) == 3
    for key in measured:
        assert of_both[key] == pytest.approx(of_one[key], rel=1e-4, abs=1e-6), key


_MEANS = ("loss", "accuracy", "margin", "rewards/accuracies", "rewards/margins")


@pytest.mark.parametrize(
    ("name", "logged"),
    [
        ("dpo", "rewards/accuracies rewards/margins rewards/chosen eval_rewards/margins"),
        ("grpo", "reward rewards/exact_match/mean completions/mean_length eval_reward"),
        ("reward", "accuracy margin mean_reward eval_accuracy"),
        ("classification", "eval_accuracy"),
        ("image_classification", "eval_accuracy"),
    ],
)
def test_what_the_trainer_logs_is_in_the_summary_and_drawn_in_the_report(
    finished: Finished, name: str, logged: str
) -> None:
    folder, summary = finished(name).folder, summary_of(finished(name))
    page = (folder / "report.html").read_text()
    for metric in logged.split():
        values = [row[metric] for row in rows(folder) if metric in row]
        assert summary["metrics"][metric] == values[-1]
        assert f'aria-label="{metric.removeprefix("eval_")} over steps"' in page
    assert "loss (nats per token)" not in page
    assert TRAINERS[name].score in summary["scores"]["after"]


def test_an_accuracy_of_ties_is_left_out_before_training(workspace: Path, tmp_path: Path) -> None:
    """Of DPO: the adapter does nothing yet, so all pairs are ties. What it shows would read as all wrong."""
    shown = io.StringIO()
    config = load_run_config(workspace / "dpo.yaml", [f"output.dir={tmp_path / 'run'}", "train.max_steps=1"])
    result = train(config, console=Console(file=shown, width=200))
    before, after = (row for row in rows(result.folder) if "eval_loss" in row)
    assert "eval_rewards/accuracies" not in before
    assert before["eval_rewards/margins"] == 0.0
    said = f"held-out loss {after['eval_loss']:.4f}, rewards/accuracies {after['eval_rewards/accuracies']:.4f}"
    assert f"step 1: {said}\n" in shown.getvalue()
    assert f"step 0: held-out loss {before['eval_loss']:.4f}\n" in shown.getvalue()


def test_no_accuracy_of_ties_is_told_until_a_step_moves_the_weights(finished: Finished) -> None:
    """Nor is it in the mean over logged steps: the first batch, of ties alone, counts as none right."""
    told = {}
    for name, changed in {
        "each": (),
        "warm-up": ("train.warmup_steps=2",),
        "means": ("train.logging_steps=4", "train.eval_strategy=no", "train.save_strategy=no"),
    }.items():
        folder = finished("dpo", "train.learning_rate=1e-3", *changed).folder
        rewards = [row for row in rows(folder) if "loss" in row and row["rewards/margins"] is not None]
        told[name] = {row["step"]: row.get("rewards/accuracies") for row in rewards}
        evaluated = [row["step"] for row in rows(folder) if "eval_rewards/accuracies" in row]
        assert 0 not in evaluated
        assert (1 in evaluated) == (name == "each")
    assert [step for step, value in told["each"].items() if value is None] == [1]
    assert [step for step, value in told["warm-up"].items() if value is None] == [1, 2]
    assert told["means"][4] == pytest.approx(sum(told["each"][step] for step in (2, 3, 4)) / 3)


def originals_of(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's base model, as a run of it loads them."""
    config = load_run_config(folder / "config.yaml")
    kind = TRAINERS[config.train["trainer"]]
    labels = None
    if kind.task_type != "CAUSAL_LM":
        stored = json.loads((folder / "adapter" / "config.json").read_text())["id2label"]
        labels = [stored[number] for number in sorted(stored)]
    transformers.set_seed(config.train["seed"])
    model = load_pretrained(config.model.name, auto_class=kind.auto_class, labels=labels).model
    return {name: value.clone() for name, value in model.state_dict().items()}


class Watched(TrainerCallback):
    """At the end, whether the columns moved, and whether the base is there bit for bit with the adapter disabled."""

    def __init__(self, originals: dict[str, torch.Tensor]) -> None:
        self.originals = originals
        self.moved: list[str] = []
        self.restored: list[bool] = []

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert isinstance(model, PeftModel)
        paca.refresh(model)  # a checkpoint parked them
        weights = {self._plain(name): value for name, value in model.named_parameters()}
        for name, original in self.originals.items():
            if name in weights and not torch.equal(weights[name], original):
                self.moved.append(name)
        with model.disable_adapter():
            self.restored = [
                torch.equal(weights[name], value) for name, value in self.originals.items() if name in weights
            ]

    @staticmethod
    def _plain(name: str) -> str:
        return name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")


class SignalAtStep(StopOnSignal):
    """Sends this process a signal at the end of a step, as a user might."""

    step = -1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)
        super().on_step_end(args, state, control, **kwargs)


@pytest.mark.parametrize("name", OTHERS)
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one_and_the_base_comes_back_bit_for_bit(
    workspace: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    whole = finished(name).folder
    config = [f"output.dir={tmp_path / name}"]
    monkeypatch.setattr(run, "StopOnSignal", SignalAtStep)
    monkeypatch.setattr(SignalAtStep, "step", 2)
    stopped = train(load_run_config(workspace / f"{name}.yaml", config), console=Console(quiet=True))
    assert stopped.summary is None
    monkeypatch.setattr(SignalAtStep, "step", -1)
    watched = Watched(originals_of(whole))
    monkeypatch.setattr(run, "method_callbacks", lambda *_: [watched])  # which these methods have none of
    resumed = train(load_run_config(workspace / f"{name}.yaml", config), resume=True, console=Console(quiet=True))
    assert resumed.summary is not None
    assert same_adapter(whole, tmp_path / name)
    assert logged(whole) == logged(tmp_path / name)
    assert len(watched.moved) >= 12
    assert len(watched.restored) > len(watched.moved)
    assert all(watched.restored)


def test_grpo_samples_from_the_columns_as_they_are(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever a token is generated, the weight that multiplies holds the deltas of that moment."""
    kind, seen, generating = TRAINERS["grpo"], [], []
    make = kind.make

    def watching(*args: Any, **parts: Any) -> Any:
        trainer: Any = make(*args, **parts)
        generate = trainer._generate_single_turn
        layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
        original = layer.base_layer.weight.detach().clone()

        def generate_watched(*inner: Any, **settings: Any) -> Any:
            generating.append(True)
            try:
                return generate(*inner, **settings)
            finally:
                generating.pop()

        def look(*_: Any) -> None:
            if generating:
                delta, indices = layer.paca_delta["default"].detach(), layer.paca_indices["default"]
                expected = original.clone()
                expected[:, indices] += layer.scaling["default"] * delta
                seen.append((torch.equal(layer.base_layer.weight, expected), bool(delta.any())))

        layer.register_forward_hook(look)
        trainer._generate_single_turn = generate_watched
        return trainer

    monkeypatch.setattr(kind, "make", watching)
    train(load_run_config(workspace / "grpo.yaml", [f"output.dir={tmp_path / 'a'}"]), console=Console(quiet=True))
    assert all(current for current, _ in seen)
    assert {trained for _, trained in seen} == {False, True}


@pytest.mark.parametrize("learned", ["PROMPT_TUNING", "PREFIX_TUNING", "CARTRIDGE"])
def test_grpo_learns_from_the_answers_that_a_learned_prompt_gives(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learned: str
) -> None:
    """PEFT loses learned tokens with a cache, and learned keys and values in any case."""
    kind, compared = TRAINERS["grpo"], []
    make = kind.make

    def watching(*args: Any, **parts: Any) -> Any:
        trainer: Any = make(*args, **parts)
        for parameter in trainer.model.prompt_encoder.parameters():
            parameter.data.normal_(std=2.0)
        generate = trainer._generate_and_score_completions

        def generate_watched(inputs: Any) -> Any:
            made, training = generate(inputs), trainer.model.training
            names = (f"{part}_{what}" for what in ("ids", "mask") for part in ("prompt", "completion"))
            prompts, answers, before, kept = (made[name] for name in names)
            with torch.no_grad():  # padded as they were: PEFT leaves the positions to the model
                inputs = {"input_ids": torch.cat([prompts, answers], 1), "attention_mask": torch.cat([before, kept], 1)}
                likeliest = trainer.model.eval()(**inputs, use_cache=False).logits.argmax(-1)
            likeliest = likeliest[:, -answers.shape[1] - 1 : -1]
            compared.append((answers[kept.bool()].tolist(), likeliest[kept.bool()].tolist()))
            trainer.model.train(training)
            return made

        trainer._generate_and_score_completions = generate_watched
        return trainer

    monkeypatch.setattr(kind, "make", watching)
    text = (workspace / "grpo.yaml").read_text()
    config = tmp_path / "grpo.yaml"
    config.write_text(text.replace("paca: {r: 4}", f"peft: {{peft_type: {learned}, num_virtual_tokens: 6}}"))
    overrides = [f"output.dir={tmp_path / 'a'}", f"model.name={workspace / 'qwen'}"]  # which has no dropout
    overrides += ["train.top_k=1", "train.max_steps=1"]
    train(load_run_config(config, overrides), console=Console(quiet=True))
    assert compared
    for written, likeliest in compared:
        assert written == likeliest


def test_a_reward_run_is_a_reward_of_grpo(workspace: Path, finished: Finished, tmp_path: Path) -> None:
    judge = finished("reward").folder
    overrides = [f"output.dir={tmp_path / 'a'}", f"train.reward_funcs={judge}", f"model.name={workspace / 'qwen'}"]
    overrides.append("train.max_steps=1")
    result = train(load_run_config(workspace / "grpo.yaml", overrides), console=Console(quiet=True))
    assert math.isfinite(summary_of(result)["metrics"]["reward"])


def test_a_convolutional_network_learns_images(finished: Finished, workspace: Path) -> None:
    settings = [f"model.name={workspace / 'efficientnet'}", "paca.target_modules=.*(expand|project)_conv"]
    result = finished("image_classification", *settings)
    assert math.isfinite(summary_of(result)["eval_loss_after"])
    deltas = {name: value for name, value in adapter(result.folder).items() if name.endswith("paca_delta")}
    assert deltas
    assert all(value.any() and "_conv" in name for name, value in deltas.items())


def test_a_convolutional_network_in_16_bits_reads_images(finished: Finished, workspace: Path) -> None:
    """A processor's pixels are float32, which its convolutions refuse."""
    settings = [f"model.name={workspace / 'efficientnet'}", "paca.target_modules=.*(expand|project)_conv"]
    halves, whole = (finished("image_classification", *settings, *more) for more in (["model.dtype=bfloat16"], []))
    before = [summary_of(result)["eval_loss_before"] for result in (halves, whole)]
    assert before[0] == pytest.approx(before[1], rel=0.05)
    assert any(value.any() for name, value in adapter(halves.folder).items() if name.endswith("paca_delta"))


@pytest.mark.parametrize("name", ["classification", "image_classification"])
def test_losses_of_classifiers_in_16_bits_are_formed_in_float32(finished: Finished, name: str) -> None:
    """As `paca evaluate` forms them: in 16 bits losses near 0.7 lie 0.004 apart."""
    settings = ("model.dtype=bfloat16", "train.gradient_accumulation_steps=2", "train.per_device_eval_batch_size=8")
    result = finished(name, *settings)
    config = load_run_config(result.folder / "config.yaml")
    held_out, _ = held_out_of(result.folder, config)
    found = measure_labels(load_run(result.folder, config), held_out, config).values["loss"]
    assert summary_of(result)["eval_loss_after"] == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("name", ["classification", "image_classification"])
def test_accumulated_batches_give_a_classifier_the_loss_of_one(
    workspace: Path, finished: Finished, tmp_path: Path, name: str
) -> None:
    """transformers adds up the losses of language models' classifiers, and their gradients."""
    still = ("train.max_steps=1", "train.max_grad_norm=1e9", "train.seed=3")
    if name == "classification":
        model = Path(shutil.copytree(workspace / "llama", tmp_path / "llama")) / "config.json"
        model.write_text(json.dumps({**json.loads(model.read_text()), "attention_dropout": 0.0}))
        still += (f"model.name={tmp_path / 'llama'}",)
    one = finished(name, *still, "train.per_device_train_batch_size=4")
    two = finished(name, *still, "train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2")
    losses, norms = ([rows(run.folder)[1][key] for run in (one, two)] for key in ("loss", "grad_norm"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


def test_a_method_that_lacks_what_a_models_code_reads_of_a_layer_is_told(workspace: Path, tmp_path: Path) -> None:
    sizes = {"depth_multiplier": 0.25, "image_size": 32, "num_labels": 2}
    transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config(**sizes)).save_pretrained(
        tmp_path / "m"
    )
    transformers.AutoImageProcessor.from_pretrained(workspace / "efficientnet").save_pretrained(tmp_path / "m")
    lora = "lora: {r: 2, target_modules: '.*expand_1x1.convolution'}"
    text = (workspace / "image_classification.yaml").read_text().replace("paca: {r: 4}", lora)
    (tmp_path / "run.yaml").write_text(text)
    config = load_run_config(tmp_path / "run.yaml", [f"model.name={tmp_path / 'm'}", f"output.dir={tmp_path / 'run'}"])
    with pytest.raises(PacaError, match=r"PEFT's lora does not fit .*/m, whose own code reads 'stride' of a layer"):
        train(config, console=Console(quiet=True))


def test_a_layer_without_weights_that_a_method_is_to_adapt_is_told(workspace: Path, tmp_path: Path) -> None:
    method = "peft: {peft_type: LN_TUNING, target_modules: '.*(layernorm_before|dropout)'}"
    text = (workspace / "image_classification.yaml").read_text().replace("paca: {r: 4}", method)
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(PacaError, match=r"The section peft does not fit .*: a layer that it names has no weights"):
        describe(load_run_config(tmp_path / "run.yaml"))


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_lean_blocks_train_the_same_way(finished: Finished, name: str) -> None:
    lean, plain = (summary_of(finished(name, *more)) for more in (["model.lean=true"], []))
    assert lean["eval_loss_after"] == pytest.approx(plain["eval_loss_after"], rel=1e-3)


@pytest.mark.parametrize("name", ["dpo", "reward", "classification", "image_classification"])
def test_the_probe_changes_nothing(workspace: Path, finished: Finished, tmp_path: Path, name: str) -> None:
    config = load_run_config(workspace / f"{name}.yaml", [f"output.dir={tmp_path / 'a'}"])
    lines = Console(file=(tmp_path / "out").open("w"), width=200)
    train(config, console=lines, probe=True)
    assert "fits: peak memory" in (tmp_path / "out").read_text()
    assert same_adapter(finished(name).folder, tmp_path / "a")
    assert logged(finished(name).folder) == logged(tmp_path / "a")


def test_a_method_whose_layers_peft_cannot_choose_is_told_what_to_name(workspace: Path, tmp_path: Path) -> None:
    text = (workspace / "image_classification.yaml").read_text().replace("paca: {r: 4}", "lora: {r: 4}")
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(PacaError, match=r"no layers of choice for .* type vit\. Give lora\.target_modules: all-linear"):
        describe(load_run_config(tmp_path / "run.yaml"))


@pytest.mark.parametrize("method", ["lora: {r: 4}", "full: {}"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_train_by_the_same_config(workspace: Path, tmp_path: Path, name: str, method: str) -> None:
    text = (workspace / f"{name}.yaml").read_text().replace("paca: {r: 4}", method)
    if name == "image_classification" and method.startswith("lora"):
        text = text.replace("{r: 4}", "{r: 4, target_modules: [q_proj, v_proj]}")
    (tmp_path / "run.yaml").write_text(text)
    config = load_run_config(
        tmp_path / "run.yaml", [f"output.dir={tmp_path / 'run'}", "train.learning_rate=1e-3", "train.max_steps=2"]
    )
    result = train(config, console=Console(quiet=True))
    assert math.isfinite(summary_of(result)["eval_loss_after"])
    assert summary_of(result)["method"]["name"] == method.partition(":")[0]


def test_an_adapter_in_the_weights_dtype_has_the_model_as_reference(finished: Finished) -> None:
    """Not TRL's copy of it, which would be saved too."""
    fast = finished("dpo", "train.autocast_adapter_dtype=false")
    assert not (fast.folder / "adapter" / "ref").exists()
    assert same_adapter(fast.folder, finished("dpo").folder)  # in float32 both forms are the same


def test_texts_are_cut_to_the_models_length_unless_told_otherwise(workspace: Path, tmp_path: Path) -> None:
    records = [{"text": "word " * 100, "label": label} for label in ("a", "b")] * 2  # 500 tokens; the model takes 256
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    overrides = [f"data.train={tmp_path / 'long.jsonl'}", "data.eval=null", "train.max_steps=1"]
    for name, given, tokens in (("default", [], 2 * 256), ("shorter", ["train.max_length=10"], 2 * 10)):
        config = load_run_config(
            workspace / "classification.yaml", [f"output.dir={tmp_path / name}", *overrides, *given]
        )
        assert summary_of(train(config, console=Console(quiet=True)))["tokens"] == tokens


def test_columns_that_a_classifier_does_not_read_may_stay_in_its_data(finished: Finished) -> None:
    plain = finished("classification").summary
    assert plain is not None
    kept = finished("classification", "train.remove_unused_columns=false").summary
    assert kept is not None
    assert kept["eval_loss_after"] == plain["eval_loss_after"]
