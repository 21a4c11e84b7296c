from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from paca.cli import app
from paca.lean import float32_products
from paca.pretrained import load_pretrained
from paca.training import load_run_config, train
from paca.training.plan import show_plan
from paca.training.prepare import describe

SLOW = {torch.bfloat16: 17.2, torch.float16: 1.1}
TOLD = "This CPU takes 17 × as long for products in bfloat16 as in float32: they are made in float32 here"


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32_products, "times_as_slow", SLOW.__getitem__)
    monkeypatch.setattr("paca.training.products.times_as_slow", SLOW.__getitem__)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Of each product that is made in float32, the dtype of its factors."""
    dtypes: list[torch.dtype] = []

    def noting(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *values, **options: [dtypes.append(values[-1].dtype), product(*values, **options)][1]

    products = {name: noting(product) for name, product in float32_products._PRODUCTS.items()}
    monkeypatch.setattr(float32_products, "_PRODUCTS", products)

    def gains_at_any_size(name: str, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None) -> bool:
        return name != "bmm" and out is None and a.dtype == b.dtype == torch.bfloat16  # models of tests are small

    monkeypatch.setattr(float32_products, "_gains", gains_at_any_size)
    return dtypes


def told(config_file: Path, *changes: str) -> str:
    console = Console(file=io.StringIO(), width=300)
    show_plan(describe(load_run_config(config_file, changes)), console)
    return console.file.getvalue()


@pytest.mark.usefixtures("slow")
def test_a_dtype_that_this_cpu_multiplies_slowly_is_told(config_file: Path) -> None:
    assert TOLD in told(config_file, "model.dtype=bfloat16")
    assert TOLD in told(config_file, "model.dtype=float32", "train.bf16=true", "train.use_cpu=true")


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_one_that_is_about_as_fast_is_not(config_file: Path, dtype: str) -> None:
    assert "This CPU" not in told(config_file, f"model.dtype={dtype}")


@pytest.mark.usefixtures("slow")
def test_a_run_on_an_accelerator_is_told_nothing_of_the_cpu(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = describe(load_run_config(config_file, ["model.dtype=bfloat16"]))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    console = Console(file=io.StringIO(), width=300)
    show_plan(plan, console)
    assert "This CPU" not in console.file.getvalue()
    plan.config.train["use_cpu"] = True
    show_plan(plan, console)
    assert TOLD in console.file.getvalue()


@pytest.mark.usefixtures("slow")
def test_a_comparison_is_told_before_it_trains(config_file: Path, tmp_path: Path) -> None:
    arguments = [config_file, "--methods=paca", "--lr=1e-2", f"--output={tmp_path / 'compared'}", "--dry-run"]
    done = CliRunner().invoke(app, ["compare", *map(str, arguments), "--set=model.dtype=bfloat16"])
    assert " ".join(done.output.split()).count(TOLD) == 1


@pytest.mark.usefixtures("slow")
def test_a_run_and_its_evaluation_multiply_in_float32(
    config_file: Path, tmp_path: Path, made: list[torch.dtype]
) -> None:
    config = load_run_config(config_file, ["train.max_steps=1", "data.eval=2", f"output.dir={tmp_path / 'run'}"])
    stored = load_pretrained(config.model.name, "bfloat16")
    config.model.name = str(tmp_path / "model")
    stored.model.save_pretrained(config.model.name)
    stored.tokenizer.save_pretrained(config.model.name)
    folder = train(config, console=Console(quiet=True)).folder
    assert set(made) == {torch.bfloat16}
    made.clear()
    done = CliRunner().invoke(app, ["evaluate", str(folder)])
    assert done.exit_code == 0, done.output
    assert set(made) == {torch.bfloat16}


@pytest.mark.usefixtures("slow")
def test_a_resumed_run_keeps_to_the_products_that_it_began_with(
    config_file: Path, tmp_path: Path, made: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["model.dtype=bfloat16", "train.max_steps=2", "train.save_steps=1", f"output.dir={tmp_path / 'run'}"]
    config = load_run_config(config_file, changes)
    folder = train(config, console=Console(quiet=True)).folder
    assert json.loads((folder / "inputs.json").read_text())["products"] == "float32"
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-2")
    made.clear()
    monkeypatch.setattr(float32_products, "times_as_slow", lambda dtype: 1.0)  # a busy moment, or another machine
    console = Console(file=io.StringIO(), width=300)
    train(config, resume=True, console=console)
    assert made
    assert "began with products of bfloat16 made in float32, and keeps to them." in console.file.getvalue()


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("begun", ["on a fast machine", "before there was a choice"])
def test_a_resumed_run_keeps_to_its_own_products_and_says_so(
    config_file: Path, tmp_path: Path, made: list[torch.dtype], begun: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["model.dtype=bfloat16", "train.max_steps=2", "train.save_steps=1", f"output.dir={tmp_path / 'run'}"]
    config = load_run_config(config_file, changes)
    with monkeypatch.context() as patch:
        patch.setattr(float32_products, "times_as_slow", lambda dtype: 1.0)
        folder = train(config, console=Console(quiet=True)).folder
    inputs = json.loads((folder / "inputs.json").read_text())
    assert inputs["products"] == "bfloat16"
    if "before" in begun:
        del inputs["products"]
        (folder / "inputs.json").write_text(json.dumps(inputs))
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-2")
    console = Console(file=io.StringIO(), width=300)
    train(config, resume=True, console=console)
    assert not made
    shown = console.file.getvalue()
    assert "but the run began with its own, and keeps to them." in shown
    assert "they are made in float32 here" not in shown


@pytest.mark.usefixtures("slow")
def test_a_run_in_float32_does_not(config_file: Path, tmp_path: Path, made: list[torch.dtype]) -> None:
    config = load_run_config(config_file, ["train.max_steps=1", f"output.dir={tmp_path / 'run'}"])
    assert train(config, console=Console(quiet=True)).summary is not None
    assert not made


def test_a_model_without_weights_is_told_before_it_is_trained(config_file: Path, tmp_path: Path) -> None:
    model = Path(load_run_config(config_file).model.name)
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    assert f"Warning: {bare} holds no weights" in told(config_file, f"model.name={bare}")
    assert "holds no weights" not in told(config_file)
