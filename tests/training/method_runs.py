"""The workspace's run with each method, for tests of what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from paca.evaluation.own_data import scorer
from paca.training import RunResult, load_run_config, train
from paca.training import run as run_module

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}},
    "lora-tuned": {
        "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        "model": {"dtype": "bfloat16"},
        "train": {"autocast_adapter_dtype": False},
    },
    "lora-eva": {"lora": {"r": 4, "init_lora_weights": "eva"}},
    "lora-corda": {"lora": {"r": 4, "init_lora_weights": "corda", "target_modules": "all-linear"}},
    "lora-lora_ga": {"lora": {"r": 4, "init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "ArBr"}}},
    "lora-pissa_niter": {"lora": {"r": 4, "init_lora_weights": "pissa_niter_4"}},
    "ia3": {"peft": {"peft_type": "ia3"}},
    "loha": {"peft": {"peft_type": "LOHA", "r": 2, "target_modules": ["q_proj", "down_proj"]}},
    "adalora": {"peft": {"peft_type": "ADALORA", "target_r": 2, "init_r": 4, "tinit": 1, "tfinal": 1}},
    "shira": {"peft": {"peft_type": "SHIRA", "r": 2}},
    "adamss": {"peft": {"peft_type": "ADAMSS", "r": 8, "num_subspaces": 3, "target_modules": ["q_proj", "k_proj"]}},
    "p_tuning": {"peft": {"peft_type": "P_TUNING", "num_virtual_tokens": 4}},
    "cpt": {
        "peft": {
            "peft_type": "CPT",
            "cpt_token_ids": [60, 61, 62, 63, 64, 65],
            "cpt_tokens_type_mask": [1, 2, 3, 4, 6, 8],
            "opt_projection_epsilon": 20.0,
            "opt_projection_format_epsilon": 20.0,
            "opt_weighted_loss_type": "decay",
            "opt_loss_decay_factor": 0.5,
        },
        "train": {"learning_rate": 1.0},
    },
    "prefix_tuning": {
        "peft": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 16, "init_weights": "zero"},
        "train": {"learning_rate": 1.0},
    },
    "prefix_tuning-projected": {
        "peft": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, "prefix_projection": True},
        "train": {"learning_rate": 0.05},
    },
    "cartridge": {"peft": {"peft_type": "CARTRIDGE", "num_virtual_tokens": 16}, "train": {"learning_rate": 1.0}},
    "adaption_prompt": {"peft": {"peft_type": "ADAPTION_PROMPT", "adapter_len": 4, "adapter_layers": 2}},
    "full": {"full": {}},
}

LEARN_TOKENS = ("p_tuning", "cpt", "prefix_tuning", "prefix_tuning-projected", "cartridge", "adaption_prompt")
"""They add to what the model reads."""
TOKENS_ASKED = torch.arange(12)[None]


def answers_of_trained(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Where the logits go that each run's model gives in memory, once it is trained."""
    found: list[torch.Tensor] = []
    write_card = run_module.write_card

    def remember(folder: Path, summary: dict[str, Any], model: Any) -> None:
        training = model.training
        with torch.no_grad():
            found.append(model.eval()(TOKENS_ASKED).logits)
        model.train(training)
        write_card(folder, summary, model)

    monkeypatch.setattr(run_module, "write_card", remember)
    return found


def write_config(config_file: Path, target: Path, method: str) -> Path:
    """The workspace's run with another method, for `target`."""
    sections = yaml.safe_load(config_file.read_text())
    del sections["paca"]
    for name, values in METHODS[method].items():
        sections[name] = {**sections.get(name, {}), **values}
    sections["eval"] = {"metric": "token_accuracy", "max_new_tokens": 4}
    sections["output"] = {"dir": str(target)}
    target.parent.mkdir(exist_ok=True)
    file = target.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(sections))
    return file


def run(file: Path, resume: bool = False, **options: Any) -> RunResult:
    config = load_run_config(file)
    return train(config, resume, Console(quiet=True), scorer=scorer(config.eval), **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = [*folder.glob("adapter/adapter_model.safetensors"), *folder.glob("model/model.safetensors")]
    return load_file(file)
