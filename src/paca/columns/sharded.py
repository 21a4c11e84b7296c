"""A weight that FSDP2 shards: the rows that this process owns, and the copy of all rows while the layer runs.

Columns live in the rows. Each process writes its own, from its own rows of the deltas, without communication; FSDP2
then gathers rows that are up to date (design, section 3, point 7). Only where rows were written after they had been
gathered do the columns concerned travel once more: where adapters were switched between a forward pass and its backward
pass, and where gathering begins before the model's own forward (the root module's weights, and what is prefetched).

Of FSDP2 it reads three attributes that are not public (torch 2.13): a DTensor's ``_local_tensor``, a module's
``_fsdp_param_groups`` and a group's ``_all_gather_result``.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from paca.columns.resident import ResidentColumns
from paca.columns.state import Columns, State
from paca.functional.column_blocks import put_columns, read_columns

_ADVICE = "Train with DistributedDataParallel, or leave the layer out of target_modules."


def is_sharded(value: object) -> bool:
    """Whether a parameter is a ``DTensor``, as FSDP2 and tensor parallelism make them."""
    if type(value) in (nn.Parameter, Tensor) or not isinstance(value, Tensor) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def check_whole(weight: Tensor) -> None:
    """Raise if a layer is about to run on a part of its weight.

    Raises:
        RuntimeError: under tensor parallelism and ZeRO-3.
    """
    if weight.dim() < 2:
        raise RuntimeError(
            f"A weight that PaCA trains columns of has the shape {tuple(weight.shape)}: DeepSpeed's ZeRO-3 takes "
            "weights away between uses. Use ZeRO stage 1 or 2, or FSDP2 (fully_shard)."
        )
    if is_sharded(weight):
        raise RuntimeError(
            "A layer that PaCA adapts runs on a sharded weight (a DTensor), as tensor parallelism does it. That is not "
            f"supported: its gradients would be wrong. FSDP2 (fully_shard) is. {_ADVICE}"
        )


def check_deltas_whole(wanted: tuple[Columns, ...]) -> None:
    """Raise if the deltas over a weight that is whole are sharded."""
    for columns in wanted:
        if is_sharded(columns.delta):
            raise RuntimeError(
                f"The deltas of adapter {columns.name!r} are sharded, and the weight below them is not. "
                "Shard both, or none (ignored_params)."
            )


def refuse_sharded(layers: Iterable[Any], what: str) -> None:
    """Raise if a layer's weight is sharded.

    Args:
        layers: adapted layers.
        what: can't be done to them.
    """
    if any(layer.base_layer.sharded is not None for layer in layers):
        raise ValueError(f"{what} needs whole weights, and these are sharded (FSDP2). Do it before fully_shard.")


class ShardableDeltas(nn.ParameterDict):
    """A ``ParameterDict`` that knows the shards while FSDP2 has put gathered parameters in their place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_deleted", ()):
            return  # FSDP2 goes on putting it back
        if is_sharded(value):
            shards = self.__dict__.setdefault("_shards", {})
            if name not in shards or shards[name].device_mesh == value.device_mesh:  # else see ShardedWeight.note
                shards[name] = value
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self.__dict__.get("_shards", {}).pop(name, None) is not None:
            self.__dict__.setdefault("_deleted", set()).add(name)
        super().__delattr__(name)

    def shard(self, name: str) -> Any:
        """The ``DTensor`` of which this process owns a part, or None if that parameter is not sharded."""
        return self.__dict__.get("_shards", {}).get(name)


class ShardedWeight:
    """What FSDP2 makes of one weight.

    Args:
        parameter: the sharded weight, a ``DTensor``.
        resident: the columns in its rows.
    """

    def __init__(self, parameter: Any, resident: ResidentColumns) -> None:
        self.parameter = parameter
        self.resident = resident
        self.input_dim = resident.input_dim
        self.group: Any = None
        """The FSDP2 group that gathers it, if ``find_groups`` has found it."""
        # How often the rows may have been written. Not whether they changed: processes must agree on who communicates.
        self._writes = 0
        self._copied_at = -1  # `_writes` when the rows were gathered
        self._old_positions: list[Tensor] = []  # of columns that may be in the copy, and are not in the rows any more
        self._gathered_before = False  # the next copy was gathered before the last write, or from a piece of a copy
        self._handed_out: list[weakref.ref[Any]] = []

    @property
    def rows(self) -> Tensor:
        """The rows that this process owns, ``(rows, ...)``; there may be none."""
        rows: Tensor = self.parameter._local_tensor
        return rows

    def rows_of(self, whole: Tensor) -> Tensor:
        """The rows of ``whole``, which has all rows, that this process owns."""
        from torch.distributed.tensor import Shard

        mesh = self.parameter.device_mesh
        for dim, placement in enumerate(self.parameter.placements):
            if isinstance(placement, Shard):
                pieces, mine = whole.chunk(mesh.size(dim)), mesh.get_local_rank(dim)
                whole = pieces[mine] if mine < len(pieces) else whole[:0]
        return whole

    def note(self, value: Any) -> None:
        """Note that ``value`` takes the weight's place: a shard, or all rows gathered."""
        if not is_sharded(value):
            if self.group is not None and not self._gathered_before:
                self._copied()
            self._gathered_before = False
        elif value.device_mesh == self.parameter.device_mesh:
            self.parameter = value
        else:  # a piece of the gathered copy, over fewer processes, to gather the next copy from
            self._gathered_before = True

    def check(self) -> None:
        """Raise if columns can't live in these rows.

        Raises:
            RuntimeError: if anything but the dimension of the output features is sharded.
        """
        from torch.distributed.tensor import Replicate, Shard

        kinds = {type(placement) for placement in self.parameter.placements}
        dims = {placement.dim for placement in self.parameter.placements if isinstance(placement, Shard)}
        inputs = self.input_dim % self.parameter.dim()
        if kinds - {Replicate, Shard} or dims - {0} or (dims and inputs == 0):
            where = ", ".join(map(str, self.parameter.placements))
            raise RuntimeError(
                f"A weight {tuple(self.parameter.shape)} that PaCA trains columns of is sharded as ({where}), and its "
                f"columns run along dimension {inputs}. Only the first dimension may be sharded, and the columns must "
                f"not run along it, so that every process holds whole columns of its rows. {_ADVICE}"
            )

    def before_write(self) -> None:
        """Call this before the rows may be written, in every process."""
        self._writes += 1
        positions = self.resident.positions
        if positions is not None and not any(positions is old for old in self._old_positions):
            self._old_positions.append(positions)
        if self.group is not None and getattr(self.group, "_all_gather_result", self.group) is not None:
            self._gathered_before = True  # it is on its way (prefetched), or may be
        for reference in self._handed_out:
            shared = reference()
            if shared is not None:
                shared._local_tensor = shared._local_tensor.clone()
        self._handed_out = []

    def handed_out(self, shared: Any) -> None:
        """Note that a state dict got a ``DTensor`` of these (parked) rows: it keeps them as they are now."""
        if is_sharded(shared):
            self._handed_out = [alive for alive in self._handed_out if alive() is not None] + [weakref.ref(shared)]

    @torch.no_grad()
    def bring_up_to_date(self, copy: Tensor) -> None:
        """Make the gathered ``copy`` what the rows of all processes are, by their columns. A collective, if needed."""
        if self._copied_at == self._writes:
            return
        now = self.resident.positions
        concerned = self._old_positions if now is None else [*self._old_positions, now]
        if concerned:
            from torch.distributed.tensor import DTensor

            positions = torch.cat([p.to(copy.device) for p in concerned]).unique()
            mine = read_columns(self.rows, self.input_dim, positions.to(self.rows.device)).to(copy.device)
            size = list(self.parameter.shape)
            size[self.input_dim] = positions.numel()
            sharded = DTensor.from_local(
                mine,
                self.parameter.device_mesh,
                self.parameter.placements,
                run_check=False,
                shape=torch.Size(size),
                stride=torch.empty(size, device="meta").stride(),
            )
            columns: Tensor = sharded.full_tensor().to(copy.dtype)
            put_columns(copy, self.input_dim, positions.to(copy.device), columns)
        self._copied()

    def before_backward(self, copy: Tensor, state: State, saved_tag: int) -> None:
        """Make ``copy`` hold what the forward pass with ``state`` saw. Raises as ``ResidentColumns`` does."""
        if self.resident.state.tag != state.tag:
            self.before_write()
        self.resident.before_backward(self.rows, state, saved_tag)
        self.bring_up_to_date(copy)

    def _copied(self) -> None:
        self._copied_at, self._old_positions = self._writes, []


def find_groups(model: nn.Module) -> None:
    """Tell the sharded weights in ``model`` which FSDP2 group gathers them: it knows whether that is under way.

    One that is not told (the group belongs to a module around ``model``) takes every copy for an old one.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in getattr(module._get_fsdp_state(), "_fsdp_param_groups", ()):
                for parameter in group.fsdp_params:
                    sharded = getattr(parameter._module_info.module, "sharded", None)
                    if isinstance(sharded, ShardedWeight):
                        sharded.group = group


def check_same_columns(indices: list[Tensor], device: torch.device) -> None:
    """Raise unless all processes train the same columns. A collective.

    Raises:
        RuntimeError: naming the remedy.
    """
    import torch.distributed as dist

    digest = hash(tuple(tuple(i.tolist()) for i in indices))
    both = torch.tensor([digest, ~digest], dtype=torch.int64, device=device)  # ~: the smallest by the largest
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    if int(both[0]) != ~int(both[1]):
        raise RuntimeError(
            "The processes train different columns of the same weights, so the rows that they own don't fit together. "
            "Choose the columns in one process and give them to all, or choose them from the same data."
        )
