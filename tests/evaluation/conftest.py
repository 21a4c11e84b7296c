"""A tiny model that knows nothing, and one that was trained to answer."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from tiny_checkpoint import save_run


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapter moves the logits of its base model."""
    return save_run(tmp_path_factory.mktemp("evaluated") / "run")


@pytest.fixture(autouse=True)
def no_look_at_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness asks pip and others what is installed, for each of its results: seconds, and not what is tested."""
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "a machine")
