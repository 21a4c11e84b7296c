"""What all processes that share sharded weights have to have in common: the columns, and what is active.

Rows of different states would be mixed without a word. Columns are compared once, by a collective. What is active is
compared whenever it changes, through the store of the process group: a process that does not change has no part in a
collective, and would meet the others' in the middle of something else. A step has no communication of this kind.
"""

from __future__ import annotations

import itertools
import zlib
from typing import Any

import torch
from torch import Tensor

_NUMBERS = itertools.count()  # of sharded models: all processes make them in the same order


class SameState:
    """Compares what is active in one sharded model with what the others of `ranks` have."""

    def __init__(self, ranks: list[int]) -> None:
        self.ranks = ranks
        self._known: Any = None
        self._name, self._change = f"paca/{next(_NUMBERS)}/{min(ranks)}", 0

    def check(self, layers: list[Any]) -> None:
        """Compare, if something changed since the last forward pass. Raise `RuntimeError` if another process has other
        adapters, or did not change anything (it is waited for as long as in a collective)."""
        wanted = [layer.wanted_names() for layer in layers]
        now = [
            (names, [layer.scaling[name] for name in names], layer.merged_adapters)
            for names, layer in zip(wanted, layers, strict=True)
        ]
        if now == self._known:
            return
        active = sorted({name for names, _, merged in now for name in (*names, *merged)})
        mine = f"{zlib.crc32(repr(now).encode())} {', '.join(active) or 'none'}"
        store, before = torch.distributed.distributed_c10d._get_default_store(), f"{self._name}/{self._change}"
        self._change += 1
        key = f"{self._name}/{self._change}"
        others = store.compare_set(f"{key}/state", "", mine).decode()  # the first of all processes says what is right
        last = others == mine and store.add(f"{key}/count", 1) == len(self.ranks)
        if last or others != mine:
            store.set(f"{key}/all", mine)
        for name in ("state", "count", "all") if last else ():  # nobody waits for these any more
            store.delete_key(f"{before}/{name}")
        if others == mine:
            try:
                others = store.get(f"{key}/all").decode()
            except torch.distributed.DistStoreError:
                others = " what they had before, or did not come to this forward pass"
        self._known = None
        if others != mine:
            raise RuntimeError(_DISAGREE.format(mine=mine.partition(" ")[2], others=others.partition(" ")[2]))
        self._known = [(names, scales, [*merged]) for names, scales, merged in now]


_DISAGREE = (
    "The processes disagree on what is active: this one has the adapters {mine}, others have {others} (or the same in "
    "other layers, or with another scale). Weights that FSDP2 shards are put together from the rows of all processes: "
    "switch, scale, disable and merge in all of them, before the same forward pass."
)


def check_same_columns(indices: list[Tensor], device: torch.device) -> None:
    """Raise `RuntimeError` unless all processes train the same columns. A collective."""
    import torch.distributed as dist

    digest = hash(tuple(tuple(i.tolist()) for i in indices))
    both = torch.tensor([digest, ~digest], dtype=torch.int64, device=device)  # ~: the smallest by the largest
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    if int(both[0]) != ~int(both[1]):
        raise RuntimeError(
            "The processes train different columns of the same weights, so the rows that they own don't fit together. "
            "Choose the columns in one process and give them to all, or choose them from the same data."
        )
