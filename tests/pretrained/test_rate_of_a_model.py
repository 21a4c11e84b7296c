"""The rate of a run that gives none, for users of TRL's trainers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import paca
from paca.training.config.learning_rate import automatic_rate
from paca.training.trainers import trainer_kind


def test_it_is_that_of_paca_train(tmp_path: Path) -> None:
    weight = torch.full((64, 64), 0.5)
    save_file({"model.layers.0.self_attn.q_proj.weight": weight}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    for settings in ({"r": 8, "paca_alpha": 8}, {"r": 64}):
        rate = paca.learning_rate(tmp_path, paca.PacaConfig(**settings))
        assert rate == automatic_rate(trainer_kind({}), "paca", settings, 0.5)[0]
    assert paca.learning_rate(tmp_path, paca.PacaConfig(r=8, paca_alpha=8)) == 0.025  # 0.4 × 0.5 / 8


def test_a_model_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(paca.PacaError, match="No model at"):
        paca.learning_rate(tmp_path / "none", paca.PacaConfig())


def test_a_misspelt_folder_is_no_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "my-models" / "llama").mkdir(parents=True)
    (tmp_path / "my-models" / "llama" / "config.json").write_text("{}")
    with pytest.raises(paca.PacaError, match=r"no such folder .*Did you mean 'my-models/llama'\?.*hf download"):
        paca.learning_rate("my-models/lama", paca.PacaConfig())


def test_a_size_that_is_assumed_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"can't be read. 0\.03 is assumed"):
        paca.learning_rate(tmp_path, paca.PacaConfig())
