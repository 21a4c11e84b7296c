"""Whether deltas still have the values that a pass ran with, where no weight holds columns to compare them with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from paca.columns.state import ActiveColumns, AdapterColumns, State, may_be_recorded

_BITS: dict[int, Any] = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def note_values(columns: ActiveColumns, state: State) -> None:
    """Note the values of a pass that a backward pass may follow: once for each revision, and nothing is waited for."""
    for c in state.columns if may_be_recorded() else ():
        noted: AdapterColumns | None = columns.values_seen.get(c.name, (None,))[0]
        if noted is None or noted.revision != c.revision or noted.delta is not c.delta:
            columns.values_seen[c.name] = c, _fingerprint(c.delta) if _is_there(c) else None, state


def compare_values(columns: ActiveColumns, state: State) -> None:
    """Move the revisions of adapters whose deltas changed since, in a way that no version counter shows; and those of
    `state` that no backward pass waits for."""
    for name, (c, before, _) in list(columns.values_seen.items()):
        if not columns.is_current(c):
            del columns.values_seen[name]
        elif before is not None and _is_there(c) and not torch.equal(_fingerprint(c.delta), before):
            columns.written(c)
    for c in state.columns:
        if c.name not in columns.values_seen and columns.is_current(c):
            columns.changed(c.name)


def _is_there(columns: AdapterColumns) -> bool:
    """Whether the delta has values (a plan's has none), and is not taken apart between passes (FSDP2, ZeRO-3)."""
    delta = columns.delta
    plain = type(delta) in (nn.Parameter, Tensor) and not delta.is_meta
    if not plain or columns.source is not None or hasattr(delta, "ds_id"):
        return False
    return delta.untyped_storage().nbytes() >= delta.numel() * delta.element_size()


@torch.no_grad()
def _fingerprint(delta: Tensor) -> Tensor:
    """Numbers that another delta hardly has: sums of each column's and each row's bits, as whole numbers."""
    with torch.inference_mode(False):
        bits = delta.detach().view(_BITS[delta.element_size()])
        return torch.cat([bits.sum(dim, dtype=torch.int64).flatten() for dim in (0, -1)])
