"""Real trainings whose tensors' bytes are counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from forked_process import run_forked
from paca.comparison import counted_memory
from training.tiny_run import save_workspace

PROGRAM = "import runpy\nrunpy.run_module('paca.cli.train_counting_memory', run_name='__main__', alter_sys=True)"


def test_the_program_is_the_module() -> None:
    assert counted_memory.PROGRAM[1:] == ("-m", "paca.cli.train_counting_memory")


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Peaks of three runs; two of them are the same."""
    folder = tmp_path_factory.mktemp("counted")
    save_workspace(folder)
    sections = yaml.safe_load((folder / "config.yaml").read_text())
    sections["train"] |= {"max_steps": 3, "eval_strategy": "no", "save_strategy": "no"}
    sections["eval"] = {"before": False, "after": False}
    configs = []
    for name, r in {"once": 4, "again": 4, "wide": 8}.items():
        sections["paca"]["r"] = r
        sections["output"] = {"dir": str(folder / name)}
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(sections))
        done = run_forked(PROGRAM, "train", config, cwd=folder)
        assert done.returncode == 0, done.stderr
        configs.append(config)
    weights = load_file(folder / "model" / "model.safetensors")
    return {
        "weights": sum(tensor.nbytes for tensor in weights.values()),
        **{config.stem: counted_memory.peak_of(config) for config in configs},
    }


@pytest.mark.slow(reason="measures the memory of processes")
def test_the_same_run_has_the_same_peak(counted: dict[str, int]) -> None:
    assert counted["once"] == counted["again"]


def test_more_columns_take_more_and_weights_count(counted: dict[str, int]) -> None:
    assert counted["weights"] < counted["once"] < counted["wide"]


@pytest.mark.slow(reason="measures the memory of processes")
def test_the_longest_batch_counts_wherever_it_comes(tmp_path: Path) -> None:
    """A few steps need not meet it: methods were called equal whose peaks differed by half."""
    save_workspace(tmp_path)
    sections = yaml.safe_load((tmp_path / "config.yaml").read_text())
    sections["train"] |= {"max_steps": 2, "eval_strategy": "no", "save_strategy": "no"}
    sections["train"] |= {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
    sections["eval"] = {"before": False, "after": False}
    records = [json.dumps({"question": "Why?", "answer": "So."}) + "\n"] * 8
    longest = json.dumps({"question": "Why?", "answer": "So it is. " * 12}) + "\n"
    peaks = []
    for name, content in {"first": [longest, *records], "last": [*records, longest]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(content))
        sections["data"] = {"train": str(tmp_path / f"{name}.jsonl")}
        sections["output"] = {"dir": str(tmp_path / name)}
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(sections))
        done = run_forked(PROGRAM, "train", config, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        peaks.append(counted_memory.peak_of(config))
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)


def test_a_run_that_fails_leaves_no_peak(tmp_path: Path) -> None:
    config = tmp_path / "broken.yaml"
    config.write_text("model: {}\n")
    counted_memory.peak_file(config).write_text('{"peak_bytes": 1}')
    done = run_forked(PROGRAM, "train", config)
    assert done.returncode == 1
    assert "Error: " in done.stderr
    assert not counted_memory.peak_file(config).exists()
