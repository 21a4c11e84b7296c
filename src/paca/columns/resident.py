"""Resident columns: trained columns that live in the weight while their adapter is active.

`ResidentColumns` belongs to one weight: what it holds, how columns get in, how the originals come back bit for bit, and
that a backward pass reads the columns its forward pass read (design, section 3). It is handed the weight by every call,
and holds no reference to it. `write_together` writes the columns of many weights.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from paca.columns.kept import Kept, add_scaled, oriented, positions_of, sum_of, write_columns
from paca.columns.state import ActiveColumns, AdapterColumns, State, names_of, next_revision, version_of
from paca.functional.column_blocks import blocks_in, blocks_of, read_columns
from paca.functional.train_columns import Trained

WRITING = threading.RLock()  # writers are rare (once per optimizer step); readers never take it


class Entry:
    """What a compiled graph looks at before it reads the weights of a model (`paca.tuner.entry`)."""

    unwritten = False
    """Some weight does not hold what is active just now: a state dict or a copy was taken, or a backward pass put the
    columns of its forward pass back."""
    sharded = False
    """FSDP2 shards some of its weights."""

    def write_stale(self) -> None:
        """Write what the model's layers want and their weights do not hold."""


class ResidentColumns(ActiveColumns):
    """Keeps `weight == round(W0 + sum_a scale_a * scatter(delta_a, indices_a))` over the active adapters.

    The sum is taken in float32 (float64 for float64 weights) and rounded once to the weight's dtype; columns that
    several adapters share add up.

    Args:
        dim: the dimension of the weight that runs over the input features (1: `nn.Linear`, 0: `Conv1D`; for a stack of
            experts -1, or -2 if it is stored transposed).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.entry: Entry | None = None
        self.traced = Trained()
        """The active columns as a compiled graph takes them."""
        self._traced_scales: tuple[float, ...] = ()
        self.merged: tuple[AdapterColumns, ...] = ()
        """What was merged into the weight; while there is any, nothing is resident."""
        self._forget()

    def _forget(self) -> None:
        self._kept: Kept | None = None  # the originals of the trained columns of `state`
        self._folded: Kept | None = None  # those of folded columns beneath them, on the CPU
        self._originals_of_merged: Kept | None = None
        self._parked: tuple[State, Tensor] | None = None  # the state that a park took out, and its columns
        self._parked_for_now = False
        self._half_written = False  # a write began, and did not end
        self._seal: tuple[int, int] | None = None  # the weight's version and memory as we left them
        self._lent: int | None = None  # users of the weight's memory before a state dict shared it
        self._handed_out: list[weakref.ref[Tensor]] = []  # what state dicts got

    @property
    def positions(self) -> Tensor | None:
        """`(k,)`, the columns of the weight that are not its own now; None if all are."""
        if self._originals_of_merged is not None:
            return self._originals_of_merged.positions
        return self._kept.positions if self.state.columns and self._kept is not None else None

    def sealed(self, weight: Tensor) -> bool:
        """Whether the weight is as we left it: written or replaced by nobody else."""
        return self._seal is None or self._seal == _identity(weight)

    # -- writing and parking ------------------------------------------------------------------------------------

    def write(self, weight: Tensor, wanted: tuple[AdapterColumns, ...]) -> None:
        """Make the weight hold `wanted`, and nothing else. Writes the columns concerned, never the whole weight."""
        write_together([(self, weight, wanted)])

    def park(self, weight: Tensor, *, for_now: bool = False) -> None:
        """Put the original columns back, bit for bit.

        Args:
            weight: as `state` says.
            for_now: the adapters stay active: they are written again before the next forward pass.
        """
        with WRITING, torch.inference_mode(False), torch.no_grad():
            self.check_seal(weight)
            if self.state.columns:
                self._take_out(weight)
                self._parked_for_now = for_now
                if for_now and self.entry is not None:
                    self.entry.unwritten = True
            elif not for_now:
                self._parked_for_now = False

    def _take_out(self, weight: Tensor) -> None:
        assert self._kept is not None
        self._parked = self.state, self._current(weight)
        self._put_back(weight)

    def _put_back(self, weight: Tensor) -> None:
        assert self._kept is not None
        self._part_from_lent(weight)
        self._kept.put_into(weight, self.dim)
        if self._folded is not None:
            for piece in self._folded.pieces(weight, self.dim):
                piece.put_into(weight, self.dim)
        self._set_state(State((), self.base))
        self._seal, self._half_written = _identity(weight), False

    def prepare(self, weight: Tensor, wanted: tuple[AdapterColumns, ...]) -> State | None:
        """Get the weight ready for the columns of `wanted`: their originals are kept, those of other columns are back.

        Returns:
            The state to be written; None if there is nothing to write.
        """
        self.check_seal(weight)
        state = State(wanted, self.base, like=self.state)
        if state.key == self.state.key:
            return None
        if not (self.state.columns and state.has_places_of(self.state) and _same_folds(state, self.state)):
            if self.state.columns:
                self._take_out(weight)
            self._parked_for_now = False
            if not state.columns:
                return None
            self._keep(weight, state.columns)
        self._part_from_lent(weight)
        self._half_written = True
        return state

    def _keep(self, weight: Tensor, columns: tuple[AdapterColumns, ...]) -> None:
        self._kept = Kept.of(weight, self.dim, positions_of(columns, weight.device))
        self._folded = None
        folded = tuple(part for c in columns for part in c.parts()[1:])
        if folded:
            kept = Kept.of(weight, self.dim, positions_of(folded, weight.device))
            self._folded = Kept(kept.positions.cpu(), kept.values.cpu())
            self._part_from_lent(weight)
            self._half_written = True
            for piece in self._folded.pieces(weight, self.dim):
                write_columns(weight, self.dim, piece.positions, sum_of(piece, _parts(columns), self.dim))

    def wrote(self, weight: Tensor, state: State) -> None:
        """Note that the columns of `state` were written."""
        self._set_state(state)
        self._parked, self._half_written = None, False
        self._seal = _identity(weight)

    @property
    def kept(self) -> Kept:
        """The originals of the trained columns of the state that is prepared or there."""
        assert self._kept is not None
        return self._kept

    def compare(self, weight: Tensor) -> None:
        """Look whether deltas were written in a way that nobody saw: whether they still give what was written."""
        # Without gradients nothing is accounted for: the write that a backward pass is followed by may still come.
        self.unaccounted = self.unaccounted and not torch.is_grad_enabled()
        with WRITING, torch.inference_mode(False), torch.no_grad():
            self.check_seal(weight)
            state, columns = (self.state, None) if self.state.columns else (self._parked or (self.state, None))
            if not state.columns or any(self.revisions.get(c.name, 0) != c.revision for c in state.columns):
                return
            sums = sum_of(self.kept, _parts(state.columns), self.dim)
            columns = self._current(weight) if columns is None else columns
            if not Kept(self.kept.positions, columns).equal(sums.to(columns.dtype)):
                for c in state.columns:
                    self.changed(c.name)

    def check_seal(self, weight: Tensor) -> None:
        """See whether somebody else wrote into, or replaced, the weight.

        Raises:
            RuntimeError: if that was while columns were in it, or parked for the moment, and they are not there now.
        """
        if self._half_written:  # an exception came in the middle
            self._put_back(weight)
            return
        if self._seal is None or self._seal == _identity(weight):
            return
        if not self.state.columns and not self._parked_for_now:
            self._parked, self._seal = None, None
            self.base_changed()  # it is a pretrained weight, which its owner may change
        elif self._is(weight, self.state.columns):
            self._seal = _identity(weight)  # the same values were written, or it was moved as it is
        elif self.state.columns and self._is(weight, ()):
            self._parked, self._seal = None, None
            self._set_state(State((), self.base))  # it was replaced by its pretrained one
        else:
            columns = self.state.columns or (self._parked[0].columns if self._parked else ())
            raise RuntimeError(
                f"The weight of a layer adapted by {names_of(columns)} was written or replaced while the adapter was "
                "active, so that its pretrained columns are not known any more. Change base weights under "
                "disable_adapter(), or through load_state_dict(). (torch's AveragedModel averages base weights too: "
                "average the trained parameters alone, for instance with model.load_state_dict(..., strict=False).)"
            )

    def _is(self, weight: Tensor, columns: tuple[AdapterColumns, ...]) -> bool:
        """Whether the kept places of the weight hold `columns`, or their originals for none."""
        parts = _parts(columns)
        for kept in (self.kept, *(self._folded.pieces(weight, self.dim) if self._folded is not None else ())):
            now = read_columns(weight.detach(), self.dim, kept.positions.to(weight.device))
            if not Kept(kept.positions, now).equal(sum_of(kept, parts, self.dim).to(now)):
                return False
        return True

    # -- passes -------------------------------------------------------------------------------------------------

    def before_backward(self, weight: Tensor, state: State, saved_tag: Tensor) -> None:
        """Make the weight hold what the forward pass with `state` saw.

        Raises:
            RuntimeError: as `check_backward`, or if somebody else wrote the weight.
        """
        if self.state is state and saved_tag is state.tag and state.base == self.base and state.unchanged():
            current = all(self.revisions.get(c.name, 0) == c.revision for c in state.columns)
            if current and self._seal == _identity(weight):  # as it is nearly always
                self.passed_back(state)
                return
        self.check_backward(state, saved_tag)
        if self.state.key != state.key or not self.sealed(weight):
            with WRITING:
                self.check_seal(weight)
                self.check_backward(state, saved_tag)
                self.write(weight, state.columns)
                if self.entry is not None:
                    self.entry.unwritten = True

    # -- merging and rotating -------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, weight: Tensor, columns: tuple[AdapterColumns, ...], *, safe: bool) -> None:
        """Make `columns` part of the weight until `unmerge`; same values, bit for bit, as when resident.

        Raises:
            ValueError: if `safe` and a merged value would not be finite; nothing is written then.
        """
        with WRITING:
            self.park(weight)
            self._part_from_lent(weight)
            together, already = self.merged + columns, self._originals_of_merged
            kept = Kept.of(weight, self.dim, positions_of(_parts(together), weight.device)).corrected(already, self.dim)
            values = sum_of(kept, _parts(together), self.dim).to(weight.dtype)
            if safe and not bool(torch.isfinite(values).all()):
                raise ValueError(
                    f"Merging {names_of(columns)} would put NaN or Inf into the weight, so nothing was merged. The "
                    "adapter is broken: train it again with a smaller learning rate, or use an earlier checkpoint."
                )
            write_columns(weight, self.dim, kept.positions, values)
            self.merged, self._originals_of_merged = together, kept
            self.base_changed()
            self._seal = _identity(weight)

    @torch.no_grad()
    def unmerge(self, weight: Tensor) -> None:
        """Undo `merge`, bit for bit."""
        with WRITING:
            if self._originals_of_merged is not None:
                self._part_from_lent(weight)
                self._originals_of_merged.put_into(weight, self.dim)
            self.seal_merge()
            self.base_changed()
            self._seal = _identity(weight)

    def seal_merge(self) -> None:
        """Forget the originals of a merge: what is merged becomes the weight."""
        self.merged, self._originals_of_merged = (), None

    @torch.no_grad()
    def rotate(self, weight: Tensor, name: str, fold: Callable[[], tuple[AdapterColumns, ...]]) -> None:
        """Call `fold`, which folds the columns of an adapter and makes others the trained ones, in place, and gives
        what the weight has to hold then.

        A weight that holds this adapter alone stays as it is: what was trained is in it already.
        """
        with WRITING:
            alone = [c.name for c in self.state.columns] == [name]
            if not alone:
                self.park(weight, for_now=True)
            wanted = fold()
            if not alone:
                self.write(weight, wanted)
                return
            known = Kept(self.kept.positions.cpu(), self.kept.values.cpu())
            known = known if self._folded is None else known.joined(self._folded, self.dim)
            positions = positions_of(wanted, torch.device("cpu"))
            self._kept = Kept.of(weight, self.dim, positions).corrected(known, self.dim)
            stay = ~torch.isin(known.positions, positions)
            self._folded = known.at(stay.nonzero().flatten(), self.dim) if wanted[0].folded is not None else None
            self.base = next_revision()
            self.wrote(weight, State(wanted, self.base))

    # -- the weight as others see it ----------------------------------------------------------------------------

    def lend(self, weight: Tensor) -> None:
        """Note that a state dict is about to share the (parked) weight's memory.

        Should the weight be written while anyone still holds that memory (the state dict's tensor, a view of it, a
        numpy array), the weight moves to a copy first: what was handed out goes on holding the pretrained columns, and
        memory is spent only if it is kept.
        """
        if self._lent is None:
            self._lent = _memory_users(weight)

    def handed_out(self, shared: Tensor) -> None:
        """Note what a state dict got after `lend`: the count of users alone would not show it any more once one of
        those that were there before is gone."""
        self._handed_out = [alive for alive in self._handed_out if alive() is not None] + [weakref.ref(shared)]

    def _part_from_lent(self, weight: Tensor) -> None:
        if self._lent is not None:
            memory = weight.untyped_storage()._cdata
            shared = (alive() for alive in self._handed_out)
            kept = any(tensor is not None and tensor.untyped_storage()._cdata == memory for tensor in shared)
            if kept or _memory_users(weight) > self._lent:
                weight.data = weight.data.clone()
        self._lent, self._handed_out = None, []

    def moved(self) -> None:
        """Note that the (parked) weight is about to be moved, or cast."""
        self._parked, self._seal, self._parked_for_now = None, None, False

    def reloaded(self) -> None:
        """Note that new values come into the (parked) weight."""
        self.moved()
        self.base_changed()

    def let_go(self, weight: Tensor) -> None:
        """Park for good: backward passes that are pending may not write columns into the weight any more."""
        self.park(weight)
        self.base_changed()

    @torch.no_grad()
    def sharded(self, rows: Tensor, rows_of: Callable[[Tensor], Tensor]) -> None:
        """Note that `rows` of the weight, copied as they were, took its place; park them.

        Args:
            rows: no state dict shares their memory.
            rows_of: the same rows of any tensor of the weight's rows.

        Raises:
            RuntimeError: if folded columns are in the weight.
        """
        if self._folded is not None and self.state.columns:
            raise RuntimeError(
                f"The columns of {names_of(self.state.columns)} were rotated (paca.rotate): beneath those that are "
                "trained lie others, which can't be taken out of a sharded weight. Merge the adapter, or train it with "
                "DistributedDataParallel."
            )
        self._lent, self._handed_out = None, []
        if self.state.columns:
            write_columns(rows, self.dim, self.kept.positions, rows_of(self.kept.values))
        if self._originals_of_merged is not None:
            positions, values = self._originals_of_merged
            self._originals_of_merged = Kept(positions, rows_of(values))
        self.reloaded()

    def __getstate__(self) -> dict[str, Any]:
        if self.state.columns:
            raise RuntimeError("resident columns must be parked before they are copied or pickled")
        return {"dim": self.dim, "revisions": dict(self.revisions), "merged": (self.merged, self._originals_of_merged)}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__init__(kept["dim"])  # type: ignore[misc]
        self.revisions = kept["revisions"]
        self.merged, self._originals_of_merged = kept["merged"]

    # -- inside -------------------------------------------------------------------------------------------------

    def _current(self, weight: Tensor) -> Tensor:
        return read_columns(weight.detach(), self.dim, self.kept.positions.to(weight.device))

    def _set_state(self, state: State) -> None:
        self.state, before, traced, now = state, self.state, self.traced, state.trained
        if before.trained is now:
            return
        if (
            traced.rows != now.rows
            or any(a is not b for a, b in zip(_tensors(traced), _tensors(now), strict=True))
            or (self._traced_scales != now.scales)
        ):
            self._traced_scales = now.scales
            scales = tuple(_scalar(scale, d) for scale, d in zip(now.scales, now.deltas, strict=True))
            nothing = (None,) * len(scales)
            self.traced = Trained(now.deltas, now.indices, scales, nothing, nothing)


def write_together(jobs: Iterable[tuple[ResidentColumns, Tensor, tuple[AdapterColumns, ...]]]) -> None:
    """Make many weights hold what is wanted of each: in two kernels, where columns lie in blocks.

    Args:
        jobs: the columns of a weight, the weight, and what it has to hold.
    """
    with WRITING, torch.inference_mode(False), torch.no_grad():
        written = []
        groups: dict[Any, tuple[list[Tensor], list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], [], []))
        for columns, weight, wanted in jobs:
            state = columns.prepare(weight, wanted)
            if state is None:
                continue
            written.append((columns, weight, state))
            only, runs, originals = state.columns[0], state.trained.runs[0], columns.kept.values
            if len(state.columns) > 1 or only.folded is not None or runs is None or weight.is_inference():
                sums = sum_of(columns.kept, _parts(wanted), columns.dim)
                write_columns(weight, columns.dim, columns.kept.positions, sums)
            else:
                group = groups[only.scale, weight.device, weight.dtype]
                wide = torch.promote_types(weight.dtype, torch.float32)
                delta = oriented(only.delta.detach(), columns.dim).to(originals.device, wide)
                group[0].extend(blocks_in(originals, columns.dim, runs))
                group[1].extend(blocks_in(delta, columns.dim, runs))
                group[2].extend(blocks_of(weight, columns.dim, runs))
        for (scale, _, _), (originals_of, deltas, views) in groups.items():
            torch._foreach_copy_(views, add_scaled(originals_of, deltas, scale))
        for columns, weight, state in written:
            columns.wrote(weight, state)


def _parts(columns: tuple[AdapterColumns, ...]) -> tuple[AdapterColumns, ...]:
    return tuple(part for c in columns for part in c.parts())


def _same_folds(one: State, other: State) -> bool:
    """Whether two states with columns in the same places scale the folded ones alike."""
    return all(a.folded is None or a.scale == b.scale for a, b in zip(one.columns, other.columns, strict=True))


def _tensors(trained: Trained) -> tuple[Tensor, ...]:
    return trained.deltas + trained.indices


def _scalar(scale: float, like: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(scale, dtype=torch.float32, device=like.device)


def _identity(weight: Tensor) -> tuple[int, int]:
    return version_of(weight), weight.untyped_storage()._cdata


def _memory_users(weight: Tensor) -> int:
    return torch._C._storage_Use_Count(weight.untyped_storage()._cdata)
