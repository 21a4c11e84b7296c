"""Tells which adapted layers get no gradient, in the first steps of a run.

A model may read a layer's weight without calling the layer: WavLM gives its attention projections' weights to one
function. The adapter takes effect then, but its deltas get no gradient.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerState, TrainingArguments

from paca.messages.say import say

_MARK = ".paca_delta."
_STEPS = 10  # experts and layers that are dropped at random may have no gradient in one of them


class TellUntrainedLayers(TrainerCallback):
    """Says once, after ten optimizer steps or at the end of fewer, which layers had no gradient in any.

    It says nothing where no delta has a gradient: DeepSpeed keeps them elsewhere, others step in the backward pass.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.steps = 0
        self.without: set[str] = set()
        """The deltas that had no gradient yet, by name."""
        self.trained = False
        """Whether one had."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Look which layers have a gradient."""
        if self.steps == _STEPS:
            return
        deltas = {n: p for n, p in model.named_parameters() if _MARK in n and p.requires_grad}
        now = {name for name, delta in deltas.items() if delta.grad is None}
        self.without = now if self.steps == 0 else self.without & now
        self.trained |= len(now) < len(deltas)
        self.steps += 1
        if self.steps == _STEPS:
            self._tell()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Tell of a run that is shorter."""
        if 0 < self.steps < _STEPS:
            self._tell()

    def _tell(self) -> None:
        if self.without and self.trained:
            names = sorted({n.partition(_MARK)[0].removeprefix("base_model.model.") for n in self.without})
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            say(
                self.console,
                f"Warning: these adapted layers had no gradient in {self.steps} steps: {', '.join(names[:3])}{more}. "
                "If the model reads their weights without calling them, as WavLM's attention does, they never train: "
                "leave them out of target_modules. Parts that no sample has reached yet may train later.",
                style="yellow",
            )
