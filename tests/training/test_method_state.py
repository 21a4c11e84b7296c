"""AdaLoRA's ranks and P-tuning's encoder: shared out, saved, and found again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from paca.messages.errors import PacaError
from paca.training import describe, load_run_config
from paca.training.sharding import check_sharding
from training.method_runs import run, weights, write_config
from training.test_run_methods import FinishedBy

LAYERS = 4
"""Of the workspace's model that AdaLoRA adapts: `q_proj` and `v_proj` in two blocks."""


@pytest.fixture
def adalora(config_file: Path, tmp_path: Path) -> Path:
    return write_config(config_file, tmp_path / "run", "adalora")


def change(file: Path, **sections: dict[str, Any]) -> Path:
    stored = yaml.safe_load(file.read_text())
    for name, values in sections.items():
        stored[name] |= values
    file.write_text(yaml.safe_dump(stored))
    return file


def loaded(folder: Path) -> Any:
    settings = json.loads((folder / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"])
    return PeftModel.from_pretrained(base, folder).eval()


def test_ranks_are_shared_out_to_the_budget_and_the_adapter_is_cut_to_them(finished_by: FinishedBy) -> None:
    folder = finished_by("adalora")[0].folder
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert settings["total_step"] == 6
    pattern = settings["rank_pattern"]
    assert len(pattern) == LAYERS
    assert sum(map(sum, pattern.values())) == 2 * LAYERS  # target_r
    assert len({sum(rows) for rows in pattern.values()}) > 1  # not every layer has as many
    kept = {name: tensor for name, tensor in weights(folder).items() if "lora_A" in name}
    assert sum(len(tensor) for tensor in kept.values()) == 2 * LAYERS

    newest = max((folder / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    whole = load_file(newest / "adapter_model.safetensors")
    assert {len(tensor) for name, tensor in whole.items() if "lora_A" in name} == {4}  # init_r: the moments fit it
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        cut, masked = (loaded(path)(tokens).logits for path in (folder / "adapter", newest))
    assert torch.allclose(cut, masked, atol=1e-5)


def test_what_pulls_towards_orthogonal_factors_is_trained_and_not_evaluated(
    adalora: Path, finished_by: FinishedBy
) -> None:
    """Its weight changes the loss of training, and not that of the same model in an evaluation."""
    losses = {}
    for weight in (0.0, 0.5):
        # 0.5 is PEFT's default
        folder = (
            finished_by("adalora")[0].folder if weight else run(change(adalora, peft={"orth_reg_weight": 0})).folder
        )
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[weight] = [
            next(row[key] for row in rows if key in row) for key in ("loss", "eval_loss")
        ]  # of the first step, and before it
        assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["orth_reg_weight"] == weight
    assert losses[0.5][1] == losses[0.0][1]
    assert losses[0.5][0] > losses[0.0][0] + 0.1


@pytest.mark.parametrize("method", ["adalora", "adamss", "cpt", "p_tuning", "lora-corda", "lora-eva"])
def test_the_best_checkpoint_is_the_result_also_when_only_results_were_missing(
    method: str, config_file: Path, tmp_path: Path
) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    file = change(
        write_config(config_file, tmp_path / "run", method),
        train={**best, "greater_is_better": True},  # so that it is not the newest one
    )
    folder = run(file).folder
    state = json.loads((folder / "checkpoints/checkpoint-6/trainer_state.json").read_text())
    chosen = folder / "checkpoints" / f"checkpoint-{state['best_global_step']}"
    assert chosen.name != "checkpoint-6"
    trained, settings = weights(folder), (folder / "adapter/adapter_config.json").read_text()
    if method == "lora-corda":  # whose checkpoints have the factors alone
        kept = load_file(chosen / "adapter_model.safetensors")
        assert all(torch.equal(trained[name][:4], kept[name]) for name in kept if "lora_A" in name)
    else:
        tokens = torch.arange(12)[None]
        with torch.no_grad():
            result, kept = (loaded(path)(tokens).logits for path in (folder / "adapter", chosen))
        assert torch.allclose(result, kept, atol=1e-5)
    for name in ("summary.json", "adapter/adapter_model.safetensors"):
        (folder / name).unlink()
    run(file, resume=True)
    again = weights(folder)
    assert trained.keys() == again.keys()
    assert all(torch.equal(trained[name], again[name]) for name in trained)
    assert (folder / "adapter/adapter_config.json").read_text() == settings


@pytest.mark.parametrize("sharded", [{"fsdp": True, "fsdp_config": {}}, {"deepspeed_plugin": object()}])
@pytest.mark.parametrize("method", ["adalora", "adamss", "cpt", "p_tuning", "lora-corda"])
def test_shards_are_refused(method: str, sharded: dict[str, Any], config_file: Path, tmp_path: Path) -> None:
    arguments: Any = SimpleNamespace(**{"fsdp": None, "deepspeed_plugin": None, "world_size": 2, **sharded})
    config = load_run_config(write_config(config_file, tmp_path / "run", method))
    start = r"lora\.init_lora_weights: corda needs whole weights"
    expected = start if method == "lora-corda" else rf"peft\.peft_type: {method.upper()} needs whole parameters"
    with pytest.raises(PacaError, match=f"^{expected}"):
        check_sharding(arguments, config)


def test_steps_that_leave_nothing_to_share_out_are_refused_before_training(adalora: Path) -> None:
    change(adalora, peft={"tinit": 4, "tfinal": 2})
    with pytest.raises(PacaError, match=r"peft\.tinit \(4\) and peft\.tfinal \(2\) leave none of 6 steps"):
        describe(load_run_config(adalora))
