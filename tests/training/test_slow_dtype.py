from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from paca.cli import app
from paca.training import load_run_config, slow_dtype
from paca.training.plan import show_plan
from paca.training.prepare import describe

SLOW = {torch.float32: 0.001, torch.bfloat16: 0.0172, torch.float16: 0.0014}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_dtype, "product_time", SLOW.__getitem__)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


def told(config_file: Path, dtype: str) -> str:
    console = Console(file=io.StringIO(), width=300)
    show_plan(describe(load_run_config(config_file, [f"model.dtype={dtype}"])), console)
    return console.file.getvalue()


@pytest.mark.usefixtures("slow")
def test_a_dtype_that_this_cpu_multiplies_slowly_is_told(config_file: Path) -> None:
    output = told(config_file, "bfloat16")
    assert "This CPU takes 17 × as long for products in bfloat16 as in float32: with model.dtype=float32 the" in output
    assert "KiB more." in output


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_one_that_is_about_as_fast_is_not(config_file: Path, dtype: str) -> None:
    assert "This CPU" not in told(config_file, dtype)


@pytest.mark.usefixtures("slow")
def test_a_run_on_an_accelerator_is_told_nothing_of_the_cpu(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    console = Console(file=io.StringIO(), width=300)
    config = load_run_config(config_file, ["model.dtype=bfloat16"])
    slow_dtype.tell_of_slow_dtype(config, "bfloat16", 100, console)
    assert not console.file.getvalue()
    config.train["use_cpu"] = True
    slow_dtype.tell_of_slow_dtype(config, "bfloat16", 100, console)
    assert "its weights take 200 B more" in console.file.getvalue()


@pytest.mark.usefixtures("slow")
def test_a_comparison_is_told_before_it_trains(config_file: Path, tmp_path: Path) -> None:
    arguments = [config_file, "--methods=paca", "--lr=1e-2", f"--output={tmp_path / 'compared'}", "--dry-run"]
    done = CliRunner().invoke(app, ["compare", *map(str, arguments), "--set=model.dtype=bfloat16"])
    assert " ".join(done.output.split()).count("This CPU takes 17 × as long for products in bfloat16") == 1


def test_products_are_timed_in_each_dtype() -> None:
    assert all(0 < slow_dtype.product_time(dtype) < 60 for dtype in SLOW)
