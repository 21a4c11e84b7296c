"""Plans of runs whose trainer holds the model against another, or lets it answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from paca.cli import app
from paca.messages.errors import PacaError
from paca.planning import estimate
from paca.planning.step_trace import WEIGHTS
from paca.planning.target import Target
from paca.training.planned_run import target_of_run

Planned = Callable[..., Target]


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


def test_answers_that_are_made_together_take_memory_together(planned: Planned) -> None:
    few = planned("grpo", "train.max_completion_length=64")
    assert (few.setting.answers, few.setting.answer_length) == (4, 64)
    assert few.setting.sequence_length > 64
    assert (few.lengths or "").endswith(", with an answer of 64 tokens")
    shape = few.model.config
    heads, width = shape.num_key_value_heads, shape.hidden_size // shape.num_attention_heads
    token = 2 * shape.num_hidden_layers * heads * width * 4
    for length, passes, most_when in ((64, 100, "prompts are read"), (2000, 2000, "the last token is made")):
        changes = (f"train.max_completion_length={length}", f"train.gradient_accumulation_steps={passes}")
        many = planned("grpo", *changes)
        answers = many.setting.answers
        assert answers == 4 * passes
        result = estimate(many.model, many.setting, many.adapter)
        assert result.moment == "making answers"
        held, tokens = result.parts["keys and values"], many.setting.sequence_length
        if most_when == "prompts are read":
            assert held == answers * token * (tokens - length)
        else:  # each layer's keys and values grow by being copied
            assert answers * token * (tokens - 1) <= held <= 1.6 * answers * token * tokens
        assert result.total > total_of(few)


def test_what_is_printed_says_what_is_in_a_pass(workspace: Path) -> None:
    for name, said in (("dpo", "2 pairs of 2 x "), ("grpo", "4 answers of up to 6 tokens are made at a time.")):
        printed = CliRunner().invoke(app, ["plan", str(workspace / f"{name}.yaml"), "--rate", "1"])
        assert said in " ".join(printed.stdout.split())


@pytest.mark.parametrize(
    ("changes", "seq", "message"),
    [
        (["data.train=openai/gsm8k:main"], None, "How long the prompts are is not known: openai/gsm8k.*Give --seq"),
        ([], 6, "Sequences of 6 tokens leave no room for a prompt"),
        (["train.use_vllm=true"], None, "not foretold: train.use_vllm makes answers in memory of its own"),
        (["train.reward_funcs=someone/judge"], None, "the reward model someone/judge is held beside it"),
        (["train.max_completion_length=null"], None, "train.max_completion_length is null"),
    ],
)
def test_a_plan_of_answers_that_can_not_be_made_says_why(
    planned: Planned, changes: list[str], seq: int | None, message: str
) -> None:
    with pytest.raises(PacaError, match=message):
        planned("grpo", *changes, seq=seq)


def test_log_probabilities_have_no_other_loss(workspace: Path) -> None:
    refused = CliRunner().invoke(app, ["plan", str(workspace / "dpo.yaml"), "--loss", "full"])
    assert "train.trainer: dpo never holds all logits" in str(refused.exception)
