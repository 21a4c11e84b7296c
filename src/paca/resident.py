"""Resident columns: trained columns that live in the weight while their adapter is active.

``ResidentColumns`` belongs to one weight and owns the invariants of the design (section 3): what the weight holds,
when it is rewritten, how the pretrained columns come back bit for bit, and that a backward pass reads the columns
its forward pass read. It knows tensors only; which adapters are wanted is pushed in by the layer.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

_WRITING = threading.RLock()  # writers are rare (once per optimizer step); readers never take it


class Columns(NamedTuple):
    """The trained columns of one adapter in one layer."""

    name: str
    """The adapter's name, for messages."""
    delta: Tensor
    """``(out_features, r)``."""
    indices: Tensor
    """``(r,)`` int64, sorted and unique."""
    scale: float
    """``paca_alpha / r``, times whatever the user scaled the adapter by."""


def version_of(tensor: Tensor) -> int:
    """The tensor's version counter; inference tensors have none and cannot be trained, so they count as unchanged."""
    return -1 if tensor.is_inference() else tensor._version


class State:
    """What a weight holds: some adapters' columns as they were at one moment. Without columns: the pretrained weight.

    ``tag`` names the content: it is equal for two states that hold the same values, which is how a forward pass that
    activation checkpointing repeats is recognised as the same one.
    """

    __slots__ = ("columns", "generation", "tag", "tag_tensor", "versions")

    def __init__(self, columns: tuple[Columns, ...], generation: int) -> None:
        self.columns = columns
        self.generation = generation
        self.versions = tuple((version_of(c.delta), version_of(c.indices)) for c in columns)
        content = tuple((id(c.delta), id(c.indices), c.scale) for c in columns)
        self.tag = hash((content, self.versions, generation))
        with torch.inference_mode(False):  # autograd saves it, also if the first forward pass was inference
            self.tag_tensor = torch.tensor(self.tag, dtype=torch.int64, device="cpu")

    def unchanged(self) -> bool:
        """Whether every delta still has the values it had, as far as version counters tell."""
        return all(
            version_of(c.delta) == delta_version and version_of(c.indices) == indices_version
            for c, (delta_version, indices_version) in zip(self.columns, self.versions, strict=True)
        )

    def holds(self, wanted: tuple[Columns, ...]) -> bool:
        """Whether this state is what ``wanted`` would give now."""
        if wanted is self.columns:
            return self.unchanged()
        return (
            len(wanted) == len(self.columns)
            and all(
                mine.delta is theirs.delta and mine.indices is theirs.indices and mine.scale == theirs.scale
                for mine, theirs in zip(self.columns, wanted, strict=True)
            )
            and self.unchanged()
        )


class _Kept(NamedTuple):
    """Original columns, to be put back."""

    positions: Tensor  # (k,) int64, sorted and unique: a copy, since an adapter's indices may be loaded over
    values: Tensor  # (out_features, k) or (k, out_features), in the weight's dtype


class ResidentColumns:
    """Keeps ``weight == round(W0 + sum_a scale_a * scatter(delta_a, indices_a))`` over the wanted adapters.

    The sum is taken in float64 (float32 on devices without it) and rounded once to the weight's dtype; columns that
    several adapters share add up. Every method takes the weight, and holds no reference to it or to its module.

    Args:
        input_dim: the dimension of the weight that runs over the input features (1: ``nn.Linear``, 0: ``Conv1D``).
    """

    def __init__(self, input_dim: int) -> None:
        self.input_dim = input_dim
        self.wanted: tuple[Columns, ...] = ()
        """What the next forward pass has to see; pushed by the layer."""
        self.suspect = False
        """The deltas may have changed in a way that version counters do not show: a backward pass ran."""
        self.looked_after = False
        """The model's own refresh has just seen to this layer, so its next forward pass need not."""
        self._generation = 0  # counts the changes of the weight beneath the columns: merges, loads
        self._state = State((), 0)
        self._kept: _Kept | None = None
        self._merged: tuple[Columns, ...] = ()
        self._merged_kept: _Kept | None = None
        self._lent: list[weakref.ref[Tensor]] = []  # tensors of state dicts that share the weight's storage

    # -- reading ------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """What the weight holds now."""
        return self._state

    def stale(self) -> bool:
        """Whether the weight may differ from what ``wanted`` asks for."""
        return (self.suspect and bool(self.wanted)) or not self._state.holds(self.wanted)

    # -- writing ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Make the weight hold ``wanted``. Writes the columns concerned, never the whole weight."""
        with _WRITING:
            if self._state.holds(self.wanted):
                if self.suspect and self.wanted:
                    # Nothing moved as far as anyone can tell. Should a delta have been written behind its version
                    # counter, this brings it in; else it writes what is there. Either way the weight's own counter
                    # stays, so that graphs which hold this weight remain valid.
                    self._write(weight.data, self.wanted)
            else:
                self._settle(weight, State(self.wanted, self._generation))
            # With a gradient in place an optimizer may still write without anyone noticing: look again next time.
            self.suspect = any(c.delta.grad is not None for c in self.wanted)

    @torch.no_grad()
    def park(self, weight: Tensor) -> None:
        """Put the original columns back, bit for bit."""
        with _WRITING:
            if self._state.columns:
                self._settle(weight, State((), self._generation))

    def before_backward(self, weight: Tensor, state: State, saved_tag: int) -> None:
        """Make the weight hold what the forward pass with ``state`` saw.

        Raises:
            RuntimeError: if that is no longer possible (a delta was modified, the weight was merged or loaded in
                between), or if activation checkpointing repeated the forward pass with other adapters.
        """
        if saved_tag != state.tag:
            raise RuntimeError(
                "Activation checkpointing repeated a forward pass with other adapters than it first ran with "
                f"({self._names(state.columns)} then, {self._names(self.wanted)} now). Make the same adapters active "
                "again before backward(), or run backward() before switching."
            )
        if state.generation != self._generation:
            raise RuntimeError(
                "The weight of an adapted layer was merged, unmerged or loaded between forward and backward, so the "
                "gradient can't be computed. Run backward() first."
            )
        if not state.unchanged():
            raise RuntimeError(
                f"The columns of {self._names(state.columns)} were modified between forward and backward (by an "
                "optimizer step or an in-place operation), so the gradient can't be computed. Run backward() first."
            )
        if self._state is not state and self._state.tag != state.tag:
            with torch.no_grad(), _WRITING:
                self._settle(weight, state)
        self.suspect = True  # an optimizer step may follow

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
        with _WRITING:
            self.park(weight)
            together = self._merged + columns
            already = self._merged_kept
            if already is not None:
                self._put(weight, already)
            kept = self._take(weight, together)
            values = self._sum(kept, together, weight.dtype)
            if safe and not bool(torch.isfinite(values).all()):
                if already is not None:
                    self._write(weight, self._merged, already)
                raise ValueError(
                    f"Merging {self._names(columns)} would put NaN or Inf into the weight, so nothing was merged. "
                    "The adapter is broken: train it again with a smaller learning rate, or use an earlier checkpoint."
                )
            self._put(weight, _Kept(kept.positions, values))
            self._merged, self._merged_kept = together, kept
            self._begin_generation()

    @torch.no_grad()
    def unmerge(self, weight: Tensor) -> None:
        """Undo ``merge``, bit for bit."""
        with _WRITING:
            if self._merged_kept is not None:
                self._put(weight, self._merged_kept)
            self._merged, self._merged_kept = (), None
            self._begin_generation()

    def seal_merge(self) -> None:
        """Forget the originals of a merge: what is merged becomes the weight."""
        self._merged, self._merged_kept = (), None

    # -- the weight as others see it ----------------------------------------------------------------------------

    def lend(self, tensor: Tensor) -> None:
        """Note that ``tensor``, handed out in a state dict, shares the (parked) weight's storage.

        Should the weight be written while ``tensor`` is still around, ``tensor`` gets a copy of its own first: a
        state dict goes on holding the pretrained columns, and memory is spent only if it is kept.
        """
        self._lent = [ref for ref in self._lent if ref() is not None]
        self._lent.append(weakref.ref(tensor))

    def reloaded(self) -> None:
        """Note that new values were loaded into the (parked) weight."""
        self._begin_generation()

    def __getstate__(self) -> dict[str, object]:
        if self._state.columns:
            raise RuntimeError("resident columns must be parked before they are copied or pickled")
        state = self.__dict__.copy()
        state["_lent"] = []
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
        self._state = State((), self._generation)

    def _settle(self, weight: Tensor, state: State) -> None:
        with _outside_inference_mode(weight):
            same_places = self._kept is not None and len(state.columns) == len(self._state.columns)
            same_places = same_places and all(
                old.indices is new.indices and version == version_of(new.indices)
                for old, new, (_, version) in zip(
                    self._state.columns, state.columns, self._state.versions, strict=False
                )
            )
            if not same_places:
                if self._kept is not None:
                    self._put(weight, self._kept)
                    self._kept = None
                if state.columns:
                    self._kept = self._take(weight, state.columns)
            if state.columns:
                self._write(weight, state.columns)
            self._state = state

    def _take(self, weight: Tensor, columns: tuple[Columns, ...]) -> _Kept:
        if len(columns) == 1:
            positions = columns[0].indices.to(weight.device, copy=True)
        else:
            positions = torch.cat([c.indices.to(weight.device) for c in columns]).unique(sorted=True)
        return _Kept(positions, weight.detach().index_select(self.input_dim, positions))

    def _sum(self, kept: _Kept, columns: tuple[Columns, ...], dtype: torch.dtype) -> Tensor:
        # float64, so that the one rounding is the cast to the weight's dtype; MPS has no float64.
        wide = torch.float32 if kept.values.device.type == "mps" else torch.float64
        total = kept.values.to(wide)
        for c in columns:
            part = c.delta.detach().to(device=total.device, dtype=wide)
            part = part if self.input_dim == 1 else part.t()
            if len(columns) == 1:
                total = torch.add(total, part, alpha=c.scale)
            else:
                places = torch.searchsorted(kept.positions, c.indices.to(total.device))
                total = total.index_add(self.input_dim, places, part, alpha=c.scale)
        return total.to(dtype)

    def _write(self, weight: Tensor, columns: tuple[Columns, ...], kept: _Kept | None = None) -> None:
        kept = kept or self._kept
        assert kept is not None
        kept = _Kept(kept.positions.to(weight.device), kept.values.to(weight.device))
        self._put(weight, _Kept(kept.positions, self._sum(kept, columns, weight.dtype)))

    def _put(self, weight: Tensor, kept: _Kept) -> None:
        self._part_from_lent(weight)
        weight.index_copy_(self.input_dim, kept.positions.to(weight.device), kept.values.to(weight))

    def _part_from_lent(self, weight: Tensor) -> None:
        for ref in self._lent:
            tensor = ref()
            if tensor is not None and tensor.data_ptr() == weight.data_ptr():
                tensor.data = tensor.data.clone()
        self._lent.clear()


@contextmanager
def _outside_inference_mode(weight: Tensor) -> Iterator[None]:
    # What is kept here outlives the caller's inference mode, and an inference tensor would not be usable after it.
    with torch.inference_mode(weight.is_inference()):
        yield
