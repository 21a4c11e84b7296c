"""Runs with lean blocks: the same run, less memory."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from paca.lean import is_lean
from paca.messages.errors import PacaError
from paca.training import RunResult, describe, load_run_config, starting_model, train
from paca.training.trainers.sft import Sft
from pretrained.test_pretrained import mergeable_base, write_gguf  # noqa: F401 - the first is a fixture
from training.tiny_run import adapter, curve, same_adapter

LEAN = ("model.lean=true",)
RECOMPUTED = ("model.lean=true", "model.recompute=mlp")


def watch_models(patch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    seen: list[torch.nn.Module] = []
    trainer = Sft.trainer

    class Watched(trainer):  # type: ignore[misc, valid-type]
        def training_step(self, model, *args, **kwargs):  # type: ignore[no-untyped-def]
            if model not in seen:
                seen.append(model)
            return super().training_step(model, *args, **kwargs)

    patch.setattr(Sft, "trainer", Watched)
    return seen


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """The models that runs train."""
    return watch_models(monkeypatch)


@pytest.fixture(scope="module")
def stock(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with the blocks of transformers."""
    folder = tmp_path_factory.mktemp("stock") / "run"
    with pytest.MonkeyPatch.context() as patch:
        models = watch_models(patch)
        run(config_file, folder)
        assert [is_lean(model) for model in models] == [False]
    return folder


def run(
    config_file: Path, folder: Path, *overrides: str, resume: bool = False, console: Console | None = None
) -> dict[str, object]:
    config = load_run_config(config_file, [f"output.dir={folder}", *overrides])
    result = train(config, resume=resume, console=console or Console(quiet=True))
    assert result.summary is not None
    return result.summary


def assert_same_run(one: Path, other: Path) -> None:
    """Losses and adapter agree to what float32 gradients of lean blocks may differ by, over six steps of AdamW.

    Gradients agree to 9e-7 of their norm (docs/notes/lean-blocks.md); a step of AdamW divides by their size, so an
    element whose gradient is nearly zero can move by a share of the rate more.
    """
    for row, other_row in zip(curve(one), curve(other), strict=True):
        for value, wanted in zip(row, other_row, strict=True):
            assert value == wanted if wanted is None else value == pytest.approx(wanted, rel=1e-5)
    first, second = adapter(one), adapter(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        if tensor.is_floating_point():
            assert (tensor - second[name]).norm() <= 2e-5 * tensor.norm(), name
        else:
            assert torch.equal(tensor, second[name])


@pytest.mark.parametrize(
    "settings", [LEAN, RECOMPUTED, (*RECOMPUTED, "train.gradient_checkpointing=true")], ids=["lean", "mlp", "both"]
)
def test_a_lean_run_is_the_same_run(
    config_file: Path, tmp_path: Path, stock: Path, models: list[torch.nn.Module], settings: tuple[str, ...]
) -> None:
    summary = run(config_file, tmp_path / "lean", *settings)
    assert [is_lean(model) for model in models] == [True]
    assert summary["model"]["lean"] is True  # type: ignore[index]
    assert summary["model"]["recompute"] == ("mlp" if "model.recompute=mlp" in settings else None)  # type: ignore[index]
    assert_same_run(stock, tmp_path / "lean")


@pytest.mark.slow(reason="trains several times")
def test_a_lean_run_goes_on_to_the_same_weights(
    config_file: Path, finished: Callable[..., RunResult], tmp_path: Path
) -> None:
    settings = [*RECOMPUTED, "train.save_steps=3"]
    whole = finished(*settings).folder
    shutil.copytree(whole, tmp_path / "stopped")
    for name in ("summary.json", "checkpoints/checkpoint-6/trainer_state.json"):
        (tmp_path / "stopped" / name).unlink()
    run(config_file, tmp_path / "stopped", *settings, resume=True)
    assert same_adapter(whole, tmp_path / "stopped")
    assert curve(whole) == curve(tmp_path / "stopped")


def test_a_gguf_model_trains_lean_and_leaves_a_plain_base(
    config_file: Path,
    tmp_path: Path,
    models: list[torch.nn.Module],
    mergeable_base: Path,  # noqa: F811
) -> None:
    gguf = write_gguf(tmp_path / "model.gguf", mergeable_base)
    output = io.StringIO()
    settings = (f"model.name={gguf}", "train.max_steps=2", *RECOMPUTED)
    summary = run(config_file, tmp_path / "run", *settings, console=Console(file=output))
    assert [is_lean(model) for model in models] == [True]
    assert summary["model"]["source"] == "gguf"  # type: ignore[index]
    assert (tmp_path / "run" / "base" / "config.json").is_file()
    assert "Unpacking the weights of model.gguf ...\n" in output.getvalue()


def test_the_plan_says_what_is_done_to_the_blocks(config_file: Path) -> None:
    def said(*overrides: str) -> str:
        return dict(describe(load_run_config(config_file, overrides)).lines())["blocks"]

    assert said() == "as in transformers"
    assert said(*LEAN) == "lean"
    assert said(*RECOMPUTED) == "lean; the MLP is computed again in the backward pass"


def test_a_block_that_is_not_known_is_refused_before_weights_are_loaded(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(load_run_config(config_file).model.name)
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=vocabulary, **sizes)).save_pretrained(tmp_path / "neox")
    for file in base.glob("tokenizer*"):
        (tmp_path / "neox" / file.name).write_bytes(file.read_bytes())
    config = load_run_config(config_file, [f"model.name={tmp_path / 'neox'}", f"output.dir={tmp_path / 'run'}", *LEAN])
    monkeypatch.setattr(starting_model, "load_pretrained", lambda *_: pytest.fail("loads weights"))
    for start in (describe, train):
        with pytest.raises(PacaError, match=r"GPTNeoXForCausalLM can't be made lean.*GPTNeoXLayer.*model\.lean: false"):
            start(config)
    assert not (tmp_path / "run").exists()
