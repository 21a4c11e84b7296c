"""A resident layer whose model did not look for it: one that is called by itself, under FSDP2, in a repeated pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paca.columns.merging import MergeableColumns
from paca.columns.resident import WRITING
from paca.columns.state import State
from paca.columns.stepping import others_step


class LooksForItself(nn.Module):
    """Mixin for `ResidentWeight`."""

    columns: MergeableColumns
    owner: Callable[[], Any]

    def state_now(self) -> State:
        """What the weight holds; it is written before, if it is stale."""
        owner = self.owner()
        weight: Any = self._parameters.get("weight")
        weight = self.weight if weight is None else weight  # FSDP1 puts a plain tensor in its place
        self.columns.check_writable(weight)
        if owner is not None and owner.stale():
            with WRITING:  # steps and writes of other threads wait
                if not others_step():
                    owner.write()
        self.columns.bring_up_to_date(weight)
        self.columns.note_forward()
        return self.columns.state

    @torch.compiler.disable  # FSDP2's own hooks break the graph around the layer anyway
    def _run_apart(self, x: Tensor) -> Any:
        return self.forward(x)
