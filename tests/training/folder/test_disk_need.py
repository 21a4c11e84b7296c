from __future__ import annotations

import io
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from paca.messages.errors import PacaError
from paca.pretrained.location import tokenizer_files
from paca.training import RunResult, describe, load_run_config, train
from paca.training import run as run_module
from paca.training.folder.disk_need import DiskNeed, disk_need, tell_of_disk
from training.tiny_run import adapter

Usage = namedtuple("Usage", "total used free")
MIB = 2**20


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 0, count))


def test_a_run_writes_what_is_foretold(config_file: Path, finished: Callable[..., RunResult]) -> None:
    need = describe(load_run_config(config_file)).disk
    folder = finished().folder
    checkpoints = list((folder / "checkpoints").iterdir())
    assert need.checkpoints == len(checkpoints) + 1  # before an old one goes, the new one is whole
    deltas = sum(tensor.nbytes for name, tensor in adapter(folder).items() if name.endswith("paca_delta"))
    assert need.result == deltas + sum(file.stat().st_size for file in tokenizer_files(config_file.parent / "model"))
    states = torch.load(checkpoints[0] / "optimizer.pt")["state"].values()
    moments = sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))
    assert need.checkpoint == need.result + moments


LORA = ("lora.r=4", "lora.use_dora=true", "lora.modules_to_save=[lm_head]")


@pytest.mark.parametrize(
    "settings",
    [
        ("lora.init_lora_weights=pissa_niter_2", *LORA),
        ("lora.init_lora_weights=eva", "lora.r=4"),
        ("peft.peft_type=ADAMSS", "peft.r=8", "peft.num_subspaces=3"),
    ],
)
def test_an_adapter_that_a_run_leaves_as_another_is_counted_as_that(
    config_file: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    config = load_run_config(config_file, ["paca=null", f"output.dir={tmp_path}", "train.max_steps=2", *settings])
    need = describe(config).disk
    tokenizer = sum(file.stat().st_size for file in tokenizer_files(config_file.parent / "model"))
    folder = train(config, console=Console(quiet=True)).folder

    def tensors(file: Path) -> int:
        return sum(tensor.nbytes for tensor in load_file(file).values()) if file.exists() else 0

    assert need.result == tensors(folder / "adapter" / "adapter_model.safetensors") + tokenizer
    assert need.start == tensors(folder / "start.safetensors")
    checkpoint = next((folder / "checkpoints").iterdir())
    states = torch.load(checkpoint / "optimizer.pt")["state"].values()
    moments = sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))
    assert need.checkpoint == tensors(checkpoint / "adapter_model.safetensors") + tokenizer + moments
    assert ("what it starts with" in str(need)) is (need.start > 0)


@pytest.mark.parametrize(
    ("settings", "steps", "count"),
    [
        ({"save_strategy": "no"}, 100, 0),
        ({"save_steps": 0.2}, 100, 5),
        ({"save_steps": 30}, 100, 4),
        ({"save_steps": 0.2, "save_total_limit": 2}, 100, 3),
        ({"save_steps": 60, "save_total_limit": 2}, 100, 2),
        ({"save_steps": 0.2, "save_total_limit": 1, "load_best_model_at_end": True}, 100, 3),
        ({"save_strategy": "epoch", "num_train_epochs": 2.5}, None, 3),
        ({"save_total_limit": 2}, None, 3),
    ],
)
def test_so_many_checkpoints_are_there_at_most(
    settings: dict[str, Any], steps: int | None, count: int, config_file: Path
) -> None:
    config = load_run_config(config_file)
    config.train = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 0.2, **settings}
    need = disk_need(config, nn.Linear(100, 100, bias=False), steps, base=7)
    assert need.checkpoints == count
    assert need.checkpoint == need.result + 80_000  # two moments in float32
    assert need.total == need.result + count * need.checkpoint + 7


def test_a_disk_that_may_get_full_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need, output = DiskNeed(10 * MIB, 30 * MIB, 3, 0), io.StringIO()
    free(monkeypatch, 100 * MIB)
    tell_of_disk(need, tmp_path / "run", Console(file=output, width=300))
    assert not output.getvalue()
    free(monkeypatch, 99 * MIB)
    tell_of_disk(need, tmp_path / "run", Console(file=output, width=300))
    assert "99.00 MiB is free" in output.getvalue()
    assert (
        "writes about 100.00 MiB (result 10.00 MiB, at most 3 checkpoints at a time, each 30.00 MiB)"
        in output.getvalue()
    )
    assert "train.save_total_limit" in output.getvalue()


def test_a_run_whose_result_does_not_fit_loads_nothing(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, 100)
    monkeypatch.setattr(run_module, "load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(PacaError, match=r"100 B is free.*Not even the result fits.*output\.dir"):
        train(load_run_config(config_file, [f"output.dir={tmp_path / 'run'}"]), console=Console(quiet=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["model.name", "model.tokenizer"])
def test_a_model_that_is_not_there_is_named_with_its_setting(config_file: Path, setting: str) -> None:
    with pytest.raises(PacaError, match=rf"^{setting}: No model at './nowhere': there is no such file or folder"):
        describe(load_run_config(config_file, [f"{setting}=./nowhere"]))
