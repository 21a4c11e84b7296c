"""A hub that does not answer: nobody waits for it more than once."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from paca.data import load_examples
from paca.data.hub import without_waiting_for_the_hub
from paca.evaluation.task_files import load_tasks
from paca.messages.errors import PacaError


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """How long the hub's client slept each time, where nobody listens at the hub's address."""
    slept: list[float] = []
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:9/{tmp_path.name}")  # one that no test asked before
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", slept.append)
    return slept


@pytest.mark.usefixtures("few_tasks")
def test_it_is_asked_once_for_data_and_for_tasks(waits: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PacaError, match=r"hub cannot be reached and there is no copy in the local cache"):
        load_examples("absent/data")
    for task in ("arc_easy", "arc_challenge"):
        with pytest.raises(PacaError, match=f"{task} cannot be loaded: the hub cannot be reached, and the local cache"):
            load_tasks([task])
    assert waits == [1.0]
    assert "Retry" not in capfd.readouterr().err
    assert not constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_who_works_offline_is_not_asked(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with without_waiting_for_the_hub() as answers:
        assert not answers
    assert waits == []
