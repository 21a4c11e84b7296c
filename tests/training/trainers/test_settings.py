"""Keys of `train:` by trainer, and data that a trainer can't learn from: refused with the key and the record named."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerState
from trl import DPOConfig

from models import llama
from paca.messages.errors import PacaError
from paca.training import RunConfig, describe, load_run_config, train
from paca.training.config.train_settings import keys_of, training_arguments, with_defaults
from paca.training.trainers import TRAINERS
from paca.training.trainers.kind import TrainerKind
from tiny_checkpoint import byte_tokenizer


def load(workspace: Path, name: str, *overrides: str) -> RunConfig:
    return load_run_config(workspace / f"{name}.yaml", overrides)


def with_data(workspace: Path, tmp_path: Path, name: str, records: list[dict[str, Any]], *overrides: str) -> RunConfig:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return load(workspace, name, f"data.train={tmp_path / 'data.jsonl'}", "data.eval=null", *overrides)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        (
            "dpo",
            "train.trainer=dqo",
            "train.trainer must be one of sft, dpo, grpo, .*, not the text 'dqo'. Did you mean dpo",
        ),
        ("dpo", "train.packing=true", "train.packing is a setting of train.trainer: sft, not of dpo"),
        ("dpo", "train.num_generations=4", "train.num_generations is a setting of train.trainer: grpo, not of dpo"),
        ("dpo", "train.betta=0.1", r"there is no key train.betta. Did you mean train.beta\?"),
        ("classification", "train.beta=0.1", "train.beta is a setting of train.trainer: dpo or grpo"),
        ("image_classification", "train.train_sampling_strategy=group_by_length", "group_by_length is for texts"),
        ("image_classification", "train.remove_unused_columns=true", "would remove the images"),
        ("image_classification", "train.max_length=9", "train.max_length is a setting of train.trainer: sft or dpo"),
        ("dpo", "train.model_init_kwargs={}", "train.model_init_kwargs can't be set here"),
        ("classification", "train.max_length=0", "train.max_length must be above zero"),
        ("grpo", "train.reward_funcs=null", "train.reward_funcs must be"),
        ("grpo", "train.reward_funcs=[]", "needs train.reward_funcs, one or a list of: exact_match, .*function"),
        ("grpo", "train.reward_weights=[1.0]", "--set: train.reward_weights has 1 number, and train.reward_funcs 2:"),
        ("grpo", "train.answer_pattern='('", "'\\(' is no regular expression"),
    ],
)
def test_keys_belong_to_their_trainer(workspace: Path, name: str, override: str, message: str) -> None:
    with pytest.raises(PacaError, match=message):
        load(workspace, name, override)


@pytest.mark.parametrize("kind", TRAINERS.values(), ids=list(TRAINERS))
def test_every_default_is_a_key(kind: TrainerKind) -> None:
    settings = with_defaults({"trainer": kind.name}, llama(), has_eval=True)
    assert settings.keys() <= keys_of(kind.name).keys()
    assert settings["trainer"] == kind.name


def test_the_arguments_are_the_trainers_own(tmp_path: Path) -> None:
    arguments = training_arguments(with_defaults({"trainer": "dpo", "beta": 0.3}, llama(), has_eval=False), tmp_path)
    assert type(arguments) is DPOConfig
    assert arguments.beta == 0.3


@pytest.mark.parametrize(
    ("name", "records", "message"),
    [
        ("dpo", [{"prompt": "a", "completion": "b"}], "columns: prompt, completion(?s:.*)preference: prompt, chosen"),
        ("reward", [{"text": "a"}], "columns: text(?s:.*)preference: prompt, chosen, rejected"),
        ("grpo", [{"text": "a", "answer": "b"}], "columns: text, answer(?s:.*)prompt: prompt"),
        ("grpo", [{"prompt": "a"}], "exact_match needs the column answer, which .*data.jsonl has not"),
        ("grpo", [{"prompt": "a", "answer": "b"}, {"prompt": "c"}], "data.jsonl, line 2: answer is missing"),
        ("dpo", [{"prompt": "a", "chosen": "b", "rejected": "b"}], "line 1: chosen and rejected are the same"),
        ("classification", [{"text": "a", "label": "x"}] * 2, "has one label, \\['x'\\]; a classifier needs two"),
        ("classification", [{"text": "a", "label": "x"}, {"text": " ", "label": "y"}], "line 2: text is empty"),
        ("classification", [{"text": "a"}], "columns: text(?s:.*)text-label: text, label"),
    ],
)
def test_data_that_lacks_something_is_refused(
    workspace: Path, tmp_path: Path, name: str, records: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(PacaError, match=message):
        describe(with_data(workspace, tmp_path, name, records))


def test_a_label_that_training_lacks_is_named(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text('{"text": "a", "label": "animal"}\n{"text": "b", "label": "animall"}\n')
    config = load(workspace, "classification", f"data.eval={tmp_path / 'eval.jsonl'}")
    with pytest.raises(PacaError, match=r"eval.jsonl, line 2: its label is 'animall', .* animal, other"):
        describe(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.reward_funcs=exact_mach", r"no 'exact_mach'. Did you mean 'exact_match'\?"),
        ("train.reward_funcs=rewards_of_tests:missing", "rewards_of_tests:missing can't be imported: .*working folder"),
        ("train.reward_funcs=no.such.module:f", "no.such.module:f can't be imported"),
        ("train.reward_funcs=rewards_of_tests:__doc__", "__doc__ is no function, but"),
        ("train.reward_funcs=accuracy_reward", "accuracy_reward needs the (package math-verify|column solution)"),
    ],
)
def test_rewards_that_are_not_there_are_refused(workspace: Path, override: str, message: str) -> None:
    with pytest.raises(PacaError, match=message):
        describe(load(workspace, "grpo", override))


def test_trls_rewards_read_messages_only(workspace: Path, tmp_path: Path) -> None:
    config = with_data(
        workspace, tmp_path, "grpo", [{"prompt": "a", "answer": "b"}], "train.reward_funcs=think_format_reward"
    )
    with pytest.raises(PacaError, match=r"reads answers that are messages, and the prompts of .* are text"):
        describe(config)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("reward", "model.quantization=nf4", "model.quantization does not go with train.trainer: reward"),
        ("dpo", "data.label=kind", "data.label goes with train.trainer: image_classification, not dpo"),
        ("dpo", "eval.metric=exact_match", "eval.metric goes with train.trainer: sft; dpo measures rewards/acc"),
        ("dpo", "paca.selection=activation_norm", "goes by batches as train.trainer: sft makes them"),
        ("image_classification", "model.lean=true", "lean"),
        ("grpo", "train.num_generations=3", "4 answers are made .* train.num_generations: 3 does not divide it"),
        ("classification", "data.template=chatml", "data.template has no effect with train.trainer: classification"),
        ("image_classification", "data.format=messages", "data.format is of texts"),
        ("image_classification", "data.template=nosuch", "data.template has no effect with train.trainer: image"),
    ],
)
def test_what_does_not_go_together_is_refused(workspace: Path, name: str, override: str, message: str) -> None:
    with pytest.raises(PacaError, match=message):
        describe(load(workspace, name, override))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dpo", ["chosen answers against rejected ones", "the model without its adapter"]),
        ("grpo", ["the model's own answers, by exact_match, rewards_of_tests:length"]),
        ("reward", ["the score of chosen answers above that of rejected ones", "score"]),
        ("classification", ["the right one of 2 labels", "score"]),
        ("image_classification", ["the right one of 2 labels", "classifier", "32 images with 2 labels: blue, red"]),
    ],
)
def test_a_dry_run_says_what_is_learned(workspace: Path, name: str, expected: list[str]) -> None:
    texts = [text for _, text in describe(load(workspace, name)).lines()]
    for words in expected:
        assert any(words in text for text in texts)


@pytest.mark.parametrize("steps", [-1, 2])
@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "grpo",
            ["train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=16"],
            r"128 answers are made at a time .*, 4 to a prompt .*: that takes 32 prompts, and there are 10\.",
        ),
        (
            "classification",
            ["train.per_device_train_batch_size=64", "train.dataloader_drop_last=true"],
            r"24 training examples don't fill a batch \(train\.per_device_train_batch_size: 64, .*dataloader_drop_last",
        ),
    ],
)
def test_fewer_examples_than_a_batch_are_refused(
    workspace: Path, name: str, settings: list[str], message: str, steps: int
) -> None:
    with pytest.raises(PacaError, match=message):
        describe(load(workspace, name, f"train.max_steps={steps}", *settings))


@pytest.mark.parametrize(
    ("settings", "between"),
    [
        ({"gradient_accumulation_steps": 2}, []),
        ({"steps_per_generation": 2}, [1, 3]),
        ({"num_iterations": 3}, [1, 2, 4]),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 2}, [1, 2, 3]),
    ],
)
def test_a_run_of_grpo_that_is_resumed_between_two_generations_says_so(
    tmp_path: Path, settings: dict[str, int], between: list[int]
) -> None:
    arguments = training_arguments({"trainer": "grpo", "num_generations": 4, **settings}, tmp_path)
    states = [TrainerState(global_step=step, max_steps=9) for step in range(1, 5)]
    told = [TRAINERS["grpo"].resuming(arguments, state) for state in states]
    assert [step for step, text in enumerate(told, 1) if text.endswith("made anew.")] == between
    assert all(text.startswith(f"Resuming after step {step} of 9.") for step, text in enumerate(told, 1))


@pytest.mark.parametrize(
    ("settings", "examples", "steps"),
    [
        ({"per_device_train_batch_size": 4}, 10, 10),
        ({"per_device_train_batch_size": 8}, 10, 5),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 10, 5),
        ({"per_device_train_batch_size": 4, "num_iterations": 2}, 10, 20),
        ({"per_device_train_batch_size": 4, "steps_per_generation": 3, "gradient_accumulation_steps": 1}, 10, 9),
    ],
)
def test_steps_of_grpo_are_counted_as_trl_counts_them(
    workspace: Path, tmp_path: Path, settings: dict[str, int], examples: int, steps: int
) -> None:
    """Against the length of TRL's own loader, which repeats and groups prompts."""
    records = [{"prompt": "a", "answer": str(number)} for number in range(examples)]
    overrides = [f"train.{name}={value}" for name, value in settings.items()]
    config = with_data(
        workspace, tmp_path, "grpo", records, "train.max_steps=-1", "train.num_train_epochs=1", *overrides
    )
    plan = describe(config)
    assert plan.steps == steps
    kind = TRAINERS["grpo"]
    scope = kind.read(plan.config)
    trainer = kind.make(
        plan.config,
        None,
        scope,
        model=llama(vocab_size=300),
        args=training_arguments(plan.config.train, tmp_path),
        processing_class=byte_tokenizer(),
        callbacks=[],
    )
    batches = len(trainer.get_train_dataloader())
    assert -(-batches // plan.config.train["gradient_accumulation_steps"]) == steps


def test_pairs_that_trl_would_drop_are_named(workspace: Path, tmp_path: Path) -> None:
    records = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a" * 50, "chosen": "b", "rejected": "c"}]
    for name in ("dpo", "reward"):
        config = with_data(workspace, tmp_path, name, records, "train.max_length=20", f"output.dir={tmp_path / name}")
        with pytest.raises(PacaError, match=r"data.jsonl, line 2: .* 20 tokens. 1 of 2 pairs would be left out"):
            train(config, console=Console(quiet=True))


def test_no_length_beyond_the_models_positions_is_advised(workspace: Path, tmp_path: Path) -> None:
    records = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a" * 300, "chosen": "b", "rejected": "c"}]
    config = with_data(workspace, tmp_path, "dpo", records, "train.max_length=256", f"output.dir={tmp_path / 'run'}")
    with pytest.raises(PacaError, match=r"left out so. The model was made for 256 positions, so shorten or remove"):
        train(config, console=Console(quiet=True))


@pytest.mark.parametrize(("mode", "ends"), [("keep_start", ("c" * 30 + "x", "c" * 30 + "y")), ("keep_end", None)])
def test_answers_that_differ_only_where_they_are_cut_off_are_refused(
    workspace: Path, tmp_path: Path, mode: str, ends: tuple[str, str] | None
) -> None:
    chosen, rejected = ends or ("x" + "c" * 30, "y" + "c" * 30)
    records = [{"prompt": "a", "chosen": chosen, "rejected": rejected}]
    records += [{"prompt": "a", "chosen": "b", "rejected": other} for other in ("c", "d")]
    cut = ("data.eval=null", "train.max_steps=1", "train.max_length=20", f"train.truncation_mode={mode}")
    config = with_data(workspace, tmp_path, "dpo", records, *cut, f"output.dir={tmp_path / 'run'}")
    with pytest.raises(PacaError, match=r"line 1: chosen and rejected are the same once they are cut .* 1 of 3 pairs"):
        train(config, console=Console(quiet=True))
    for changed, count in (("data.unusable=leave_out", 2), ("train.max_length=60", 3)):
        config = with_data(workspace, tmp_path, "dpo", records, *cut, f"output.dir={tmp_path / str(count)}", changed)
        summary = train(config, console=Console(quiet=True)).summary
        assert summary is not None
        assert summary["data"]["train_examples"] == count


def test_texts_that_teach_nothing_may_be_left_out(workspace: Path, tmp_path: Path) -> None:
    records = [{"text": text, "label": label} for text, label in (("a", "x"), ("", "x"), ("b", "y"))]
    changed = ("data.eval=null", "data.unusable=leave_out")
    plan = describe(with_data(workspace, tmp_path, "classification", records, *changed))
    assert plan.train_examples == 2
    assert "1 left out, as nothing can be learned from them" in plan.data.train.description


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_pairs_that_teach_nothing_may_be_left_out(workspace: Path, tmp_path: Path, name: str) -> None:
    records = [{"prompt": "a", "chosen": "b", "rejected": other} for other in ("c", "d", "b", "")]
    records.append({"prompt": "a" * 50, "chosen": "b", "rejected": "c"})
    held_out = [*records[:2], records[-1]]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(record) + "\n" for record in held_out))
    changed = ("train.max_length=20", "train.max_steps=1", f"output.dir={tmp_path / name}")
    changed += (f"data.eval={tmp_path / 'eval.jsonl'}", "data.unusable=leave_out")
    config = with_data(workspace, tmp_path, name, records, *changed)
    text = io.StringIO()
    summary = train(config, console=Console(file=text, width=200)).summary
    assert summary is not None
    said = "1 training and 1 held-out examples are too long for train.max_length, and left out."
    data = summary["data"]
    assert (data["train_examples"], data["eval_examples"], data["left_out"]) == (2, 2, said)
    assert summary["scores"]["after"]["examples"] == 2
    assert "2 left out, as nothing can be learned from them" in text.getvalue()
    assert said in text.getvalue()
