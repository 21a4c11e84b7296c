"""Families whose classes say otherwise what TRL's loss asks of a model, or whose linear layers are classes of their
own: a first run, with the defaults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessor

from families.shrunk import write_first_run
from paca.planning import estimate
from paca.pretrained.generation import load_for_generation
from paca.pretrained.missing_weights import heads_of
from paca.training import describe, load_run_config, train
from paca.training.planned_run import target_of_run

MIXTURES = ("llama4_text", "phimoe", "granitemoe")


@pytest.mark.parametrize("family", [*MIXTURES, "doge", "falcon"])  # of Doge one without experts
def test_a_first_run_trains_and_is_planned(family: str, tmp_path: Path) -> None:
    config = write_first_run(family, tmp_path)
    lines = dict(describe(load_run_config(config)).lines())
    assert ("experts" in lines) == (family in MIXTURES)
    result = train(load_run_config(config), console=Console(quiet=True))
    assert result.summary["eval_loss_after"] < result.summary["eval_loss_before"]
    target = target_of_run(config, ["model.dtype=bfloat16"], "cpu", None, None)
    assert estimate(target.model, target.setting, target.adapter).saved
    named = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert not any("router" in name for name in named)
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    loaded = load_for_generation(tmp_path / "run").model.config.to_dict()
    assert ("num_experts" in loaded) == ("num_experts" in saved)


def test_a_run_of_experts_says_which_it_adapts_and_takes_factors(tmp_path: Path) -> None:
    named = "target_parameters=[experts.down_proj, experts.gate_up_proj]"
    config = write_first_run("mixtral", tmp_path)
    of_lora = ["paca=null", f"lora.{named}", "lora.target_modules=[]", "lora.lora_dropout=0"]
    changed = [f"paca.{named}", "paca.target_modules=[q_proj]", "train.factor_rank=1"]
    for overrides, targets, layers in ((of_lora, [], 2), (changed, ["q_proj"], 3)):
        plan = describe(load_run_config(config, overrides))
        assert plan.targets == [*targets, "experts.gate_up_proj", "experts.down_proj"]
        assert plan.adapted_layers == 2 * layers
    result = train(load_run_config(config, changed), console=Console(quiet=True))
    assert result.summary["eval_loss_after"] < result.summary["eval_loss_before"]


PART = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = {**PART, "image_size": 32, "patch_size": 16}


@pytest.mark.parametrize("family", ["clip", "siglip", "metaclip_2"])
def test_images_are_classified_by_the_half_of_a_model_that_sees_them(family: str, tmp_path: Path) -> None:
    """Its class names the whole model as what lies below the head, which is not there."""
    shape = AutoConfig.for_model(family, text_config=PART, vision_config=IMAGES)
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(shape)
    assert heads_of(model) == ["classifier"]
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    for number in range(24):
        folder = tmp_path / "images" / ("light" if number % 2 else "dark")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (200 + number if number % 2 else number,) * 3).save(folder / f"{number}.png")
    sections = {
        "model": {"name": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "images"), "eval": 8},
        "paca": {"r": 4},
        "train": {"trainer": "image_classification", "max_steps": 4, "learning_rate": 0.02},
        "output": {"dir": str(tmp_path / "run")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections))
    result = train(load_run_config(tmp_path / "run.yaml"), console=Console(quiet=True))
    assert result.summary["eval_loss_after"] < result.summary["eval_loss_before"]
