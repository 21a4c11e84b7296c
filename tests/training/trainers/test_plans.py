"""Plans of runs whose trainer holds the model against another, or lets it answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig
from typer.testing import CliRunner

from paca.cli import app
from paca.messages.errors import PacaError
from paca.planning import estimate
from paca.planning.memory_estimate import prepare_model, root_of, trace_step
from paca.planning.step_trace import GRADIENTS, WEIGHTS
from paca.planning.target import Target
from paca.training.planned_run import target_of_run

Planned = Callable[..., Target]
RATES = ("--rate", "1", "--bandwidth", "1")  # nothing is measured


@pytest.fixture
def planned(workspace: Path) -> Planned:
    """The target of the run of a name, with settings changed."""

    def target(name: str, *changes: str, seq: int | None = None) -> Target:
        return target_of_run(workspace / f"{name}.yaml", changes, "cpu", seq, None)

    return target


@pytest.fixture
def in_full(workspace: Path, tmp_path: Path) -> Callable[[str], Path]:
    """The config of a name, that trains all of the model."""

    def write(name: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text((workspace / f"{name}.yaml").read_text().replace("paca: {r: 4}", "full: {}"))
        return path

    return write


def total_of(target: Target, part: str | None = None) -> int:
    result = estimate(target.model, target.setting, target.adapter)
    return result.total if part is None else result.parts[part]


def test_pairs_are_held_against_the_model_without_its_adapter(planned: Planned) -> None:
    target = planned("dpo")
    assert target.setting.reference == "without adapter"
    assert target.setting.tokens_per_pass == 2 * 2 * target.setting.sequence_length
    computed_before = planned("dpo", "train.precompute_ref_log_probs=true")
    assert computed_before.setting.reference is None
    once, twice = (estimate(each.model, each.setting, each.adapter) for each in (computed_before, target))
    assert 1.3 * once.flops < twice.flops < 1.6 * once.flops  # one forward pass more
    assert once.parts[WEIGHTS] == twice.parts[WEIGHTS]


def test_a_model_that_is_trained_whole_is_held_twice(in_full: Callable[[str], Path], planned: Planned) -> None:
    target = target_of_run(in_full("dpo"), [], "cpu", None, None)
    assert target.setting.reference == torch.float32
    trained = sum(parameter.numel() for parameter in target.model.parameters()) * 4
    assert total_of(target, WEIGHTS) == pytest.approx(
        trained, rel=0.01
    )  # the parameters that are trained not among them
    grpo = in_full("grpo")
    without, against = (target_of_run(grpo, [f"train.beta={beta}"], "cpu", None, None) for beta in (0.0, 0.1))
    assert (without.setting.reference, against.setting.reference) == (None, torch.float32)
    assert planned("grpo", "train.beta=0.1").setting.reference is None


@pytest.mark.slow(reason="simulates models over and over")
def test_answers_that_are_made_together_take_memory_together(planned: Planned) -> None:
    few = planned("grpo", "train.max_completion_length=64")
    assert few.setting.answering is not None
    assert (few.setting.answers, few.setting.answering.length) == (4, 64)
    assert few.setting.sequence_length > 64
    assert (few.lengths or "").endswith(", with an answer of 64 tokens")
    shape = few.model.config
    heads, width = shape.num_key_value_heads, shape.hidden_size // shape.num_attention_heads
    token = 2 * shape.num_hidden_layers * heads * width * 4
    for length, passes, most_when in ((64, 100, "reading prompts"), (2000, 2000, "making answers")):
        changes = (f"train.max_completion_length={length}", f"train.gradient_accumulation_steps={passes}")
        many = planned("grpo", *changes)
        answers = many.setting.answers
        assert answers == 4 * passes
        result = estimate(many.model, many.setting, many.adapter)
        assert result.moment == most_when
        held, tokens = result.parts["keys and values"], many.setting.sequence_length
        if most_when == "reading prompts":
            assert held == answers * token * (tokens - length)
        else:  # each layer's keys and values grow by being copied
            assert answers * token * (tokens - 1) <= held <= 1.6 * answers * token * tokens
        assert result.total > total_of(few)


def test_what_is_printed_says_what_is_in_a_pass(workspace: Path) -> None:
    for name, said in (("dpo", "2 pairs of 2 x "), ("grpo", "4 answers of up to 6 tokens are made at a time.")):
        printed = CliRunner().invoke(app, ["plan", str(workspace / f"{name}.yaml"), *RATES])
        assert said in " ".join(printed.stdout.split())


@pytest.mark.parametrize(
    ("changes", "seq", "message"),
    [
        (["data.train=openai/gsm8k:main"], None, "How long the prompts are is not known: openai/gsm8k.*Give --seq"),
        ([], 6, "Sequences of 6 tokens leave no room for a prompt"),
        (["train.use_vllm=true"], None, "not foretold: with train.use_vllm answers take other memory"),
        (["train.reward_funcs=someone/judge"], None, "the reward model someone/judge is held beside it"),
        (["train.max_completion_length=null"], None, "train.max_completion_length is null"),
        (["train.num_generations=3"], 64, "4 answers are made at a time"),
        (["train.num_generations=3"], None, "4 answers are made at a time"),
    ],
)
def test_a_plan_of_answers_that_can_not_be_made_says_why(
    planned: Planned, changes: list[str], seq: int | None, message: str
) -> None:
    with pytest.raises(PacaError, match=message):
        planned("grpo", *changes, seq=seq)


@pytest.mark.slow(reason="simulates models over and over")
def test_what_a_search_finds_is_what_a_run_trains(workspace: Path, planned: Planned) -> None:
    run = workspace / "grpo.yaml"
    command = ["plan", str(run), "--memory", "2GiB", "--global-batch", "8", *RATES, "--lean"]
    lines = CliRunner().invoke(app, command).stdout.partition("In a run's YAML:")[2]
    settings = yaml.safe_load("\n".join(line[2:] for line in lines.strip("\n").splitlines()))
    changes = [f"{section}.{key}={value}" for section, keys in settings.items() for key, value in keys.items()]
    assert planned("grpo", *changes).setting.answers == 8
    passes = ["--set", "train.steps_per_generation=2", "--json"]
    tried = json.loads(CliRunner().invoke(app, [*command, *passes]).stdout)["candidates"]
    assert all(one["setting"]["answers"] == 2 * one["setting"]["batch_size"] for one in tried)
    assert not any(one["setting"]["answers"] % 4 for one in tried)
    none = CliRunner().invoke(app, [*command[:4], "--global-batch", "6", *RATES])
    assert "No batch of the 6 answers" in str(none.exception)


def test_gradients_wait_where_answers_are_made_within_a_step(planned: Planned) -> None:
    passes = ("train.gradient_accumulation_steps=4", "train.max_completion_length=2000")
    whole, within = (
        planned("grpo", *passes, f"train.generation_batch_size={count}", "train.num_generations=2") for count in (64, 8)
    )
    assert (whole.setting.answers_within_a_step, within.setting.answers_within_a_step) == (False, True)
    traces = [
        trace_step(root_of(prepare_model(each.model, each.adapter)), each.setting).peaks["making answers"]
        for each in (whole, within)
    ]
    assert [trace[GRADIENTS] > 0 for trace in traces] == [False, True]


def test_dropout_counts_where_the_trainer_leaves_it_on(planned: Planned) -> None:
    assert planned("dpo").setting.disable_dropout
    assert not planned("dpo", "train.disable_dropout=false").setting.disable_dropout
    assert not planned("grpo").setting.disable_dropout
    target = planned("dpo")
    adapter = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    off, on = (
        estimate(target.model, replace(target.setting, disable_dropout=disabled), adapter).activations
        for disabled in (True, False)
    )
    assert off < on


def test_label_smoothing_is_no_matter_of_pairs(planned: Planned) -> None:
    assert planned("dpo", "train.label_smoothing_factor=0.1").setting.chunked_loss


def test_log_probabilities_have_no_other_loss(workspace: Path) -> None:
    refused = CliRunner().invoke(app, ["plan", str(workspace / "dpo.yaml"), "--loss", "full"])
    assert "train.trainer: dpo never holds all logits" in str(refused.exception)
