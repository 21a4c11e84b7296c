"""A hub that does not answer: nobody waits for it more than once."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from data.loopback_hub import serving
from paca.data import load_examples
from paca.data.hub import without_waiting_for_the_hub
from paca.evaluation.task_files import load_tasks
from paca.messages.errors import PacaError
from paca.pretrained.loading import load_pretrained


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


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize(
    ("status", "headers", "advice"),
    [
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "wrong or has expired: log in anew"),
        (403, {}, "may not read it: log in with one that may"),
        (429, {"Retry-After": "1"}, "too many requests from here: wait for some minutes"),
        (500, {}, "Try again later"),
    ],
)
def test_one_that_answers_with_an_error_is_not_called_unreachable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, headers: dict[str, str], advice: str
) -> None:
    with serving(tmp_path, "some/data", monkeypatch, tmp_path / "cache", refuses=(status, headers)):
        for load in (load_examples, load_pretrained):
            with pytest.raises(PacaError, match=rf"answers {status} .*{advice}.*\.$") as raised:
                load("some/data")
            assert "tokenizer" not in str(raised.value)


def test_gated_data_is_called_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gated = (403, {"X-Error-Code": "GatedRepo"})
    with (
        serving(tmp_path, "some/data", monkeypatch, tmp_path / "cache", refuses=gated),
        pytest.raises(PacaError, match="is gated on the hub"),
    ):
        load_examples("some/data")
