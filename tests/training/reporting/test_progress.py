"""What the line of a run says of the time that is left."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerState

from paca.training.reporting import progress
from paca.training.reporting.progress import ShowProgress


@pytest.mark.parametrize(("strategy", "left"), [("steps", "1:00"), ("no", "0:30")])
def test_the_time_left_counts_the_evaluations_to_come(
    strategy: str, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    recorder: Any = SimpleNamespace(train_seconds=0.0)
    log: Any = SimpleNamespace(last_training_row=lambda: None)
    output = io.StringIO()
    shown = ShowProgress(Console(file=output, width=200), log, recorder)
    args, state = SimpleNamespace(eval_strategy=strategy, eval_on_start=False), TrainerState(max_steps=20, eval_steps=5)
    shown.on_train_begin(args, state, None)  # type: ignore[arg-type]
    if strategy == "steps":  # the one before the first step takes 10 s
        shown.on_prediction_step(args, state, None)
        clock.now = 10.0
        shown.on_evaluate(args, state, None, metrics={"eval_loss": 2.0})
    state.global_step, recorder.train_seconds = 5, 10.0
    shown.on_log(args, state, None, logs={"loss": 1.0})
    # 15 steps of 2 s, and evaluations after steps 10, 15 and 20
    assert f"step 5/20  {left} left" in output.getvalue()
