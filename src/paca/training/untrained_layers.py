"""Tells what a run leaves untrained: experts that its adapter does not name, and adapted layers without a gradient.

A model may read a layer's weight without calling the layer: WavLM gives its attention projections' weights to one
function. The adapter takes effect then, but its deltas get no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from paca.layers.experts import is_transposed
from paca.messages.say import say

_STACKS_NAMED = ("paca", "lora")
"""The methods that can train experts, by `target_parameters`."""
_MARK = ".paca_delta."
_STEPS = 10  # experts and layers that are dropped at random may have no gradient in one of them


def told_of_experts(model: nn.Module, method: str, adapter: Mapping[str, Any]) -> str | None:
    """What is said of a mixture's experts where the adapter names no parameters; None where there are none."""
    if method not in _STACKS_NAMED or adapter.get("target_parameters"):
        return None
    stacks = {
        f"{name}.{own}": parameter.numel()
        for name, module in model.named_modules()
        if is_transposed(module) is not None
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }
    if not stacks:
        return None
    share = sum(stacks.values()) / sum(p.numel() for p in model.parameters())
    names = dict.fromkeys(".".join(name.split(".")[-2:]) for name in stacks)
    return f"{100 * share:.0f} % of the parameters, not trained; {method}.target_parameters: [{', '.join(names)}] does"


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
