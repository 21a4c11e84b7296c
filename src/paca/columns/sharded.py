"""A weight that FSDP2 shards: the rows that this process owns, and the copy of all rows while the layer runs.

Columns live in the rows. Each process writes its own, from its own rows of the deltas, without communication; FSDP2
then gathers rows that are up to date (design, section 3, point 7). Only where rows were written after they had been
gathered do the columns concerned travel once more: where adapters were switched between a forward pass and its backward
pass, and where gathering begins before the model's own forward (the root module's weights, and what is prefetched).

Of FSDP2 it reads three attributes that are not public (torch 2.13): a DTensor's `_local_tensor`, a module's
`_fsdp_param_groups` and a group's `_all_gather_result`.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from paca.columns.kept import Kept
from paca.columns.lost import names_of
from paca.columns.merging import MergeableColumns
from paca.columns.same_everywhere import SameState, check_same_columns
from paca.columns.state import THREAD, State, is_sharded
from paca.functional.column_blocks import put_columns, read_columns
from paca.functional.product import Trained

_ADVICE = "Train with DistributedDataParallel, or leave the layer out of target_modules."


class ShardedColumns(MergeableColumns):
    """The columns of one weight that FSDP2 shards; its module has the rows and the gathered copy in turn."""

    whole = False
    parameter: Any
    """The sharded weight, a `DTensor`."""
    group: Any
    """The FSDP2 group that gathers it, if `find_groups` has found it."""

    @classmethod
    def of(cls, columns: Any, parameter: Any) -> ShardedColumns:
        """Turn the columns of a weight into these, in place."""
        columns.__class__ = cls
        sharded: ShardedColumns = columns
        sharded._begin(parameter)
        return sharded

    def _begin(self, parameter: Any) -> None:
        self.parameter, self.group = parameter, None
        # How often the rows may have been written. Not whether they changed: processes must agree on who communicates.
        self._writes = 0
        self._copied_at = -1  # `_writes` when the rows were gathered
        self._old_positions: list[Tensor] = []  # of columns that may be in the copy, and are not in the rows any more
        self._gathered_before = False  # the next copy was gathered before the last write, or from a piece of a copy
        self._same: SameState | None = None
        self._handed_out: list[weakref.ref[Any]] = []  # what state dicts got
        if self.entry is not None:
            self.entry.sharded = True

    def entered(self, model: nn.Module, sharded: list[Any]) -> None:
        """Note that a forward pass of `model` begins, which has these layers, all sharded: find the groups and compare
        the columns of all processes, once, and what is active, once for each change."""
        if self._same is None:
            find_groups(model)
            self._same = SameState(self.parameter.device_mesh.mesh.flatten().tolist())
            check_same_columns([i for layer in sharded for i in layer.paca_indices.values()], self.rows.device)
        self._same.check(sharded)

    @property
    def rows(self) -> Tensor:
        """The rows that this process owns, `(rows, ...)`; there may be none."""
        rows: Tensor = self.parameter._local_tensor
        return rows

    def rows_of(self, whole: Tensor) -> Tensor:
        """The rows of `whole`, which has all rows, that this process owns."""
        from torch.distributed.tensor import Shard

        mesh = self.parameter.device_mesh
        for dim, placement in enumerate(self.parameter.placements):
            if isinstance(placement, Shard):
                pieces, mine = whole.chunk(mesh.size(dim)), mesh.get_local_rank(dim)
                whole = pieces[mine] if mine < len(pieces) else whole[:0]
        return whole

    def as_left(self, weight: Tensor | None) -> bool:
        return super().as_left(self.rows)

    def find(self, weight: Tensor | None) -> None:
        super().find(self.rows)

    def replaced(self, value: Any) -> None:
        """Note that `value` takes the weight's place: a shard, or all rows gathered."""
        if not is_sharded(value):
            if self.group is not None and not self._gathered_before:
                self._copied()
            self._gathered_before = False
        elif value.device_mesh == self.parameter.device_mesh:
            self.parameter = value
        else:  # a piece of the gathered copy, over fewer processes, to gather the next copy from
            self._gathered_before = True

    def check_rows(self) -> None:
        """Raise `RuntimeError` if columns can't live in these rows: anything but the output features is sharded."""
        from torch.distributed.tensor import Replicate, Shard

        kinds = {type(placement) for placement in self.parameter.placements}
        dims = {placement.dim for placement in self.parameter.placements if isinstance(placement, Shard)}
        inputs = self.dim % self.parameter.dim()
        if kinds - {Replicate, Shard} or dims - {0} or (dims and inputs == 0):
            where = ", ".join(map(str, self.parameter.placements))
            raise RuntimeError(
                f"A weight {tuple(self.parameter.shape)} that PaCA trains columns of is sharded as ({where}), and its "
                f"columns run along dimension {inputs}. Only the first dimension may be sharded, and the columns must "
                f"not run along it, so that every process holds whole columns of its rows. {_ADVICE}"
            )

    @torch.no_grad()
    def take_over(self) -> None:
        """Note that these rows, copied as they were, took the place of a whole weight; park them. Raise `RuntimeError`
        if columns can't live in them, or folded columns are in the weight."""
        self.check_rows()
        if self._folded is not None and self.state.columns:
            raise RuntimeError(
                f"The columns of {names_of(self.state.columns)} were rotated (paca.rotate): beneath those that are "
                "trained lie others, which can't be taken out of a sharded weight. Merge the adapter, or train it with "
                "DistributedDataParallel."
            )
        self._shared = False  # no state dict shares the rows' memory
        if self.state.columns:
            put_columns(self.rows, self.dim, self.kept.positions, self.rows_of(self.kept.values))
        if self._originals_of_merged is not None:
            positions, values = self._originals_of_merged
            self._originals_of_merged = Kept(positions, self.rows_of(values))
        self.moved()
        self.base_changed()

    def check_writable(self, weight: Tensor) -> None:
        """Its rows are there in any case."""

    def home_to_write(self, weight: Tensor) -> Tensor:
        """The rows, which may be written now, in every process."""
        self._writes += 1
        positions = self.positions
        if positions is not None and not any(positions is old for old in self._old_positions):
            self._old_positions.append(positions)
        if self.group is not None and getattr(self.group, "_all_gather_result", self.group) is not None:
            self._gathered_before = True  # it is on its way (prefetched), or may be
        for reference in self._handed_out:
            shared = reference()
            if shared is not None:
                shared._local_tensor = shared._local_tensor.clone()
        self._handed_out = []
        return self.rows

    def wrote(self, weight: Tensor, state: State) -> None:
        super().wrote(weight, state)
        if THREAD.passes:  # FSDP2's streams began this pass before the model looked, and would not wait for the write
            wait_for_writes(self.rows.device)

    def handed_out(self, shared: Any) -> None:
        """Note that a state dict got a `DTensor` of these (parked) rows: it keeps them as they are now."""
        if is_sharded(shared):  # of its own, so that the rows' memory can be taken from it
            self._handed_out = [alive for alive in self._handed_out if alive() is not None] + [weakref.ref(shared)]

    @torch.no_grad()
    def bring_up_to_date(self, copy: Tensor) -> None:
        """Make the gathered `copy` what the rows of all processes are, by their columns. A collective, if needed."""
        if is_sharded(copy) or self._copied_at == self._writes:
            return
        now = self.positions
        concerned = self._old_positions if now is None else [*self._old_positions, now]
        if concerned:
            from torch.distributed.tensor import DTensor

            positions = torch.cat([p.to(copy.device) for p in concerned]).unique()
            mine = read_columns(self.rows, self.dim, positions.to(self.rows.device)).to(copy.device)
            size = list(self.parameter.shape)
            size[self.dim] = positions.numel()
            sharded = DTensor.from_local(
                mine,
                self.parameter.device_mesh,
                self.parameter.placements,
                run_check=False,
                shape=torch.Size(size),
                stride=torch.empty(size, device="meta").stride(),
            )
            columns: Tensor = sharded.full_tensor().to(copy.dtype)
            put_columns(copy, self.dim, positions.to(copy.device), columns)
        self._copied()

    def local(self, layer: Any, adapter_name: str) -> tuple[Tensor, Tensor | None]:
        """The rows of a delta that belong to the weight's, and the `DTensor` that they are a part of."""
        delta = layer.paca_delta.shard(adapter_name)
        if delta is None or delta.placements != self.parameter.placements:
            raise RuntimeError(
                f"Adapter {adapter_name!r} is not sharded as the weights below it are. Shard both, and adapt the model "
                "before that (fully_shard, Accelerator.prepare)."
            )
        if adapter_name in layer.folded:
            raise RuntimeError(
                f"Adapter {adapter_name!r} was rotated (paca.rotate): beneath the columns it trains lie others, which "
                "can't be put into sharded weights. Train it with DistributedDataParallel, or merge it first."
            )
        return delta._local_tensor, delta

    def trained(self, state: State, layer: Any) -> Trained:
        """All rows of the deltas, as FSDP2 gathered them."""
        return trained_through(state, layer.paca_delta)

    def before_backward(self, weight: Tensor, state: State, saved_tag: Tensor) -> None:
        if self.state.key != state.key:
            self.home_to_write(weight)
        super().before_backward(self.rows, state, saved_tag)
        self.bring_up_to_date(weight)

    def _copied(self) -> None:
        self._copied_at, self._old_positions = self._writes, []


def wait_for_writes(device: torch.device) -> None:
    """Wait until rows are written that a stream besides this one is about to gather."""
    if device.type != "cpu":
        torch.accelerator.current_stream(device).synchronize()


def trained_through(state: State, deltas: Any) -> Trained:
    """What gradients go to, by name in a module's pass: so ZeRO-3 and FSDP2 gather it, in the backward pass too."""
    return state.trained._replace(deltas=tuple(deltas[c.name] for c in state.columns))


@torch.no_grad()
def bring_deltas_up_to_date(deltas: Any) -> None:
    """Make the gathered copies of a layer's deltas what the rows of all processes are. A collective, of all adapters:
    processes may run others. Only what adds columns reads these values: after a step they may be old (LoRA's too)."""
    for name, copy in deltas.items():
        if not is_sharded(copy):
            copy.data.copy_(deltas.shard(name).full_tensor())


def find_groups(model: nn.Module) -> None:
    """Tell the sharded weights in `model` which FSDP2 group gathers them: it knows whether that is under way.

    One that is not told (the group belongs to a module around `model`) takes every copy for an old one.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in getattr(module._get_fsdp_state(), "_fsdp_param_groups", ()):
                for parameter in group.fsdp_params:
                    columns = getattr(parameter._module_info.module, "columns", None)
                    if isinstance(columns, ShardedColumns):
                        columns.group = group
