"""Columns that become part of the weight beneath: merged ones until they are taken out, folded ones by rotation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from paca.columns.folded import Folded, common, split, union_of
from paca.columns.kept import Kept, holds, positions_of, sum_of
from paca.columns.lost import names_of
from paca.columns.not_whole import refuse_overwritten
from paca.columns.resident import WRITING, ResidentColumns
from paca.columns.state import ALONE, AdapterColumns, State, identity
from paca.functional.column_blocks import put_columns


class MergeableColumns(ResidentColumns):
    """Resident columns, and what was merged into the weight; while there is any of that, nothing is resident."""

    merged: tuple[AdapterColumns, ...] = ()
    _originals_of_merged: Kept | None = None

    @property
    def positions(self) -> Tensor | None:
        """`(k,)`, the columns of the weight that are not its own now; None if all are."""
        if self._originals_of_merged is not None:
            return self._originals_of_merged.positions
        return self.kept.positions if self.state.columns else None

    @torch.no_grad()
    def merge(self, weight: Tensor, columns: tuple[AdapterColumns, ...], *, safe: bool) -> None:
        """Make `columns` part of the weight until `unmerge`; same values, bit for bit, as when resident. If `safe`,
        raise `ValueError` where one would not be finite; nothing is written then."""
        with WRITING, ALONE:
            self.park_within(weight)
            self._part_from_shared(weight)
            # As they are now: another merge on top, and taking them out, must not see what is written later.
            together = self.merged + tuple(map(as_it_is, columns))
            parts = tuple(part for c in together for part in c.parts())
            kept = Kept.of(weight, self.dim, positions_of(parts, weight.device))
            correct(kept, self._originals_of_merged, self.dim)
            values = sum_of(kept, together, self.dim).to(weight.dtype)
            if safe:
                check_merged(columns, [values])
            self.base_changed()
            self.merged, self._originals_of_merged = together, kept  # first: Ctrl-C may come in the middle
            put_columns(weight, self.dim, kept.positions, values)
            self._left_as = identity(weight)

    @torch.no_grad()
    def unmerge(self, weight: Tensor) -> None:
        """Undo `merge`, bit for bit."""
        with WRITING, ALONE:
            kept = self._originals_of_merged
            if kept is None:
                self.park_within(weight)  # the merge did not come so far
            elif not self.as_left(weight) and not holds(weight, self.dim, [kept], self.merged):
                refuse_overwritten(self.merged)
            self.base_changed()
            if kept is not None:
                self._part_from_shared(weight)
                kept.put_into(weight, self.dim)
            self.keep_merged()
            self._left_as = identity(weight)

    def keep_merged(self) -> None:
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
            with ALONE:
                known = union_of(*self.kept, None if self._folded is None else Folded(*self._folded), self.dim)
                trained = positions_of(wanted, torch.device("cpu"))
                kept = Kept.of(weight, self.dim, trained)
                correct(kept, Kept(*known), self.dim)
                _, others = split(known, trained, self.dim)
                folded = None if others is None else Kept(others.indices, others.delta)
                # At once: Ctrl-C may come in the middle.
                self.kept, self._folded, self.half_written = kept, folded, True
                self.base_changed()
                self.wrote(weight, State(wanted, self.base))

    def moved(self) -> None:
        """Note that the (parked) weight is about to be moved, or cast."""
        self.parked, self._left_as, self._parked_for_now, self._sent = None, None, False, True

    def reloaded(self, name: str = "A weight") -> None:
        """Note that new values come into the (parked) weight. Raises while anything is merged into it."""
        if self.merged:
            raise RuntimeError(
                f"{name} can't be loaded while {names_of(self.merged)} is merged into it: unmerge first."
            )
        self.moved()
        self.base_changed()

    def __getstate__(self) -> dict[str, Any]:
        if self.state.columns:
            raise RuntimeError("resident columns must be parked before they are copied or pickled")
        self._sent = True
        # Without revisions: in another process the same numbers are given to other contents.
        return {"dim": self.dim, "merged": (self.merged, self._originals_of_merged)}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__class__ = MergeableColumns  # the module says whether its weight is sharded
        self.__init__(kept["dim"])  # type: ignore[misc]
        self.merged, self._originals_of_merged = kept["merged"]


def as_it_is(columns: AdapterColumns) -> AdapterColumns:
    """Copies of an adapter's columns: what is written into its own ones later does not change them."""
    return columns._replace(delta=columns.delta.detach().clone(), indices=columns.indices.clone())


def check_merged(columns: tuple[AdapterColumns, ...], values: Iterable[Tensor]) -> None:
    """Raise `ValueError` if a value of what is merged is NaN or Inf."""
    if not all(bool(value.isfinite().all()) for value in values):
        raise ValueError(
            f"Merging {names_of(columns)} would put NaN or Inf into the weight, so nothing was merged. The adapter is "
            "broken: train it again with a smaller learning rate, or use an earlier checkpoint."
        )


def correct(kept: Kept, known: Kept | None, dim: int) -> None:
    """Put the values of `known` into `kept`, in place, where it has any."""
    if known is not None:
        here, there = common(kept.positions.cpu(), known.positions.cpu())
        values = known.values.index_select(dim, there.to(known.values.device)).to(kept.values)
        kept.values.index_copy_(dim, here.to(kept.values.device), values)
