"""Runs in this process, on a model with dropout: what they leave, and that stopping and resuming changes nothing."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState, TrainingArguments

from paca.messages.errors import PacaError
from paca.messages.program import program
from paca.pretrained.generation import load_for_generation
from paca.training import RunResult, describe, load_run_config, train
from paca.training import run as run_module
from paca.training.folder.provenance import code_state, git_state
from paca.training.interrupt import StopOnSignal
from paca.training.plan import Plan, show_plan
from pretrained.test_pretrained import mergeable_base, write_gguf  # noqa: F401 - the first is a fixture
from tiny_checkpoint import byte_tokenizer
from training.tiny_run import adapter, curve, rows, same_adapter

Runner = Callable[..., RunResult]


class SignalAtStep(StopOnSignal):
    """Sends this process a signal at the end of a step, as a user might."""

    step = -1
    number = signal.SIGINT

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)
        super().on_step_end(args, state, control, **kwargs)


@pytest.fixture
def run(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Trains into `tmp_path / name` with some settings changed; optionally stopped by a signal after a step."""
    monkeypatch.setattr(run_module, "StopOnSignal", SignalAtStep)

    def start(name: str, *overrides: str, resume: bool = False, stop_at: int = -1) -> RunResult:
        monkeypatch.setattr(SignalAtStep, "step", stop_at)
        config = load_run_config(config_file, [f"output.dir={tmp_path / name}", *overrides])
        return train(config, resume=resume, console=Console(quiet=True))

    return start


def base_loss(config_file: Path, batch_size: int = 8) -> float:
    """The held-out loss of the base model in float64, as the trainer means it: a mean over batches of token means."""
    config = load_run_config(config_file)
    model = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float64).eval()
    tokenizer = byte_tokenizer()
    records = [json.loads(line) for line in Path(config.data.train).read_text().splitlines()]
    from paca.data import load_examples, split_heldout

    _, held_out = split_heldout(load_examples(config.data.train), 8, 0)
    chosen = [records[int(origin.rpartition(" ")[2]) - 1] for origin in held_out.dataset["origin"]]
    means = []
    for start in range(0, len(chosen), batch_size):
        losses = []
        for record in chosen[start : start + batch_size]:
            prompt = tokenizer(record["prompt"])["input_ids"]
            tokens = torch.tensor(prompt + tokenizer(record["completion"])["input_ids"] + [tokenizer.eos_token_id])
            with torch.no_grad():
                logits = model(tokens[None, :-1]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")[len(prompt) - 1 :])
        means.append(torch.cat(losses).mean().item())
    return sum(means) / len(means)


def test_a_run_leaves_its_folder(run: Runner, tmp_path: Path, config_file: Path) -> None:
    result = run("a")
    folder = tmp_path / "a"
    assert result.folder == folder
    assert result.resume_command is None
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "inputs.json", "metrics.jsonl", "summary.json", "report.html", "adapter", "checkpoints",
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == result.summary
    assert summary["eval_loss_before"] == pytest.approx(base_loss(config_file), rel=1e-5)  # float32 against float64
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.05
    assert (summary["steps"], summary["epochs"]) == (6, 1.5)
    assert summary["data"]["train_examples"] == 32
    assert summary["data"]["eval_examples"] == 8
    assert summary["trainable_parameters"] == sum(
        tensor.numel() for name, tensor in adapter(folder).items() if name.endswith("paca_delta")
    )
    assert summary["adapted_layers"] == 14
    assert summary["peak_memory_bytes"] > 50 * 2**20
    assert summary["versions"]["torch"] == torch.__version__
    assert (summary["git"], summary["code"]) == (git_state(Path.cwd()), code_state())
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["train_seconds"], rel=0.01)
    card = (folder / "adapter" / "README.md").read_text()
    for known in (
        config_file.parent / "model",
        config_file.parent / "train.jsonl",
        "r = 4",
        "| `learning_rate` | 0.01 |",
    ):
        assert str(known) in card
    assert f"{summary['eval_loss_after']:.4f} after" in card
    assert "Loads in the PaCA of PEFT >= 0.22, without paca: yes.\n" in card
    assert re.findall("pip install (.*?)`", card) == ["./paca"]  # no name that is not on PyPI, or is another's there
    assert "\n```python\n" in card
    assert "\n```\n" in card
    assert "More Information Needed" not in card
    assert not list((folder / "checkpoints").rglob("README.md"))  # templates of TRL and PEFT, not filled in
    training_rows = [row for row in rows(folder) if "loss" in row]
    assert [row["step"] for row in training_rows] == list(range(1, 7))
    assert training_rows[-1]["tokens"] == summary["tokens"]
    assert [row["step"] for row in rows(folder) if "eval_loss" in row] == [0, 2, 4, 6]


def test_the_tokenizer_can_come_from_elsewhere(run: Runner, tmp_path: Path, config_file: Path) -> None:
    model = Path(shutil.copytree(config_file.parent / "model", tmp_path / "model"))
    (tmp_path / "files").mkdir()
    for file in [*model.glob("*token*"), model / "chat_template.jinja"]:
        file.rename(tmp_path / "files" / file.name)
    settings = (f"model.name={model}", "train.max_steps=1", "eval.before=false")
    with pytest.raises(PacaError, match="holds no tokenizer"):
        run("a", *settings)
    result = run("b", *settings, f"model.tokenizer={tmp_path / 'files'}")
    assert result.summary is not None
    loaded = load_for_generation(result.folder)  # the base model still has none
    assert loaded.tokenizer.get_vocab() == byte_tokenizer().get_vocab()


def test_the_card_says_why_pefts_own_paca_cannot_load_the_adapter(run: Runner, tmp_path: Path) -> None:
    run("a", "train.max_steps=1", "paca.rank_pattern={up_proj: 2}")
    card = (tmp_path / "a/adapter/README.md").read_text()
    assert "without paca: no, because model.layers.0.mlp.up_proj has 2 columns, and it gives all layers r=4." in card


def test_the_adapter_gives_the_loss_that_was_reported(run: Runner, finished: Runner, tmp_path: Path) -> None:
    result = finished()
    assert result.summary is not None
    base = AutoModelForCausalLM.from_pretrained(result.summary["model"]["name"])
    adapted = PeftModel.from_pretrained(base, result.folder / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    byte_tokenizer().save_pretrained(tmp_path / "merged")
    again = run("b", f"model.name={tmp_path / 'merged'}", "train.max_steps=1", "eval.after=false")
    assert again.summary is not None
    assert again.summary["eval_loss_before"] == pytest.approx(result.summary["eval_loss_after"], rel=1e-5)
    assert again.summary["eval_loss_after"] is None


def test_the_resolved_config_runs_again_to_the_same_weights(run: Runner, tmp_path: Path) -> None:
    run("a", "train.max_steps=2")
    resolved = load_run_config(tmp_path / "a" / "config.yaml", [f"output.dir={tmp_path / 'b'}"])
    train(resolved, console=Console(quiet=True))
    assert same_adapter(tmp_path / "a", tmp_path / "b")
    first, second = ((tmp_path / name / "config.yaml").read_text() for name in "ab")
    assert first.replace(str(tmp_path / "a"), str(tmp_path / "b")) == second


ACCUMULATED = ["train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2"]
TWO_EPOCHS = ["train.num_train_epochs=2", "train.max_steps=-1", "train.eval_strategy=epoch"]


@pytest.mark.parametrize(
    ("overrides", "stops", "number"),
    [
        (ACCUMULATED, [3], signal.SIGTERM),
        ([], [4, 5], signal.SIGINT),  # 4 ends an epoch; stopped again in the next one
        (["train.eval_strategy=epoch"], [6], signal.SIGINT),  # no step is left, only the last evaluation
        ([*TWO_EPOCHS, "train.save_strategy=epoch"], [3], signal.SIGINT),
        ([*TWO_EPOCHS, "train.save_steps=3"], [4], signal.SIGINT),
        (["paca.rotate_every=2"], [3, 4], signal.SIGINT),  # 4: the columns change with the next step
        (["train.factor_rank=2"], [3], signal.SIGINT),
    ],
    ids=["inside an epoch", "twice", "at the end", "epochs", "at an epoch's evaluation", "rotating", "factors"],
)
def test_a_stopped_and_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    run: Runner,
    finished: Runner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    stops: list[int],
    number: int,
) -> None:
    monkeypatch.setattr(SignalAtStep, "number", number)
    whole = finished(*overrides)
    for count, stop in enumerate(stops):
        result = run("parts", *overrides, resume=count > 0, stop_at=stop)
        assert result.summary is None
        assert result.resume_command == f"{program()} train {tmp_path / 'parts' / 'config.yaml'} --resume"
        assert (tmp_path / "parts" / "checkpoints" / f"checkpoint-{stop}").is_dir()
        assert not (tmp_path / "parts" / "adapter").exists()
    parts = run("parts", *overrides, resume=True)
    assert same_adapter(whole.folder, tmp_path / "parts")
    assert curve(whole.folder) == curve(tmp_path / "parts")
    assert whole.summary is not None
    assert parts.summary is not None
    for name in ("eval_loss_before", "eval_loss_after", "steps", "tokens", "epochs"):
        assert whole.summary[name] == parts.summary[name]
    ranks = {tensor.shape[1] for name, tensor in adapter(tmp_path / "parts").items() if name.endswith("paca_delta")}
    assert ranks == ({12} if overrides == ["paca.rotate_every=2"] else {4})


def test_factors_have_the_rank_that_the_file_says(finished: Runner) -> None:
    trained = adapter(finished("train.factor_rank=2").folder)
    for delta in (delta for name, delta in trained.items() if name.endswith("paca_delta")):
        assert torch.linalg.matrix_rank(delta) == 2


def test_rotation_on_quantized_weights_is_refused_before_they_are_loaded(config_file: Path) -> None:
    config = load_run_config(config_file, ["paca.rotate_every=3", "model.quantization=nf4"])
    with pytest.raises(PacaError, match=r"rotate_every.*quantized"):
        describe(config)


def test_a_run_that_died_goes_on_from_its_last_checkpoint(run: Runner, finished: Runner, tmp_path: Path) -> None:
    whole = finished().folder
    shutil.copytree(whole, tmp_path / "died")
    for name in ("summary.json", "report.html"):
        (tmp_path / "died" / name).unlink()
    shutil.rmtree(tmp_path / "died" / "adapter")
    (tmp_path / "died" / "checkpoints" / "checkpoint-6" / "trainer_state.json").write_text("{")  # cut short
    run("died", resume=True)
    assert same_adapter(whole, tmp_path / "died")
    assert curve(whole) == curve(tmp_path / "died")


def test_losses_between_two_logs_are_not_lost_in_a_checkpoint(run: Runner, finished: Runner, tmp_path: Path) -> None:
    run("a", "train.logging_steps=4", stop_at=3)
    run("a", "train.logging_steps=4", resume=True)
    each = {row["step"]: row["loss"] for row in rows(finished().folder) if "loss" in row}
    assert list(each) == list(range(1, 7))
    logged = [(row["step"], row["loss"]) for row in rows(tmp_path / "a") if "loss" in row]
    previous = 0
    for step, loss in logged:
        assert loss == pytest.approx(sum(each[s] for s in range(previous + 1, step + 1)) / (step - previous), rel=1e-5)
        previous = step
    assert previous == 6
    assert 3 in dict(logged)


def test_a_second_signal_stops_at_once(run: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def twice(self: SignalAtStep, *args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(SignalAtStep, "on_step_end", twice)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run("a")
    assert signal.getsignal(signal.SIGINT) is handler
    assert not list((tmp_path / "a" / "checkpoints").glob("checkpoint-*"))


def test_a_run_is_not_continued_under_other_settings(run: Runner) -> None:
    run("a", "train.max_steps=2", stop_at=1)
    with pytest.raises(PacaError, match=r"train\.learning_rate: 0\.01 → 0\.5"):
        run("a", "train.max_steps=2", "train.learning_rate=0.5", resume=True)
    assert run("a", "train.max_steps=2", "train.save_total_limit=1", resume=True).summary is not None


def test_a_run_records_which_model_it_was_trained_on(
    run: Runner, tmp_path: Path, config_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = shutil.copytree(load_run_config(config_file).model.name, tmp_path / "base-model")
    settings = (f"model.name={base}", "train.max_steps=2")
    run("a", *settings, stop_at=1)
    assert run("a", *settings, resume=True).summary is not None  # with that record
    load_for_generation(tmp_path / "a")
    assert caplog.text.count("is not the one that the adapter in") == 0
    file = base / "model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    load_for_generation(tmp_path / "a")
    assert caplog.text.count("is not the one that the adapter in") == 1


@pytest.mark.parametrize("changed", ["data.train", "data.eval", "data.template"])
def test_a_run_is_not_continued_on_other_content(run: Runner, tmp_path: Path, changed: str) -> None:
    record = {"instruction": "Say a.", "output": "a"}
    settings = {}
    for key in ("data.train", "data.eval"):
        settings[key] = tmp_path / f"{key}.jsonl"
        settings[key].write_text((json.dumps(record) + "\n") * 4)
    settings["data.template"] = tmp_path / "own.jinja"
    settings["data.template"].write_text(str(byte_tokenizer().chat_template))
    overrides = [f"{key}={file}" for key, file in settings.items()]
    run("a", *overrides, stop_at=1)
    before = settings[changed].read_text()
    settings[changed].write_text(before.replace("Say a.", "Say b.") + "{# other #}\n" * (changed == "data.template"))
    with pytest.raises(PacaError, match=rf"content of {changed} \({settings[changed]}\) is no longer what the run"):
        run("a", *overrides, resume=True)
    settings[changed].write_text(before)
    assert run("a", *overrides, resume=True, stop_at=2).resume_command is not None


def test_a_run_learns_from_several_sources_of_several_forms(run: Runner, tmp_path: Path) -> None:
    chats, tasks = tmp_path / "chats.jsonl", tmp_path / "tasks.jsonl"
    talk = [{"role": "user", "content": "Say a."}, {"role": "assistant", "content": "a"}]
    chats.write_text((json.dumps({"messages": talk}) + "\n") * 3)
    tasks.write_text((json.dumps({"instruction": "Say b.", "output": "b"}) + "\n") * 4)
    overrides = (f"data.train=[{chats}, {tasks}]", "data.eval=2", "train.max_steps=2")
    run("a", *overrides, stop_at=1)
    whole = tasks.read_text()
    tasks.write_text(whole.replace("Say b.", "Say c."))
    with pytest.raises(PacaError, match=r"content of data.train \(.*tasks.jsonl.*\) is no longer what the run"):
        run("a", *overrides, resume=True)
    tasks.write_text(whole)
    summary = run("a", *overrides, resume=True).summary
    assert summary is not None
    data = summary["data"]
    assert (data["train"], data["train_examples"], data["eval_examples"]) == ([str(chats), str(tasks)], 5, 2)
    assert data["format"] == "messages and alpaca"
    card = (tmp_path / "a" / "adapter" / "README.md").read_text()
    assert f"trained on 5 examples of `{chats}` and `{tasks}`" in card


def test_a_finished_run_is_neither_repeated_nor_overwritten(run: Runner, tmp_path: Path) -> None:
    first = run("a", "train.max_steps=2")
    changed = (tmp_path / "a" / "summary.json").stat().st_mtime_ns
    assert run("a", "train.max_steps=2", resume=True).summary == first.summary
    assert (tmp_path / "a" / "summary.json").stat().st_mtime_ns == changed
    with pytest.raises(PacaError, match=r"finished, with other settings:\n  paca.r: 4 → 2\n  train.max_steps: 2 → 3"):
        run("a", "train.max_steps=3", "paca.r=2", resume=True)
    with pytest.raises(PacaError, match=r"measure its result so: \S*paca evaluate \S+a --set eval.max_new_tokens=..."):
        run("a", "train.max_steps=2", "eval.metric=null", "eval.max_new_tokens=9", resume=True)
    with pytest.raises(PacaError, match="already holds a finished run"):
        run("a", "train.max_steps=2")
    again = run("a", "train.max_steps=3", "output.overwrite=true")
    assert again.summary is not None
    assert again.summary["steps"] == 3
    assert [row["step"] for row in rows(tmp_path / "a") if "loss" in row] == [1, 2, 3]


def test_the_best_model_is_kept_when_asked_for(run: Runner, tmp_path: Path) -> None:
    # "Best" is turned round to the highest loss, which is surely not the last.
    settings = ["load_best_model_at_end=true", "metric_for_best_model=loss", "greater_is_better=true"]
    asked = [f"train.{setting}" for setting in settings]
    result = run("a", *asked)
    losses = {row["step"]: row["eval_loss"] for row in rows(tmp_path / "a") if "eval_loss" in row and row["step"]}
    best = max(losses, key=lambda step: losses[step])
    assert best == 2
    assert result.summary is not None
    assert result.summary["eval_loss_after"] == losses[best]
    checkpoint = tmp_path / "a" / "checkpoints" / f"checkpoint-{best}"
    assert (checkpoint / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "a" / "adapter" / "adapter_model.safetensors"
    ).read_bytes()

    # Killed when all steps were made.
    shutil.copytree(tmp_path / "a", tmp_path / "died")
    (tmp_path / "died" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "died" / "adapter")
    again = run("died", *asked, resume=True)
    assert same_adapter(tmp_path / "a", tmp_path / "died")
    assert again.summary is not None
    assert again.summary["eval_loss_after"] == losses[best]


def test_the_best_model_is_found_again_in_a_folder_that_was_moved(run: Runner, tmp_path: Path) -> None:
    settings = ["load_best_model_at_end=true", "metric_for_best_model=loss", "greater_is_better=true"]
    asked = [f"train.{setting}" for setting in (*settings, "save_strategy=best")]
    run("a", *asked)
    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == ["checkpoint-2"]  # no later one
    shutil.copytree(tmp_path / "a" / "adapter", tmp_path / "whole" / "adapter")
    (tmp_path / "a" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "a" / "adapter")
    (tmp_path / "a").rename(tmp_path / "moved")
    run("moved", *asked, resume=True)
    assert same_adapter(tmp_path / "whole", tmp_path / "moved")


def test_a_run_that_saves_at_its_best_stops_with_a_checkpoint_where_it_is_not(
    run: Runner, finished: Runner, tmp_path: Path
) -> None:
    best = ["train.save_strategy=best", "train.greater_is_better=true"]  # of the loss, where nothing is said
    whole = finished(*best).folder
    stopped = run("stopped", *best, stop_at=4)  # where it is evaluated, and the highest loss was at step 2
    assert stopped.resume_command is not None
    assert stopped.saved
    assert (tmp_path / "stopped" / "checkpoints" / "checkpoint-4" / "whole.json").is_file()
    run("stopped", *best, resume=True)
    assert same_adapter(whole, tmp_path / "stopped")


def test_a_stopped_run_says_whether_it_can_go_on_from_there(run: Runner) -> None:
    settings = ("train.max_steps=2", "data.eval=null")
    assert not run("only-weights", *settings, "train.save_only_model=true", stop_at=1).saved  # without the optimizer
    assert run("whole", *settings, stop_at=1).saved


@pytest.mark.slow(reason="trains several times")
def test_packing_trains_on_the_same_tokens_in_fewer_sequences(run: Runner, config_file: Path) -> None:
    epoch = ["train.max_steps=-1", "train.num_train_epochs=1"]
    epoch += ["data.limit=20", "train.per_device_train_batch_size=1"]
    packed, plain = run("packed", *epoch, "train.packing=true"), run("plain", *epoch)
    assert packed.summary is not None
    assert plain.summary is not None
    assert packed.summary["tokens"] == plain.summary["tokens"]
    assert packed.summary["steps"] < plain.summary["steps"] / 2


def test_conversations_train_on_the_assistants_turns_unless_told_otherwise(
    run: Runner, config_file: Path, tmp_path: Path
) -> None:
    conversations = tmp_path / "chat.jsonl"
    with conversations.open("w") as file:
        for line in (config_file.parent / "train.jsonl").read_text().splitlines():
            record = json.loads(line)
            messages = [
                {"role": "user", "content": record["prompt"]},
                {"role": "assistant", "content": record["completion"]},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    source = f"data.train={conversations}"
    config = load_run_config(config_file, [source])
    assert describe(config).data.loss == "the assistant's turns"
    config.train["assistant_only_loss"] = False
    assert describe(config).data.loss == "every token"
    answers = run("answers", source, "train.max_steps=1")
    everything = run("everything", source, "train.max_steps=1", "train.assistant_only_loss=false")
    assert answers.summary is not None
    assert everything.summary is not None
    assert answers.summary["eval_loss_before"] != everything.summary["eval_loss_before"]
    # The resolved config finds the same tokens again.
    again = load_run_config(tmp_path / "answers" / "config.yaml", [f"output.dir={tmp_path / 'again'}"])
    assert train(again, console=Console(quiet=True)).summary["eval_loss_before"] == answers.summary["eval_loss_before"]


def test_examples_without_a_label_are_named_before_the_model_is_loaded(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paca.training.run.load_model", None)
    expected = r"32 of 32 examples have no token .*\n  train\.jsonl, line 1: [\s\S]*data\.unusable: leave_out"
    with pytest.raises(PacaError, match=expected):
        run("a", "train.max_length=5")


def test_examples_without_a_label_may_be_left_out(run: Runner, config_file: Path, tmp_path: Path) -> None:
    source = config_file.parent / "train.jsonl"
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    lines += [{"prompt": "x" * 200, "completion": "y"}] * 3 + [{"prompt": "x", "completion": ""}] * 2
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = (f"data.train={file}", f"data.eval={source}", "train.max_steps=1")
    config = load_run_config(config_file, [*given, "data.unusable=leave_out"])
    assert dict(describe(config).lines())["training examples"] == "40 (3 left out)"
    config.train |= {"packing": True, "packing_strategy": "bfd_split"}
    assert describe(config).data.sample.cut == 0  # type: ignore[union-attr]
    summary = run("a", *given, "data.unusable=leave_out").summary
    assert summary is not None
    assert (summary["data"]["train_examples"], summary["data"]["eval_examples"]) == (40, 40)
    assert "; 2 left out, as nothing can be learned from them" in summary["data"]["description"]
    with pytest.raises(PacaError, match="line 44: completion is empty"):
        run("b", *given)


def test_a_loss_that_is_not_a_number_ends_the_run(run: Runner, tmp_path: Path) -> None:
    with pytest.raises(PacaError, match=r"The training loss is (nan|inf) at step \d+.*now 1e\+30"):
        run("a", "train.learning_rate=1e30", "train.max_grad_norm=0", "train.save_strategy=no")
    assert rows(tmp_path / "a")[-1]["loss"] is None
    assert not (tmp_path / "a" / "summary.json").exists()


def test_a_last_step_that_leaves_no_numbers_ends_the_run(run: Runner, tmp_path: Path) -> None:
    """Its own loss is that of the weights before it, and an adapter of NaN can't be loaded."""
    given = ("train.learning_rate=1e39", "train.max_grad_norm=0", "train.warmup_steps=0")
    with pytest.raises(PacaError, match=r"not finite after step 1: .*paca_delta.* They are not saved"):
        run("a", "train.max_steps=1", "train.save_strategy=no", *given)
    assert [row["loss"] for row in rows(tmp_path / "a") if "loss" in row] == [pytest.approx(4, abs=3)]
    assert not (tmp_path / "a" / "adapter").exists()
    with pytest.raises(PacaError, match="not finite after step 1"):
        run("b", "train.save_steps=1", *given)
    assert not [*(tmp_path / "b").glob("checkpoints/checkpoint-*")]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "paca.target_modules=[nothing]",
            r"The section paca does not fit .*nothing.* Its layers with weights are .*v_proj",
        ),
        ("paca.target_modules=[v_proj, q_prj]", r"no module named q_prj .*Did you mean q_proj\?"),
        ("paca.target_modules=q_prj", r"no module named q_prj .*Did you mean q_proj\?"),
        ("paca.target_modules=q_proj", r"is the text 'q_proj', a pattern that .* Give a list .*: \[q_proj\]"),
        ("paca.target_modules=q_proj,v_proj", r"is the text 'q_proj,v_proj', a pattern .*: \[q_proj,v_proj\]"),
        ("paca.r=1000", r"The section paca does not fit .*r=1000"),
        (
            "paca.target_modules=[lm_head]",
            r"The section paca does not fit .*An adapter on the output layer \(lm_head\)",
        ),
        ("train.optim=lomo", r"package that is not installed: .*lomo"),
        ("data.train=missing.jsonl", r"missing\.jsonl"),
        ("data.eval=40", r"Cannot hold 40 of 40"),
        ("model.name=./missing", r"\./missing"),
    ],
)
def test_what_does_not_fit_together_is_one_message(run: Runner, override: str, message: str) -> None:
    with pytest.raises(PacaError, match=message):
        run("a", override)


def test_the_plan_tells_of_held_out_examples_that_are_trained_on(config_file: Path) -> None:
    def shown(plan: Plan) -> str:
        output = io.StringIO()
        show_plan(plan, Console(file=output))
        return output.getvalue()

    config = load_run_config(config_file)
    assert "held-out examples are among them" not in describe(config).data.train.description
    assert "held-out examples are trained on" not in shown(describe(config))
    config.data.eval = config.data.train
    assert describe(config).data.train.description.endswith(
        "; 40 of the 40 held-out examples are among them, so trained on"
    )
    told = "Warning: 40 of the 40 held-out examples are trained on as well: their scores tell what was learnt by heart."
    advice = "Take them out of one of the two, or hold out a share of data.train instead (data.eval: 0.05)."
    assert f"\n{told} {advice}\n" in shown(describe(config))
    config.data.train, config.data.eval = [config.data.train] * 2, 1
    told = "Warning: 1 of the 1 held-out examples is trained on as well: their scores tell what was learnt by heart."
    assert f"\n{told} Remove the duplicates from data.train.\n" in shown(describe(config))
    told = "; 39 of them (49 %) are copies of earlier ones; 1 of the 1 held-out"
    assert told in describe(config).data.train.description


def test_a_step_has_no_more_examples_than_there_are(config_file: Path) -> None:
    plan = describe(load_run_config(config_file, ["train.per_device_train_batch_size=64"]))
    assert plan.sequences_per_step == plan.train_examples
    assert plan.data.sample is not None
    assert plan.tokens_per_step == round(plan.train_examples * plan.data.sample.mean)


def test_the_plan_counts_as_the_run_does(run: Runner, config_file: Path) -> None:
    overrides = ["train.max_steps=-1", "train.num_train_epochs=2", "train.per_device_train_batch_size=5"]
    overrides.append("train.gradient_accumulation_steps=2")
    plan = describe(load_run_config(config_file, overrides))
    result = run("a", *overrides)
    assert result.summary is not None
    assert plan.steps == result.summary["steps"] == 8
    assert plan.trainable_parameters == result.summary["trainable_parameters"]
    assert plan.parameters == result.summary["model"]["parameters"]
    assert plan.sequences_per_step == 10
    assert plan.tokens_per_step == round(10 * result.summary["tokens"] / (2 * 32))
    assert plan.targets == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_library_callers_keep_their_progress_bars(run: Runner) -> None:
    datasets.enable_progress_bars()  # another test of this process may have run the command line
    run("a", "train.max_steps=1")
    assert datasets.is_progress_bar_enabled()


def test_a_gguf_model_leaves_a_base_that_the_adapter_names(
    run: Runner,
    tmp_path: Path,
    mergeable_base: Path,  # noqa: F811
) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", mergeable_base)
    result = run("a", f"model.name={source}", "train.max_steps=2", stop_at=1)
    assert result.resume_command is not None
    base = tmp_path / "a" / "base"
    written = (base / "model.safetensors").stat().st_mtime_ns
    result = run("a", f"model.name={source}", "train.max_steps=2", resume=True)
    assert (base / "model.safetensors").stat().st_mtime_ns == written
    assert result.summary is not None
    assert result.summary["model"]["source"] == "gguf"
    settings = json.loads((tmp_path / "a" / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    run("whole", f"model.name={source}", "train.max_steps=2")
    assert same_adapter(tmp_path / "a", tmp_path / "whole")
    assert (tmp_path / "whole" / "base" / "model.safetensors").samefile(base / "model.safetensors")


def test_fields_of_messages_that_are_not_used_are_in_the_plan(config_file: Path, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "b", "weight": 0}
    record = {"messages": [{"role": "user", "content": "a"}, answer]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(record))
    plan = describe(load_run_config(config_file, [f"data.train={tmp_path / 'chat.jsonl'}", "data.eval=null"]))
    assert plan.data.train.description.endswith("; the template does not use these fields of messages: weight")
