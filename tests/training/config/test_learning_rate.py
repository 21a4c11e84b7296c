"""The rate of a run that gives none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainingArguments

from paca.messages.errors import PacaError
from paca.pretrained.location import locate
from paca.pretrained.weight_size import weight_size
from paca.training import describe, load_run_config
from paca.training.config.learning_rate import automatic_rate, of_adam
from paca.training.plan import show_plan
from paca.training.trainers import TRAINERS
from training.tiny_run import save_workspace


@pytest.mark.parametrize(
    ("adapter", "size", "rate"),
    [
        ({}, 0.204, 0.0051),  # SmolLM2-135M; r 16, alpha 16
        ({"r": 64, "paca_alpha": 64}, 0.204, 0.0013),
        ({"r": 64}, 0.204, 0.0051),  # alpha 16: the columns move by a quarter of their delta
        ({"r": 8, "paca_alpha": 16}, 0.204, 0.0051),
        ({"r": 64, "paca_alpha": 64}, 0.0369, 0.00023),  # Gemma 3 270M
        ({}, None, 0.00075),
    ],
)
def test_the_rate_of_paca_follows_the_weights_and_falls_with_alpha(
    adapter: dict[str, Any], size: float | None, rate: float
) -> None:
    assert automatic_rate(TRAINERS["sft"], "paca", adapter, size)[0] == rate


@pytest.mark.parametrize(
    ("trainer", "method", "rate"),
    [("sft", "peft", 3e-4), ("sft", "full", 2e-5), ("dpo", "peft", 1e-5), ("grpo", "peft", 1e-5),
     ("image_classification", "full", TrainingArguments.learning_rate)],
)  # fmt: skip
def test_other_methods_and_trainers_have_a_constant(trainer: str, method: str, rate: float) -> None:
    assert automatic_rate(TRAINERS[trainer], method, {"r": 64})[0] == rate


@pytest.mark.parametrize(
    ("adapter", "rate"),
    [
        ({"r": 8, "lora_alpha": 16}, 0.002),  # SmolLM2-135M
        ({"r": 33, "lora_alpha": 66}, 0.00098),
        ({"r": 208, "lora_alpha": 416}, 0.00039),
        ({}, 0.004),  # PEFT's r 8 and alpha 8: half the scale
        ({"r": 64, "lora_alpha": 16, "use_rslora": True}, 0.00071),
        ({"r": 8, "lora_alpha": 16, "use_dora": True}, 3e-4),
        ({"r": 8, "lora_alpha": 16, "init_lora_weights": "pissa"}, 3e-4),
        ({"r": 0}, 3e-4),  # which PEFT refuses
    ],
)
def test_that_of_lora_follows_them_too_and_falls_with_the_root_of_r(adapter: dict[str, Any], rate: float) -> None:
    assert automatic_rate(TRAINERS["sft"], "lora", adapter, 0.204)[0] == rate


@pytest.mark.parametrize("trainer", ["classification", "reward"])
def test_a_head_of_a_language_model_learns_at_the_same_rate(trainer: str) -> None:
    same = automatic_rate(TRAINERS["sft"], "paca", {}, 0.204)
    assert automatic_rate(TRAINERS[trainer], "paca", {}, 0.204) == same


@pytest.mark.parametrize("trainer", ["dpo", "grpo"])
def test_preferences_and_rewards_are_learned_at_a_tenth_of_the_rate_of_answers(trainer: str) -> None:
    rate, rule = automatic_rate(TRAINERS[trainer], "paca", {"r": 64, "paca_alpha": 64}, 0.204)
    assert rate == 0.00013  # SmolLM2-135M: at 1e-4 it learned, at 1e-5 next to nothing
    assert rule.startswith("0.04 × 0.2 / paca_alpha")
    assert automatic_rate(TRAINERS["dpo"], "lora", {"r": 33, "lora_alpha": 66}, 0.204)[0] == 0.000098


def test_images_are_learned_faster() -> None:
    rate, rule = automatic_rate(TRAINERS["image_classification"], "paca", {"r": 8, "paca_alpha": 8}, 0.118)
    assert rate == 0.018  # EfficientNet-Lite0; 0.0195 was the best of a grid
    assert rule.startswith("1.2 × 0.12 / paca_alpha")
    rate, rule = automatic_rate(TRAINERS["image_classification"], "lora", {"r": 8, "lora_alpha": 16}, 0.118)
    assert rate == 0.0061  # 5e-3 was the best of a grid
    assert rule.startswith("0.1 × √(0.12 × r) / lora_alpha; 0.12 is the root")


@pytest.mark.parametrize("given", ["", "  learning_rate: auto\n"])
def test_the_plan_says_the_rate_and_its_rule(tmp_path: Path, given: str) -> None:
    config = save_workspace(tmp_path)
    config.write_text(config.read_text().replace("  learning_rate: 1e-2\n", given))
    plan = describe(load_run_config(config, ["paca.r=8"]))
    size = weight_size(locate(plan.config.model.name))
    assert size is not None
    rate = plan.config.train["learning_rate"]
    assert rate == pytest.approx(0.4 * size / 16, rel=0.05)
    known = f"{size:.2g} is the root mean square of the weights"
    assert dict(plan.lines())["learning rate"] == f"{rate:g} (auto: 0.4 × {size:.2g} / paca_alpha; {known})"
    assert "learning_rate" not in dict(plan.lines())["defaults of paca"]


def test_a_rule_says_that_it_was_made_for_adamw(tmp_path: Path) -> None:
    config = save_workspace(tmp_path)
    config.write_text(config.read_text().replace("learning_rate: 1e-2", "optim: sgd"))
    line = dict(describe(load_run_config(config)).lines())["learning rate"]
    assert line.endswith("root mean square of the weights; AdamW's: sgd may want another by far)")
    assert of_adam("a rule", "paged_adamw_8bit") == "a rule"


@pytest.mark.parametrize(("alpha", "told"), [(4, ""), (16, " × r / paca_alpha")])
def test_factors_have_the_rate_of_lora(tmp_path: Path, alpha: int, told: str) -> None:
    config = save_workspace(tmp_path)
    text = config.read_text().replace("learning_rate: 1e-2", "factor_rank: 2")
    config.write_text(text)
    plan = describe(load_run_config(config, ["paca.r=4", f"paca.paca_alpha={alpha}"]))
    lines, rate = dict(plan.lines()), plan.config.train["learning_rate"]
    lora = describe(
        load_run_config(config, ["paca=null", "lora.r=2", f"lora.lora_alpha={alpha}", "train.factor_rank=null"])
    )
    assert rate == lora.config.train["learning_rate"]  # the alpha that gives LoRA the scale of the factors
    assert f"factor_rank) / (2 × factor_rank){told}; " in lines["learning rate"]
    assert lines["factors"].startswith("of rank 2: ")


def test_a_rate_that_is_given_stays(tmp_path: Path) -> None:
    plan = describe(load_run_config(save_workspace(tmp_path)))
    assert plan.config.train["learning_rate"] == 0.01
    assert dict(plan.lines())["learning rate"] == "0.01 (auto would be 0.0038)"


@pytest.mark.parametrize(
    ("rate", "told"),
    [
        (50, "is it right? It is 13,158 times as high"),
        (3.8e27, "is it right? It is 1.0e+30 times as high"),
        (1e-5, "is it right? It is 380 times as low"),
    ],
)
def test_a_rate_far_from_the_automatic_one_is_asked_about(tmp_path: Path, rate: float, told: str) -> None:
    plan = describe(load_run_config(save_workspace(tmp_path), [f"train.learning_rate={rate}"]))
    assert dict(plan.lines())["learning rate"] == f"{rate:g} (auto would be 0.0038: {told})"
    with (console := Console(width=500)).capture() as shown:
        show_plan(plan, console)
    times = told.removeprefix("is it right? It is ")
    warning = f"Warning: train.learning_rate is {times} as the automatic one (auto would be 0.0038)."
    assert warning in shown.get().splitlines()


def test_a_rate_of_0_is_said_to_teach_nothing(tmp_path: Path) -> None:
    plan = describe(load_run_config(save_workspace(tmp_path), ["train.learning_rate=0"]))
    with (console := Console(width=500)).capture() as shown:
        show_plan(plan, console)
    assert "Warning: train.learning_rate is 0: this run learns nothing." in shown.get()


def test_no_rate_of_another_method_is_far_as_its_automatic_one_follows_no_rule(tmp_path: Path) -> None:
    config = save_workspace(tmp_path)
    config.write_text(config.read_text().replace("paca:\n  r: 4", "peft:\n  peft_type: LOHA\n  r: 4"))
    assert dict(describe(load_run_config(config)).lines())["learning rate"] == "0.01 (auto would be 0.0003)"


def test_another_word_than_auto_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PacaError, match=r"train\.learning_rate must be a number or auto, not the text 'atuo'"):
        load_run_config(save_workspace(tmp_path), ["train.learning_rate=atuo"])
