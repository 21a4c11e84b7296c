"""Resident columns, which live in the weight while their adapter is active (design, section 3): `ResidentColumns`
belongs to one weight, which every call hands it. `write_together` writes many."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from paca.columns import not_whole
from paca.columns.fingerprints import compare_values
from paca.columns.folded_in_weight import originals_of_folded, pieces, put_folded
from paca.columns.kept import Kept, add_scaled, holds, oriented, positions_of, sum_of
from paca.columns.other_weights import find_out
from paca.columns.state import ALONE, FOR_NOW, THREAD, ActiveColumns, AdapterColumns, State, identity, is_sharded
from paca.functional.column_blocks import blocks_in, blocks_of, put_columns, read_columns
from paca.functional.product import Trained

_CLAIMS: weakref.WeakValueDictionary[tuple[int, int], Any] = weakref.WeakValueDictionary()  # by memory and offset in it
WRITING = threading.RLock()  # writers are rare; a reader takes it if columns were written while it multiplied


class ResidentColumns(ActiveColumns):
    """Keeps `weight == round(W0 + sum_a scale_a * scatter(delta_a, indices_a))` over the active adapters. `dim` of the
    weight runs over the input features (1: `nn.Linear`, 0: `Conv1D`; of a stack -1, or -2 if it is transposed)."""

    kept: Kept  # the originals of the trained columns of `state`; there from the first write on

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.traced = Trained()  # the active columns as a compiled graph takes them
        self._folded: Kept | None = None  # those of folded columns beneath them, on the CPU
        self._parked_for_now = False
        self.half_written = False  # a write began, and did not end: another thread is at it, or an exception came
        self.memory: Any = None  # holds the address of the weight's memory, so that no other gets it
        self._shared = False  # a state dict got the weight's memory, and may have it still
        self._sent = True  # another process may have it, as torch.multiprocessing shares it

    def home_to_write(self, weight: Tensor) -> Tensor:
        """What columns are written into, given the module's weight, for a call that may write it."""
        taken = vars(weight).keys() & not_whole.TAKEN_APART or (weight.is_meta and self._left_as is not None)
        if type(weight) is not nn.Parameter or weight.dim() < 2 or taken:
            not_whole.refuse_flattened(weight)
        return weight

    def check_writable(self, weight: Tensor) -> None:
        """Raise if a layer is about to run on a part of its weight (tensor parallelism, ZeRO-3, FSDP1)."""
        if type(weight) is not nn.Parameter or weight.dim() < 2:
            not_whole.refuse_part(weight, self.state.columns)

    def local(self, layer: Any, adapter_name: str) -> tuple[Tensor, Tensor | None]:
        found = super().local(layer, adapter_name)
        if is_sharded(found[0]):
            not_whole.refuse_sharded_delta(adapter_name)
        return found

    def bring_up_to_date(self, weight: Tensor) -> None:
        """Make the weight that the layer multiplies with what was written."""

    def trained(self, state: State, layer: Any) -> Trained:
        """The columns of `state` that gradients go to."""
        return state.trained

    def looked_after(self, weight: Tensor | None) -> State | None:
        """What the weight holds, if this thread has entered the model, which looked after it; else None."""
        passes, entry, state = THREAD.passes, self.entry, self.state  # first the state: a mixed batch may begin now
        if not passes or entry is None or entry.mark is not passes[-1][0] or entry.unwritten or not self.whole:
            return None
        if type(weight) is not nn.Parameter or weight.dim() < 2 or torch._C._current_graph_task_id() != -1:
            return None
        if not torch.is_grad_enabled():
            self.note_forward()
        return state if state.unchanged() else None

    def untouched(self, weight: Tensor | None, state: State, saved_tag: Tensor) -> bool:
        """Whether nothing happened since the forward pass with `state`, so that its backward pass may go on."""
        if self.state is not state or saved_tag is not state.tag or weight is None or not self.whole:
            return False
        for c in state.columns:
            if self.revisions.get(c.name, 0) != c.revision or c.name not in self.trusted:
                return False
        return state.unchanged() and self._left_as == identity(weight)

    def find(self, weight: Tensor | None) -> None:
        """Look what a weight holds that is not as this one was left: another may have been in its place."""
        if weight is not None and not self.as_left(weight):
            with WRITING, ALONE:
                self.check_as_left(weight)

    def write(self, weight: Tensor, wanted: tuple[AdapterColumns, ...]) -> None:
        """Make the weight hold `wanted`, and nothing else. Writes the columns concerned, never the whole weight."""
        write_together([(self, weight, wanted)])

    def park(self, weight: Tensor, *, for_now: bool = False) -> None:
        """Put the original columns back, bit for bit; `for_now` if they are written again before the next forward."""
        with WRITING, ALONE:
            self.park_within(weight, for_now=for_now)

    def park_within(self, weight: Tensor, *, for_now: bool = False) -> None:
        """The same, within such a block."""
        with torch.inference_mode(False), torch.no_grad():
            self.check_as_left(weight)
            self._parked_for_now = for_now and (self._parked_for_now or bool(self.state.columns))
            if self.state.columns:
                self._take_out(weight)
                if for_now and self.entry is not None:
                    self.entry.unwritten = True

    def _take_out(self, weight: Tensor) -> None:
        self.parked = self.state, self._current(weight)
        self._put_back(weight)

    def _put_back(self, weight: Tensor) -> None:
        self._part_from_shared(weight)
        self.half_written = True
        for kept in self._all_kept(weight):
            kept.put_into(weight, self.dim)
        self._set_state(State((), self.base))
        self._left_as, self.half_written = identity(weight), False

    def _all_kept(self, weight: Tensor) -> Iterator[Kept]:
        yield self.kept
        if self._folded is not None:
            yield from pieces(self._folded, weight, self.dim)

    def prepare(self, weight: Tensor, wanted: tuple[AdapterColumns, ...]) -> State | None:
        """Keep the originals of the columns of `wanted`, and put those of other columns back. Gives the state to be
        written; None if there is nothing to write."""
        self.check_as_left(weight)
        state = State(wanted, self.base, like=self.state)
        if state.key == self.state.key:
            self._parked_for_now = self._parked_for_now and wanted is FOR_NOW  # else disabled now: parked for good
            return None
        if not self.state.columns or state.places != self.state.places:
            if self.state.columns:
                self._take_out(weight)
            self._parked_for_now = wanted is FOR_NOW
            if not state.columns:
                return None
            self._keep(weight, state.columns)
        self._part_from_shared(weight)
        self.half_written = True
        return state

    def _keep(self, weight: Tensor, columns: tuple[AdapterColumns, ...]) -> None:
        self._claim(weight)
        self.kept = Kept.of(weight, self.dim, positions_of(columns, weight.device))
        self._folded = None
        if any(c.folded is not None for c in columns):
            self._folded = originals_of_folded(weight, self.dim, columns)
            self._part_from_shared(weight)
            self.half_written = True
            put_folded(self._folded, weight, self.dim, columns)

    def _claim(self, weight: Tensor) -> None:
        place = weight.untyped_storage()._cdata, int(weight.storage_offset())
        if (other := _CLAIMS.get(place)) not in (None, self) and other.state.columns and other._left_as[1] == place[0]:
            not_whole.refuse_shared(weight, other.state.columns)
        _CLAIMS[place], self.memory = self, StorageWeakRef(weight.untyped_storage())

    def parked_columns(self, weight: Tensor, state: State) -> Tensor | None:
        """The columns that a park took out, if `state` is what they were of, else None. They go back as they were:
        computed anew, they would bring in a write through `.data`, under the old revision."""
        if self.parked is None or self.parked[0].key != state.key or not self.parked[0].unchanged():
            return None
        columns = self.parked[1]
        return columns if (columns.dtype, columns.device) == (weight.dtype, weight.device) else None

    def wrote(self, weight: Tensor, state: State) -> None:
        """Note that the columns of `state` were written."""
        self._set_state(state)
        self.parked, self.half_written, self._left_as = None, False, identity(weight)

    def compare(self, weight: Tensor) -> None:
        """Look whether deltas were written in a way that nobody saw: whether they still give what was written."""
        # Without gradients nothing is accounted for: the write that a backward pass is followed by may still come.
        self.unaccounted = self.unaccounted and not torch.is_grad_enabled()
        with WRITING, ALONE, torch.inference_mode(False), torch.no_grad():
            self.check_as_left(weight)
            state, columns = (self.state, None) if self.state.columns else (self.parked or (self.state, None))
            if state.columns and all(map(self.is_current, state.columns)):
                columns = self._current(weight) if columns is None else columns
                sums = sum_of(self.kept, state.columns, self.dim).to(columns.dtype)
                for c in () if Kept(self.kept.positions, columns).equal(sums) else state.columns:
                    self.written(c)
            if self.values_seen:  # in mixed batches
                compare_values(self, State((), self.base))

    def check_as_left(self, weight: Tensor) -> None:
        """Raise if somebody else wrote or replaced the weight while columns were in it, or parked for the moment."""
        if self.half_written:  # an exception came in the middle
            self._put_back(weight)
        if self.as_left(weight) and not self._parked_for_now:  # then it is compared: `.data` moves no version counter
            return None
        if not self.state.columns and not self._parked_for_now:
            self.parked, self._left_as = None, None
            return self.base_changed()  # it is a pretrained weight, which its owner may change
        if not self.as_left(weight) or not holds(weight, self.dim, self._all_kept(weight), self.state.columns):
            find_out(self, weight)
        self._left_as = identity(weight)
        return None

    def before_backward(self, weight: Tensor, state: State, saved_tag: Tensor) -> None:
        """Make the weight hold what the forward pass with `state` saw. Raises as what it calls."""
        self.find(weight)
        self.check_backward(state, saved_tag)
        if self.state is not state and self.state.key != state.key:
            with WRITING:
                self.check_backward(state, saved_tag)
                self.write(weight, state.columns or FOR_NOW)
                if self.entry is not None:
                    self.entry.unwritten = True

    def handed_out(self, shared: Any) -> None:
        """Note that a state dict got the (parked) weight as `shared`: a write while anyone has it goes to a copy."""
        self._shared = True

    def _part_from_shared(self, weight: Tensor) -> None:
        sent = self._sent and weight.device.type == "cpu" and weight.is_shared()
        if sent or (self._shared and users_of_memory(weight) > users_of_memory(torch.empty(1))):
            with torch.inference_mode(weight.is_inference()):
                weight.data = weight.data.clone()
            self._claim(weight)
        self._shared = self._sent = False

    def _current(self, weight: Tensor) -> Tensor:
        return read_columns(weight.detach(), self.dim, self.kept.positions.to(weight.device))

    def _set_state(self, state: State) -> None:
        self.state, before, now = state, self.state.trained, state.trained
        if before is not now:
            with torch.inference_mode(False):
                scales = tuple(
                    torch.tensor(scale, dtype=torch.promote_types(delta.dtype, torch.float32), device=delta.device)
                    for scale, delta in zip(now.scales, now.deltas, strict=True)
                )
            self.traced = Trained(now.deltas, now.indices, scales, (None,) * len(scales), now.rows)


def write_together(jobs: Iterable[tuple[ResidentColumns, Tensor, tuple[AdapterColumns, ...]]]) -> None:
    """Make many weights hold what is wanted of each: in a few kernels, where columns lie in blocks."""
    with WRITING, ALONE, torch.inference_mode(False), torch.no_grad():
        groups: dict[Any, tuple[list[Tensor], list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], [], []))
        values = 0  # so far
        prepared = [(columns, weight, columns.prepare(weight, wanted)) for columns, weight, wanted in jobs]
        written = [(columns, weight, state) for columns, weight, state in prepared if state is not None]
        # After all were looked at: slices of one tensor have one version counter.
        for columns, weight, state in written:
            only, originals, parked = state.columns[0], columns.kept.values, columns.parked_columns(weight, state)
            runs = state.trained.runs[0] if len(state.columns) == 1 and not weight.is_inference() else None
            if runs is None or parked is not None or only.folded is not None:
                sums = sum_of(columns.kept, state.columns, columns.dim) if parked is None else parked
                put_columns(weight, columns.dim, columns.kept.positions, sums)
            else:
                values += originals.numel()
                group = groups[only.scale, weight.device, weight.dtype, values // 2**20]  # 4 MiB of sums at a time
                wide = torch.promote_types(weight.dtype, torch.float32)
                delta = oriented(only.delta.detach(), columns.dim).to(originals.device, wide)
                group[0].extend(blocks_in(originals, columns.dim, runs))
                group[1].extend(blocks_in(delta, columns.dim, runs))
                group[2].extend(blocks_of(weight, columns.dim, runs))
        for (scale, *_), (originals_of, deltas, views) in groups.items():
            torch._foreach_copy_(views, add_scaled(originals_of, deltas, scale))
        for columns, weight, state in written:
            columns.wrote(weight, state)


def users_of_memory(tensor: Tensor) -> int:
    """How many tensors have this memory, besides what asks."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
