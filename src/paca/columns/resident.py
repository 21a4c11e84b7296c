"""Resident columns: trained columns that live in the weight while their adapter is active.

``ResidentColumns`` belongs to one weight and owns the invariants of the design (section 3): what the weight holds,
when it is rewritten, how the pretrained columns come back bit for bit, and that a backward pass reads the columns
its forward pass read. It knows tensors only; which adapters are wanted is pushed in by the layer.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from paca.columns.folds import FoldsInWeight, Kept, oriented, parts_of, sum_of_parts
from paca.columns.state import Columns, State, version_of
from paca.functional.column_blocks import put_columns, read_columns
from paca.functional.rounding import add_once, round_once

WRITING = threading.RLock()  # writers are rare (once per optimizer step); readers never take it


class ResidentColumns:
    """Keeps ``weight == round(W0 + sum_a scale_a * scatter(delta_a, indices_a))`` over the wanted adapters.

    The sum is taken in float64 (float32 on devices without it) and rounded once to the weight's dtype; columns that
    several adapters share add up. Every method takes the weight, and holds no reference to it or to its module.

    Args:
        input_dim: the dimension of the weight that runs over the input features (1: ``nn.Linear``, 0: ``Conv1D``; for a
            stack of experts -1, or -2 if it is stored transposed).
    """

    def __init__(self, input_dim: int) -> None:
        self.input_dim = input_dim
        self.wanted: tuple[Columns, ...] = ()
        """What the next forward pass has to see."""
        self.graph_inputs: tuple[Tensor, ...] = ()
        """Indices, then deltas, of ``wanted``: all that a compiled graph may look at (it would be specialized on names
        and scales, and compiled anew when they change)."""
        self.suspect = False
        """The deltas may have changed in a way that version counters do not show: a backward pass ran."""
        self._generation = 0  # counts the changes of the weight beneath the columns: merges, loads
        self._state = State((), 0)
        self._kept: Kept | None = None
        self._folds = FoldsInWeight(input_dim)  # beneath the columns
        self._written: Tensor | None = None  # the columns as they were written last, to tell whether deltas moved
        self._merged: tuple[Columns, ...] = ()
        self._merged_kept: Kept | None = None
        self._remembered: dict[int, State] = {}
        self._lent: int | None = None  # users of the weight's storage before a state dict shared it
        self._handed_out: list[weakref.ref[Tensor]] = []  # what state dicts got
        self._hidden_writes = 0  # counts the changes of deltas that version counters did not show
        self._seal: tuple[int, int] | None = None  # the weight's version and storage as we left them
        self._seen: set[int] = set()  # tags of the forward passes since the last backward pass
        self._backward_ran = False

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """What the weight holds now."""
        return self._state

    @property
    def positions(self) -> Tensor | None:
        """``(k,)``, the columns of the weight that are not its own now; None if all are."""
        if self._merged_kept is not None:
            return self._merged_kept.positions
        return self._kept.positions if self._state.columns and self._kept is not None else None

    def stale(self, weight: Tensor) -> bool:
        """Whether ``weight`` may differ from what ``wanted`` asks for."""
        if not self._state.holds(self.wanted):
            return True
        return bool(self.wanted) and (self.suspect or self._seal != _identity(weight))

    def note_forward(self) -> None:
        """Note that a forward pass reads the weight as it is now.

        Raises:
            RuntimeError: if it runs within a backward pass, repeated by activation checkpointing, with columns that no
                forward pass ran with. (If it is not re-entrant, ``before_backward`` checks exactly.)
        """
        if torch._C._current_graph_task_id() == -1:
            if self._backward_ran:
                self._seen.clear()
                self._backward_ran = False
            self._seen.add(self._state.tag)
        elif self._state.tag not in self._seen:
            raise RuntimeError(
                f"Activation checkpointing repeats a forward pass with {self._names(self.wanted)} active, but it first "
                "ran with other adapters or other values. Make the same adapters active again before backward(), or "
                "run backward() before switching or stepping."
            )

    def want(self, columns: tuple[Columns, ...]) -> None:
        """Say what the next forward pass has to see. Writes nothing yet."""
        now = self.wanted
        if len(now) != len(columns) or not all(a.same_as(b) for a, b in zip(now, columns, strict=True)):
            self.wanted = columns
            self.graph_inputs = (*(c.indices for c in columns), *(c.delta for c in columns))

    # -- writing ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Make the weight hold ``wanted``. Writes the columns concerned, never the whole weight."""
        with WRITING:
            self._check_seal(weight)
            if not self._state.holds(self.wanted):
                self._settle(weight, self._new_state())
            elif self.wanted:  # nothing moved as far as version counters tell: compare
                values = self._values(weight, self.wanted)
                if not self._wrote(values):
                    self._hidden_writes += 1
                    self._settle(weight, self._new_state(), values)
            self._finish()

    @torch.no_grad()
    def park(self, weight: Tensor) -> None:
        """Put the original columns back, bit for bit."""
        with WRITING:
            self._check_seal(weight)
            if self._state.columns:
                self._settle(weight, State((), self._generation))

    def write_parked(self, weight: Tensor, write: Callable[[], None], *, hidden: bool) -> None:
        """Call ``write``, which replaces deltas and indices in place, while none of them is in the weight.

        ``hidden``: the version counters won't show it, so graphs that are pending must not rely on them.
        """
        with WRITING:
            self.park(weight)
            write()
            self._hidden_writes += hidden

    @torch.no_grad()
    def rotate(self, weight: Tensor, delta: Tensor, write: Callable[[], None]) -> None:
        """Call ``write``, which folds the columns of ``delta`` and makes others the trained ones, in place.

        A weight that holds these columns and no other adapter's stays as it is: what was trained is in it already.
        """
        with WRITING:
            self.refresh(weight)
            before = self._state.columns
            if len(before) > 1 and any(c.delta is delta for c in before):
                self.park(weight)
            write()
            if len(before) == 1 and before[0].delta is delta:
                assert self._kept is not None
                self._kept = self._folds.rotate(weight, self._kept, self.wanted[0])
                self._begin_generation()
                self._state, self._written = self._new_state(), self._current(weight)
                self._seal = _identity(weight)
                self._finish()

    def before_backward(self, weight: Tensor, state: State, saved_tag: int) -> None:
        """Make the weight hold what the forward pass with ``state`` saw.

        Raises:
            RuntimeError: if that is no longer possible (a delta was modified, the weight was merged, loaded or given
                back in between), or if activation checkpointing repeated the forward pass with other adapters.
        """
        if saved_tag != state.tag:
            raise RuntimeError(
                "Activation checkpointing repeated a forward pass with other adapters than it first ran with "
                f"({self._names(state.columns)} then, {self._names(self.wanted)} now). Make the same adapters active "
                "again before backward(), or run backward() before switching."
            )
        if state.generation != self._generation:
            raise RuntimeError(
                "The weight of an adapted layer was merged, unmerged or loaded between forward and backward, or its "
                "columns rotated, or its adapter unloaded, so the gradient can't be computed. Run backward() first."
            )
        if not state.unchanged() or (state.columns and state.hidden_writes != self._hidden_writes):
            raise RuntimeError(
                f"The columns of {self._names(state.columns)} were modified between forward and backward (by an "
                "optimizer step or an in-place operation), so the gradient can't be computed. Run backward() first."
            )
        if self._state.tag != state.tag or (state.columns and self._seal != _identity(weight)):
            with torch.no_grad(), WRITING:
                self._check_seal(weight)
                if self._state.tag != state.tag:
                    self._settle(weight, state)
        self.suspect = self._backward_ran = True  # an optimizer step may follow

    def remember(self, state: State) -> None:
        """Keep ``state`` for the backward pass of a compiled graph, which can hold its tag only."""
        self._remembered[state.tag] = state
        while len(self._remembered) > 64:
            del self._remembered[next(iter(self._remembered))]

    def remembered(self, tag: int) -> State:
        """The state of that tag.

        Raises:
            RuntimeError: if more than 64 other states came after it.
        """
        if tag not in self._remembered:
            raise RuntimeError(
                "The columns that a compiled forward pass used are no longer known: too many optimizer steps or "
                "switches of adapters came between it and its backward pass. Run backward() earlier."
            )
        return self._remembered[tag]

    def forget(self, delta: Tensor) -> None:
        """Drop what is remembered of a deleted adapter."""
        self._remembered = {
            tag: state for tag, state in self._remembered.items() if all(c.delta is not delta for c in state.columns)
        }

    # -- merging ------------------------------------------------------------------------------------------------

    @property
    def merged(self) -> tuple[Columns, ...]:
        """The columns that were merged into the weight; while there are any, none are resident."""
        return self._merged

    @torch.no_grad()
    def merge(self, weight: Tensor, columns: tuple[Columns, ...], *, safe: bool) -> None:
        """Make ``columns`` part of the weight until ``unmerge``; same values, bit for bit, as when resident.

        Raises:
            ValueError: if ``safe`` and a merged value would not be finite; nothing is written then.
        """
        with WRITING:
            self.park(weight)
            together = self._merged + columns
            already = self._merged_kept
            if already is not None:
                self._put(weight, *already)
            kept = self._take(weight, parts_of(together))
            values = self._merged_sum(kept, together, weight.dtype)
            if safe and not bool(torch.isfinite(values).all()):
                if already is not None:
                    self._put(weight, already.positions, self._merged_sum(already, self._merged, weight.dtype))
                raise ValueError(
                    f"Merging {self._names(columns)} would put NaN or Inf into the weight, so nothing was merged. "
                    "The adapter is broken: train it again with a smaller learning rate, or use an earlier checkpoint."
                )
            self._put(weight, kept.positions, values)
            self._merged, self._merged_kept = together, kept
            self._begin_generation()

    @torch.no_grad()
    def unmerge(self, weight: Tensor) -> None:
        """Undo ``merge``, bit for bit."""
        with WRITING:
            if self._merged_kept is not None:
                self._put(weight, *self._merged_kept)
            self._merged, self._merged_kept = (), None
            self._begin_generation()

    def seal_merge(self) -> None:
        """Forget the originals of a merge: what is merged becomes the weight."""
        self._merged, self._merged_kept = (), None

    # -- the weight as others see it ----------------------------------------------------------------------------

    def lend(self, weight: Tensor) -> None:
        """Note that a state dict is about to share the (parked) weight's storage.

        Should the weight be written while anyone still holds that storage (the state dict's tensor, a view of it, a
        numpy array), the weight moves to a copy first: what was handed out goes on holding the pretrained columns, and
        memory is spent only if it is kept.
        """
        if self._lent is None:
            self._lent = _storage_users(weight)

    def handed_out(self, shared: Tensor) -> None:
        """Note what a state dict got after ``lend``: the count of users alone would not show it any more once one of
        those that were there before is gone."""
        self._handed_out = [alive for alive in self._handed_out if alive() is not None] + [weakref.ref(shared)]

    @torch.no_grad()
    def sharded(self, rows: Tensor, rows_of: Callable[[Tensor], Tensor]) -> None:
        """Note that ``rows`` of the weight, copied as they were, took its place; park them.

        Args:
            rows: no state dict shares their memory.
            rows_of: the same rows of any tensor of the weight's rows.

        Raises:
            RuntimeError: if folded columns are in the weight.
        """
        if not self._folds.are_those_of(()):
            raise RuntimeError(
                f"The columns of {self._names(self._state.columns)} were rotated (paca.rotate): beneath those that are "
                "trained lie others, which can't be taken out of a sharded weight. Merge the adapter, or train it with "
                "DistributedDataParallel."
            )
        self._lent, self._handed_out = None, []
        if self._state.columns and self._kept is not None:
            self._put(rows, self._kept.positions, rows_of(self._kept.values))
        if self._merged_kept is not None:
            self._merged_kept = self._merged_kept._replace(values=rows_of(self._merged_kept.values))
        self._begin_generation()

    def reloaded(self) -> None:
        """Note that new values were loaded into the (parked) weight."""
        self._begin_generation()

    def let_go(self, weight: Tensor) -> None:
        """Park for good: backward passes that are pending may not write columns into the weight any more."""
        self.park(weight)
        self._begin_generation()

    def __getstate__(self) -> dict[str, object]:
        if self._state.columns:
            raise RuntimeError("resident columns must be parked before they are copied or pickled")
        state = self.__dict__.copy()
        state.update(_lent=None, _handed_out=[], _remembered={}, _seal=None, _seen=set(), _kept=None)
        state["_folds"] = FoldsInWeight(self.input_dim)
        state["_state"] = None
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._state = State((), self._generation)

    # -- inside -------------------------------------------------------------------------------------------------

    @staticmethod
    def _names(columns: tuple[Columns, ...]) -> str:
        return ", ".join(f"adapter {c.name!r}" for c in columns) or "no adapter"

    def _begin_generation(self) -> None:
        self._generation += 1
        self._state, self._written = State((), self._generation), None

    def _new_state(self) -> State:
        return State(self.wanted, self._generation, self._hidden_writes)

    def _finish(self) -> None:
        # With a gradient in place an optimizer may still write without anyone noticing: look again next time.
        self.suspect = any(c.parameter.grad is not None for c in self._state.columns)

    def _wrote(self, values: Tensor) -> bool:
        """Whether ``values`` are what was written last, to the bit (NaN is equal to itself)."""
        return self._written is not None and torch.equal(bits_of(values), bits_of(self._written))

    def _check_seal(self, weight: Tensor) -> None:
        """See whether somebody else wrote into, or replaced, the weight while columns were in it."""
        if not self._state.columns or self._seal == _identity(weight):
            return
        assert self._kept is not None
        current, columns = self._current(weight), self._state.columns
        same = self._state.unchanged() and torch.equal(current, self._values(weight, columns))
        if same and self._folds.are_in(weight, self._kept.positions):
            self._seal = _identity(weight)  # the same values were written, or it was moved as it is
        elif torch.equal(current, self._kept.values.to(current)) and self._folds.are_out_of(weight):
            self._kept = self._written = None
            self._folds.forget()
            self._state = State((), self._generation)  # it is a pretrained weight
        else:
            raise RuntimeError(
                f"The weight of a layer adapted by {self._names(self._state.columns)} was written or replaced while "
                "the adapter's columns were in it, so that its pretrained columns are not known any more. Change base "
                "weights under disable_adapter(), or through load_state_dict()."
            )

    def _settle(self, weight: Tensor, state: State, values: Tensor | None = None) -> None:
        self._place(weight, state.columns)
        if state.columns:
            values = self._values(weight, state.columns) if values is None else values
            if not self._folds.are_those_of(state.columns):
                self._folds.put_in(weight, state.columns, self._put)
            self._put(weight, self._kept_positions(), values)
        self._state, self._written = state, values
        self._seal = _identity(weight)

    def _place(self, weight: Tensor, columns: tuple[Columns, ...]) -> None:
        """Keep the originals of ``columns``, having put back those of the columns that are in the weight.

        If those were elsewhere, the weight is parked then, and known to be.
        """
        if self._same_places(columns):
            return
        if self._state.columns:
            assert self._kept is not None
            self._put(weight, *self._kept)
            self._folds.take_out(weight, self._put)
            self._state, self._written = State((), self._generation), None
        self._kept = self._take(weight, columns) if columns else None

    def _same_places(self, columns: tuple[Columns, ...]) -> bool:
        """Whether ``columns`` are where those that the weight holds are."""
        state = self._state
        if len(columns) != len(state.columns):
            return False
        for old, new, (_, version) in zip(state.columns, columns, state.versions, strict=True):
            if old.indices is not new.indices or version != version_of(new.indices):
                return False
        return self._folds.are_those_of(columns)

    def _kept_positions(self) -> Tensor:
        assert self._kept is not None
        return self._kept.positions

    def _current(self, weight: Tensor) -> Tensor:
        return read_columns(weight.detach(), self.input_dim, self._kept_positions().to(weight.device))

    def _values(self, weight: Tensor, columns: tuple[Columns, ...]) -> Tensor:
        assert self._kept is not None
        return self._sum(self._kept, columns, weight.dtype)

    def _take(self, weight: Tensor, columns: tuple[Columns, ...]) -> Kept:
        if len(columns) == 1:
            positions = columns[0].indices.to(weight.device, copy=True)
        else:
            positions = torch.cat([c.indices.to(weight.device) for c in columns]).unique(sorted=True)
        return Kept(positions, read_columns(weight.detach(), self.input_dim, positions))

    def _sum(self, kept: Kept, columns: tuple[Columns, ...], dtype: torch.dtype) -> Tensor:
        if len(columns) == 1:
            only = columns[0].delta.detach()
            if only.device != kept.values.device:
                only = only.to(kept.values.device)
            values = kept.values if kept.values.dtype == dtype else kept.values.to(dtype)
            return add_once(values, oriented(only, self.input_dim), columns[0].scale)
        if any(c.folded is not None for c in columns):
            return sum_of_parts(kept, parts_of(columns), dtype, self.input_dim)
        # float64, so that the one rounding is the cast to the weight's dtype; MPS has no float64.
        wide = torch.float32 if kept.values.device.type == "mps" else torch.float64
        total = kept.values.to(wide)
        for c in columns:
            part = c.delta.detach().to(device=total.device, dtype=wide)
            places = torch.searchsorted(kept.positions, c.indices.to(total.device))
            total = total.index_add(self.input_dim, places, oriented(part, self.input_dim), alpha=c.scale)
        return round_once(total, dtype)

    def _merged_sum(self, kept: Kept, columns: tuple[Columns, ...], dtype: torch.dtype) -> Tensor:
        """As ``_sum``, with ``kept`` covering the folded columns too."""
        parts = parts_of(columns)
        if len(parts) == len(columns):
            return self._sum(kept, columns, dtype)
        return sum_of_parts(kept, parts, dtype, self.input_dim)

    def _put(self, weight: Tensor, positions: Tensor, values: Tensor) -> None:
        self._part_from_lent(weight)
        if positions.device != weight.device:
            positions = positions.to(weight.device)
        if values.device != weight.device or values.dtype != weight.dtype:
            values = values.to(weight)
        if weight.is_inference():
            with torch.inference_mode():
                put_columns(weight, self.input_dim, positions, values)
        else:
            put_columns(weight, self.input_dim, positions, values)

    def _part_from_lent(self, weight: Tensor) -> None:
        if self._lent is not None:
            storage = weight.untyped_storage()._cdata
            shared = (alive() for alive in self._handed_out)
            kept = any(tensor is not None and tensor.untyped_storage()._cdata == storage for tensor in shared)
            if kept or _storage_users(weight) > self._lent:
                weight.data = weight.data.clone()
        self._lent, self._handed_out = None, []


def bits_of(tensor: Tensor) -> Tensor:
    """``tensor`` as integers."""
    return tensor.view(getattr(torch, f"int{8 * tensor.element_size()}"))


def _identity(weight: Tensor) -> tuple[int, int]:
    return version_of(weight), weight.untyped_storage()._cdata


def _storage_users(weight: Tensor) -> int:
    return torch._C._storage_Use_Count(weight.untyped_storage()._cdata)
