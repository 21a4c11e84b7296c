from __future__ import annotations

import io
from pathlib import Path

import pytest
from datasets import Dataset
from rich.console import Console
from transformers import TrainingArguments

from paca.training import load_run_config, memory_check, train
from paca.training.trainers import TRAINERS


@pytest.fixture(autouse=True)
def bare_runs() -> None:
    """Here memory is foretold."""


def output_of_run(config_file: Path, folder: Path, *overrides: str) -> str:
    output = io.StringIO()
    config = load_run_config(config_file, [f"output.dir={folder}", "train.max_steps=1", *overrides])
    train(config, console=Console(file=output, width=300))
    return output.getvalue()


def test_lengths_are_those_of_the_rows() -> None:
    rows = [[1, 2, 3], [1], []] * 700
    assert TRAINERS["sft"].lengths(Dataset.from_dict({"input_ids": rows, "other": rows})) == [3, 1, 0] * 700
    assert TRAINERS["sft"].lengths(Dataset.from_dict({"input_ids": rows}).select([1, 0])) == [1, 3]


@pytest.mark.slow(reason="simulates models over and over")
def test_a_run_that_needs_more_than_there_is_says_so_and_trains_all_the_same(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def little(device: str) -> int:
        asked.append(device)
        return 100 * 2**20

    monkeypatch.setattr(memory_check, "available_memory", little)
    output = output_of_run(config_file, tmp_path / "run")
    assert "Warning: This run needs about " in output
    assert "100.00 MiB are available" in output
    assert "(2 sequences of 128 tokens" not in output  # planned by the longest example, not by train.max_length
    assert output.index("Warning") < output.index("step 1/1")
    assert asked == ["cpu"]


@pytest.mark.slow(reason="simulates models over and over")
def test_a_forecast_that_fails_stops_no_run(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise AttributeError("'FakeTensor' object has no attribute 'magic'")

    monkeypatch.setattr(memory_check, "warn_if_too_large", broken)
    assert "step 1/1" in output_of_run(config_file, tmp_path / "run")
    assert "AttributeError: 'FakeTensor' object has no attribute 'magic'" in caplog.text


def test_a_run_that_fits_says_nothing(config_file: Path, tmp_path: Path) -> None:
    assert "Warning" not in output_of_run(config_file, tmp_path / "run")


def test_processes_of_one_machine_share_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    monkeypatch.setattr(memory_check, "available_memory", lambda device: 2**50)
    assert memory_check.memory_at_hand(arguments) == 2**50
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2**30))
    assert memory_check.memory_at_hand(arguments) == 2**20
