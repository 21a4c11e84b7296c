"""Switching from one adapter to another: how long it takes, and what a compiled model compiles again."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from paca.bench.methods import Method, MethodUnavailable
from paca.bench.step import TrainingStep
from paca.bench.timing import graphs_compiled

RECOMPILATIONS = ("steps", "first_switch", "switch_back")
_SECOND = "second"


def add_second_adapter(model: nn.Module, method: Method) -> None:
    """Put a second adapter of the same settings beside the first; where columns are drawn, it draws others."""
    if not isinstance(model, PeftModel):
        raise MethodUnavailable("has no adapter to switch")
    config: Any = copy.deepcopy(model.peft_config["default"])
    if hasattr(config, "random_seed"):
        config.random_seed += 1
    model.add_adapter(_SECOND, config, autocast_adapter_dtype=method.autocast_adapter_dtype)
    model.set_adapter("default")


def time_switches(step: TrainingStep, rounds: int) -> list[float]:
    """Seconds that a switch adds to a forward pass, per round; the batch of `step` should be small.

    A method may put work off until the next forward pass, so each round times a forward pass after `set_adapter` and
    one without, and takes the difference.
    """
    model: Any = step.model
    samples = []
    with torch.no_grad():
        step.forward()
        for number in range(rounds):
            start = step.clock()
            model.set_adapter("default" if number % 2 else _SECOND)
            step.forward()
            switched = step.clock()
            step.forward()
            samples.append((switched - start) - (step.clock() - switched))
    model.set_adapter("default")
    return samples


def count_recompilations(step: TrainingStep) -> tuple[int, int, int]:
    """Train two adapters in turn in a compiled model and count the graphs that are made after its first steps.

    Returns:
        As `RECOMPILATIONS` says: graphs made in three more steps of the same adapter, in a step after the first switch
            to the second one, and in a step after the switch back to the first and one after going to the second again.
    """
    model: Any = step.model

    def graphs_of(*adapters: str | None) -> int:
        before = graphs_compiled()
        for adapter in adapters:
            if adapter is not None:
                model.set_adapter(adapter)
            step.run()
        return graphs_compiled() - before

    graphs_of(None, None)
    return graphs_of(None, None, None), graphs_of(_SECOND), graphs_of("default", _SECOND)
