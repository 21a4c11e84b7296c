"""The longest batch first, and not a bit of the run changed by it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from paca.messages.errors import PacaError
from paca.pretrained.out_of_memory import says_out_of_memory
from paca.training import RunResult, load_run_config, train
from paca.training.folder.run_folder import RunFolder
from paca.training.trainers.sft import Sft
from training.tiny_run import curve, same_adapter

ACCUMULATED = ("train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2")


def run(config_file: Path, folder: Path, *overrides: str, **options: Any) -> tuple[RunResult, str]:
    output = io.StringIO()
    config = load_run_config(config_file, [f"output.dir={folder}", *overrides])
    result = train(config, console=Console(file=output, width=300), **options)
    return result, output.getvalue()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the batches that runs train on, in order."""
    shapes: list[tuple[int, ...]] = []

    class Watched(Sft.trainer):
        limit = 10**9

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            shapes.append(tuple(inputs["input_ids"].shape))
            if inputs["input_ids"].numel() > self.limit:
                raise torch.OutOfMemoryError("out of memory")
            return super().training_step(model, inputs, *args, **kwargs)

    monkeypatch.setattr(Sft, "trainer", Watched)
    return shapes


def saved_state(folder: Path) -> dict[str, Any]:
    checkpoint = RunFolder(folder).newest_checkpoint()
    assert checkpoint is not None
    return {name: torch.load(checkpoint / name, weights_only=False) for name in ("optimizer.pt", "rng_state.pth")}


def assert_equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_equal(first, second)
    else:
        assert (one == other) is True or (one == other).all()


@pytest.mark.slow(reason="trains several times")
@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("model.lean=true", "model.recompute=mlp", "train.neftune_noise_alpha=5", *ACCUMULATED),
        ("train.factor_rank=2",),
    ],
)
def test_a_probed_run_is_the_same_run_bit_for_bit(
    config_file: Path, finished: Callable[..., RunResult], tmp_path: Path, settings: tuple[str, ...]
) -> None:
    unprobed = finished(*settings).folder
    run(config_file, tmp_path / "probed", *settings, probe=True)
    assert same_adapter(unprobed, tmp_path / "probed")
    assert curve(unprobed) == curve(tmp_path / "probed")
    metrics = ("mean_token_accuracy", "entropy")
    from training.tiny_run import rows

    plain, probed = rows(unprobed), rows(tmp_path / "probed")
    assert [[row.get(name) for name in metrics] for row in plain] == [
        [row.get(name) for name in metrics] for row in probed
    ]
    assert_equal(saved_state(unprobed), saved_state(tmp_path / "probed"))


def test_the_longest_batch_comes_first(config_file: Path, tmp_path: Path, passes: list[tuple[int, ...]]) -> None:
    _, output = run(config_file, tmp_path / "run", "train.max_steps=8", *ACCUMULATED, probe=True)
    probe, trained = passes[:2], passes[2:]  # two passes: gradients accumulate
    assert len(trained) == 16  # one epoch
    assert probe[0] == probe[1] == (2, max(length for _, length in trained))
    assert f"The longest batch (2 x {probe[0][1]} tokens) fits: peak memory " in output
    assert output.index("The longest batch") < output.index("step 1/8")


def test_without_accumulation_one_pass_is_enough(
    config_file: Path, tmp_path: Path, passes: list[tuple[int, ...]]
) -> None:
    run(config_file, tmp_path / "run", "train.max_steps=1", probe=True)
    assert len(passes) == 2


def test_a_run_goes_on_after_a_probe(config_file: Path, finished: Callable[..., RunResult], tmp_path: Path) -> None:
    settings = ("train.save_steps=3",)
    whole = finished(*settings).folder
    run(config_file, tmp_path / "parts", *settings, probe=True)
    for name in ("summary.json", "checkpoints/checkpoint-6/trainer_state.json"):
        (tmp_path / "parts" / name).unlink()
    run(config_file, tmp_path / "parts", *settings, probe=True, resume=True)
    assert same_adapter(whole, tmp_path / "parts")
    assert curve(whole) == curve(tmp_path / "parts")


def test_a_batch_that_does_not_fit_is_told_before_the_first_step(
    config_file: Path, tmp_path: Path, passes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sft.trainer, "limit", 10)
    with pytest.raises(PacaError) as caught:
        run(config_file, tmp_path / "run", probe=True)
    message = str(caught.value)
    assert len(passes) == 1
    assert message.startswith(f"The longest batch (8 x {passes[0][1]} tokens) does not fit into memory.")
    assert says_out_of_memory(message)
    for remedy in (
        "model.lean=true",
        "per_device_train_batch_size (now 8,",
        "model.recompute=mlp",
        "max_length (now 128)",
    ):
        assert remedy in message


def test_what_is_done_already_is_no_advice(
    config_file: Path, tmp_path: Path, passes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sft.trainer, "limit", 10)
    settings = ("model.lean=true", "model.recompute=mlp", "train.gradient_checkpointing=true")
    with pytest.raises(PacaError, match=r"^Memory ran out\. In this order, try: a smaller") as caught:
        run(config_file, tmp_path / "run", *settings)
    for done in ("model.lean", "recompute", "checkpointing"):
        assert done not in str(caught.value)
    assert says_out_of_memory(str(caught.value))


def test_what_an_optimizer_of_factors_keeps_is_there_and_not_stood_in_for(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paca.training.probe.state_bytes", lambda *_: pytest.fail("would be counted twice"))
    run(config_file, tmp_path / "run", "train.max_steps=1", "train.factor_rank=2", probe=True)


def test_another_error_stays_what_it_is(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Sft.trainer, "training_step", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(config_file, tmp_path / "run", probe=True)


def test_an_optimizer_of_unknown_size_is_said(config_file: Path, tmp_path: Path) -> None:
    _, output = run(config_file, tmp_path / "run", "train.max_steps=1", "train.optim=adafactor", probe=True)
    assert "The probe leaves out the optimizer's state. The memory of the optimizer 'adafactor' is not known" in output
