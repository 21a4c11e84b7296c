"""What the columns of a weight know of the model they are in."""

from __future__ import annotations

from typing import Any

import torch

from paca.columns.state import THREAD


class Entry:
    """What a compiled graph looks at before it reads the weights of a model (`paca.tuner.entry`)."""

    unwritten = False
    """Some weight does not hold what is active just now: a state dict or a copy was taken, or a backward pass put the
    columns of its forward pass back."""
    sharded = False  # FSDP2 shards some of its weights
    mark: object  # stands for it where a pass is noted: one that Ctrl-C ended stays there, and must not keep a model

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)  # which parking weights may change, while it is copied


def in_other_mode(columns: Any, training: bool) -> bool:
    """Whether a layer that runs without its model did so in another mode before, or its model did since."""
    if columns.entry is None or THREAD.passes or torch._C._current_graph_task_id() != -1:
        return False
    of_model, mode = THREAD.modes.get(columns.entry), (torch.is_grad_enabled(), training)
    model_then, then = THREAD.alone.get(columns, (None, None))
    THREAD.alone[columns] = of_model, mode
    return mode != (then if model_then is of_model else of_model)
