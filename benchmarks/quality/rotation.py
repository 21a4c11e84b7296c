"""Rotation for probes: layers in groups that take turns, and an optimizer that does not start anew with full steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback

import paca
from paca.tuner.rotation.pickers import PICKERS, RotatingLayer

PICK = PICKERS["random_blocks"]


@dataclass(frozen=True)
class Rotation:
    """How layers rotate."""

    every: int  # steps between two rotations of one layer
    groups: int  # of layers; one after the other rotates, at equal distances
    rewarm: int = 0  # steps in which a group's rate grows to what it is elsewhere
    carry: bool = False  # second moments of new columns begin at their row's mean, instead of at zero with the steps


class InTurns(TrainerCallback):
    """Rotates one group of layers after the other."""

    def __init__(self, rotation: Rotation, optimizer: torch.optim.Optimizer, names: dict[int, str]) -> None:
        self.rotation, self.turns = rotation, dict.fromkeys(range(rotation.groups), 0)
        self.group_of, self.began = {}, dict.fromkeys(range(rotation.groups), -rotation.rewarm)
        groups: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            for number, parameter in enumerate(group["params"]):
                self.group_of[names[id(parameter)]] = number % rotation.groups
            for number in range(rotation.groups):
                groups.append({**group, "params": group["params"][number :: rotation.groups], "turn": number})
        optimizer.param_groups[:] = [group for group in groups if group["params"]]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Rotate the group whose turn it is."""
        step, distance = state.global_step, self.rotation.every // self.rotation.groups
        if not step or step % distance:
            return
        due = step // distance % self.rotation.groups
        self.turns[due] += 1
        self.began[due] = step

        def pick(layer: RotatingLayer) -> torch.Tensor:
            if self.group_of[layer.name] != due:
                return layer.layer.paca_indices[layer.adapter_name]
            return PICK(layer._replace(number=self.turns[due]))

        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])  # within accelerate's
        paca.rotate(kwargs["model"], None, max(self.turns.values()), pick=pick)
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["turn"] == due else ():
                if self.rotation.carry and parameter in optimizer.state:
                    optimizer.state[parameter]["exp_avg"].zero_()
                    squares = optimizer.state[parameter]["exp_avg_sq"]
                    squares.copy_(squares.mean(1, keepdim=True).expand_as(squares))
                else:
                    optimizer.state.pop(parameter, None)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The schedule sets all rates anew after the step."""
        for group in kwargs["optimizer"].param_groups:
            since = state.global_step - self.began[group["turn"]] + 1
            if since <= self.rotation.rewarm:
                group["lr"] *= since / self.rotation.rewarm
