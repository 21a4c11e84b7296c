"""Repeated forward passes: activation checkpointing must run them with the columns that they first ran with."""

from __future__ import annotations

import torch
from torch import Tensor

from paca.columns.state import State

_MESSAGE = (
    "Activation checkpointing repeats a forward pass with {now} active, but it first ran with other adapters or other "
    "values. Make the same adapters active again before backward(), or run backward() before switching or stepping."
)


def _names(state: State) -> str:
    return ", ".join(f"adapter {c.name!r}" for c in state.columns) or "no adapter"


def check_same_state(saved_tag: Tensor, state: State) -> None:
    """Check, in a backward pass, that its saved tensors come from the state of its forward pass.

    Checkpointing that is not re-entrant replaces saved tensors by those of the repeated forward pass.

    Args:
        saved_tag: ``state.tag_tensor`` as autograd kept it.
        state: of the forward pass.

    Raises:
        RuntimeError: if a forward pass was repeated with other adapters or values.
    """
    if int(saved_tag) != state.tag:
        raise RuntimeError(_MESSAGE.format(now="other adapters or values"))


class ForwardPasses:
    """The states that a layer's forward passes saw since its last backward pass.

    Re-entrant checkpointing repeats a forward pass within the backward pass, and its first run keeps nothing that the
    repeated one could be compared with; so the layer remembers.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._backward_ran = False

    def note(self, state: State) -> None:
        """Note a forward pass that sees ``state``.

        Raises:
            RuntimeError: if it runs within a backward pass, with a state that no forward pass had.
        """
        if torch._C._current_graph_task_id() == -1:
            if self._backward_ran:
                self._seen.clear()
                self._backward_ran = False
            self._seen.add(state.tag)
        else:
            self._backward_ran = True
            if state.tag not in self._seen:
                raise RuntimeError(_MESSAGE.format(now=_names(state)))
