"""Refreshing many weights at once: the arithmetic of all of them in one flat tensor, instead of kernels per weight.

The other half of ``resident``: it reads and sets what ``ResidentColumns`` keeps to itself, under the same lock.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from paca.columns.resident import WRITING, ResidentColumns, bits_of
from paca.functional.rounding import add_once


@torch.no_grad()
def refresh_together(stale: list[tuple[ResidentColumns, Tensor]]) -> None:
    """Refresh many weights of one device and dtype: the same values as ``refresh`` on each, in fewer kernels.

    The arithmetic of all weights that hold one adapter is done in one flat tensor; what is left per weight is the
    single kernel that writes its columns.
    """
    with WRITING:
        joint: dict[tuple[float, torch.dtype], list[tuple[ResidentColumns, Tensor]]] = defaultdict(list)
        for resident, weight in stale:
            # A stack of experts fills the kernels alone; many together would take as much memory as a stack.
            if len(resident.wanted) != 1 or weight.dim() == 3:
                resident.refresh(weight)
            else:
                resident._check_seal(weight)
                only = resident.wanted[0]
                joint[only.scale, only.delta.dtype].append((resident, weight))
        for jobs in joint.values():
            _refresh_jointly(jobs)


def _refresh_jointly(jobs: list[tuple[ResidentColumns, Tensor]]) -> None:
    """Refresh weights, of one device, that hold one adapter each, with one scale and dtype."""
    for resident, weight in jobs:
        resident._place(weight, resident.wanted)
    originals = [resident._kept.values for resident, _ in jobs if resident._kept is not None]
    deltas = [
        resident.wanted[0].delta.detach() if resident.input_dim in (1, -1) else resident.wanted[0].delta.detach().mT
        for resident, _ in jobs
    ]
    flat = torch.cat([o.reshape(-1) for o in originals]), torch.cat([d.reshape(-1) for d in deltas])
    values = add_once(*flat, jobs[0][0].wanted[0].scale)
    parts = [
        part.view(o.shape) for part, o in zip(values.split([o.numel() for o in originals]), originals, strict=True)
    ]
    unmoved = [
        (resident, part)
        for (resident, _), part in zip(jobs, parts, strict=True)
        if resident._state.holds(resident.wanted)
    ]  # as far as version counters tell: compare
    written = _written_already(unmoved)
    for (resident, weight), part in zip(jobs, parts, strict=True):
        if id(resident) not in written:
            resident._hidden_writes += resident._state.holds(resident.wanted)
            resident._settle(weight, resident._new_state(), part)
        resident._finish()


def _written_already(values: list[tuple[ResidentColumns, Tensor]]) -> set[int]:
    """The ids of those that hold the values given with them."""
    if not values:
        return set()
    if values[0][1].device.type == "cpu":
        return {id(resident) for resident, part in values if resident._wrote(part)}
    # One comparison for all: each would wait for the device.
    now = torch.cat([bits_of(part).reshape(-1) for _, part in values])
    before = torch.cat([bits_of(r._written).reshape(-1) for r, _ in values if r._written is not None])
    return {id(resident) for resident, _ in values} if torch.equal(now, before) else set()
