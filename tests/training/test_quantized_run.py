"""`model.quantization`: runs on bitsandbytes weights, from the YAML to the merged checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM

from paca.convert.merged import merge_to_folder
from paca.messages.errors import PacaError
from paca.pretrained.generation import load_for_generation
from paca.training import describe, load_run_config, train
from paca.training import run as run_module
from training.test_run import SignalAtStep
from training.tiny_run import adapter, rows, same_adapter

pytest.importorskip("bitsandbytes")


def run(config_file: Path, folder: Path, *overrides: str) -> Path:
    config = load_run_config(config_file, [f"output.dir={folder}", *overrides])
    train(config, console=Console(quiet=True))
    return folder


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_a_run_trains_saves_chats_and_merges(quantization, finished, tmp_path):
    folder = finished(f"model.quantization={quantization}").folder
    losses = [row["eval_loss"] for row in rows(folder) if row.get("eval_loss") is not None]
    assert losses[-1] < losses[0]
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["paca"]["original_weights"] == resolved["model"]["name"]
    tensors = adapter(folder)
    deltas = [tensor for name, tensor in tensors.items() if name.endswith("paca_delta")]
    assert {tensor.dtype for tensor in deltas} == {torch.float32}
    assert any(
        not torch.equal(d, d.to(torch.bfloat16).float()) for d in deltas
    )  # trained in float32, not in TRL's bf16

    loaded = load_for_generation(folder)
    assert loaded.model.get_base_model().is_quantized
    assert loaded.model.peft_config["default"].base_quantization == quantization

    merge_to_folder(folder, tmp_path / "merged")  # compares logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not getattr(merged.config, "quantization_config", None)
    assert all(p.is_floating_point() for p in merged.parameters())


def test_the_columns_may_start_from_the_dequantized_weight(config_file, tmp_path):
    folder = run(
        config_file,
        tmp_path / "run",
        "model.quantization=nf4",
        "paca.original_weights=null",
        "train.max_steps=1",
    )
    assert yaml.safe_load((folder / "config.yaml").read_text())["paca"]["original_weights"] is None


def test_the_plan_says_so(config_file):
    plan = describe(load_run_config(config_file, ["model.quantization=nf4"]))
    assert "float32, nf4)" in dict(plan.lines())["model"]


def test_an_unknown_quantization_names_the_known_ones(config_file):
    with pytest.raises(PacaError, match=r"model\.quantization must be one of nf4, fp4, int8 or null"):
        load_run_config(config_file, ["model.quantization=nf5"])


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_lora_trains_on_quantized_weights_resumes_and_merges(quantization, config_file, tmp_path, monkeypatch):
    sections = yaml.safe_load(config_file.read_text())
    sections |= {"lora": {"r": 4}, "model": {**sections["model"], "quantization": quantization}}
    sections["train"] |= {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    del sections["paca"]
    file = tmp_path / "lora.yaml"
    file.write_text(yaml.safe_dump(sections))
    whole = run(file, tmp_path / "whole")
    # TRL keeps adapters on quantized weights in bfloat16; so does a resume.
    assert {tensor.dtype for tensor in adapter(whole).values()} == {torch.bfloat16}
    monkeypatch.setattr(run_module, "StopOnSignal", SignalAtStep)
    monkeypatch.setattr(SignalAtStep, "step", 2)
    run(file, tmp_path / "parts")
    config = load_run_config(file, [f"output.dir={tmp_path / 'parts'}"])
    train(config, resume=True, console=Console(quiet=True))
    assert same_adapter(whole, tmp_path / "parts")

    loaded = load_for_generation(whole)
    assert loaded.model.get_base_model().is_quantized
    merge_to_folder(whole, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not getattr(merged.config, "quantization_config", None)
    tokens = torch.arange(12)[None]
    expected = loaded.model(tokens).logits
    assert (merged(tokens).logits - expected).abs().max() < 0.02 * expected.abs().max()  # int8 rounds inputs as well


def of_lora_instead(config_file: Path, tmp_path: Path, **section: object) -> Path:
    sections = yaml.safe_load(config_file.read_text()) | section
    sections["model"]["quantization"] = "nf4"
    sections["train"]["max_steps"] = 1
    del sections["paca"]
    file = tmp_path / "other.yaml"
    file.write_text(yaml.safe_dump(sections))
    return file


def test_dora_trains_on_quantized_weights(config_file, tmp_path):
    """It is outlined and planned first, where weights have no values: PEFT took their codes for weights there."""
    folder = run(of_lora_instead(config_file, tmp_path, lora={"r": 4, "use_dora": True}), tmp_path / "run")
    assert any("lora_magnitude_vector" in name for name in adapter(folder))


@pytest.mark.parametrize("method", ["loha", "delora"])  # when it trains, and when it is put in, in TRL's trainer
def test_a_method_that_fails_on_quantized_weights_is_named(config_file, tmp_path, method):
    file = of_lora_instead(config_file, tmp_path, peft={"peft_type": method.upper(), "r": 4})
    with pytest.raises(PacaError, match=rf"PEFT's {method} failed on nf4 weights: .*leave out model\.quantization"):
        run(file, tmp_path / "run")
