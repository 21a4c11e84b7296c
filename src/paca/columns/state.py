"""What is trained in one layer, and what is active over one weight: revisions and states.

Each adapter in a layer has a *revision*: a number that moves whenever its columns change. A *state* is the (adapter,
revision, scale) of each active one, over one revision of the weight beneath: equal states are equal contents.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paca.functional.column_blocks import runs_of
from paca.functional.train_columns import Trained, WeightSource

_REVISIONS = itertools.count(1)  # unique in the process: an adapter that is deleted and added again has other ones


@dataclass(frozen=True, eq=False)
class Folded:
    """Columns that an adapter trained before others took their turn (`paca.rotate`): on the CPU, never changed.

    They go on being part of the adapter, with its scale, and of the weight that holds the adapter.
    """

    indices: Tensor
    """`(k,)` int64, sorted and unique, none of them among those that are trained now."""
    delta: Tensor
    """As the adapter's delta, with `k` columns."""


class AdapterColumns(NamedTuple):
    """The columns of one adapter in one layer, as they are at one moment."""

    name: str
    """The adapter's name."""
    delta: Tensor
    """`(out_features, r)`."""
    indices: Tensor
    """`(r,)` int64, sorted and unique."""
    scale: float
    """`paca_alpha / r`, times whatever the user scaled the adapter by."""
    revision: int = 0
    folded: Folded | None = None
    """Those that the adapter trained before."""
    source: Tensor | None = None
    """If `delta` is but this process's rows of it: what has the gradient, and a version counter that shows writes."""

    def parts(self) -> tuple[AdapterColumns, ...]:
        """The trained columns, and beside them the folded ones as columns of their own."""
        if self.folded is None:
            return (self,)
        return self._replace(folded=None), AdapterColumns(self.name, self.folded.delta, self.folded.indices, self.scale)


def version_of(tensor: Tensor) -> int:
    """The tensor's version counter; inference tensors have none and can't be trained, so they count as unchanged."""
    return -1 if tensor.is_inference() else tensor._version


def next_revision() -> int:
    """A revision that nothing had before."""
    return next(_REVISIONS)


def names_of(columns: Iterable[AdapterColumns]) -> str:
    """For messages."""
    return ", ".join(f"adapter {c.name!r}" for c in columns) or "no adapter"


class State:
    """What is active over one weight: some adapters' columns, over one revision of the weight. Never changed.

    Args:
        columns: of the active adapters; none for the pretrained weight.
        base: revision of the weight beneath.
        like: a state whose tensors are reused if they are the same, which an optimizer step leaves them.
    """

    __slots__ = ("_tag", "base", "columns", "key", "trained", "watched")

    trained: Trained

    def __init__(self, columns: tuple[AdapterColumns, ...], base: int, like: State | None = None) -> None:
        self.columns, self.base = columns, base
        self.key = (base, tuple([(c.name, c.revision, c.scale) for c in columns]))
        self._tag: Tensor | None = None
        # Every tensor that has a version counter, with its version: flat, since it is compared often.
        tensors = [t for c in columns for t in (c.delta, c.indices, c.source) if t is not None]
        self.watched = tuple([(t, t._version) for t in tensors if not t.is_inference()])
        if like is not None and _same_tensors(columns, like.columns) and like.has_places_of(self):
            self.trained = like.trained
        else:
            deltas, indices = tuple(c.delta for c in columns), tuple(c.indices for c in columns)
            runs = tuple(runs_of(i) for i in indices)
            self.trained = Trained(deltas, indices, tuple(c.scale for c in columns), runs, (None,) * len(columns))

    def has_places_of(self, other: State) -> bool:
        """Whether the columns of both lie in the same places."""
        if len(self.columns) != len(other.columns):
            return False
        for mine, theirs in zip(self.columns, other.columns, strict=True):
            if mine.indices is not theirs.indices or mine.folded is not theirs.folded:
                return False
            if self._version(mine.indices) != other._version(mine.indices):
                return False
        return True

    def _version(self, tensor: Tensor) -> int:
        return next((version for watched, version in self.watched if watched is tensor), -1)

    def unchanged(self) -> bool:
        """Whether no tensor was changed in place since, as far as version counters tell."""
        for tensor, version in self.watched:  # noqa: SIM110  (a generator would cost more than the comparison)
            if tensor._version != version:
                return False
        return True

    def moved(self) -> list[str]:
        """The adapters whose tensors were changed in place since, as far as version counters tell."""
        changed = {id(tensor) for tensor, version in self.watched if tensor._version != version}
        return [c.name for c in self.columns if changed & {id(c.delta), id(c.indices), id(c.source)}]

    @property
    def tag(self) -> Tensor:
        """A scalar tensor that stands for this state, for autograd to save; its value is the same for equal states."""
        if self._tag is None:
            with torch.inference_mode(False):  # autograd saves it, also if the first forward pass was inference
                self._tag = torch.tensor(hash(self.key), dtype=torch.int64, device="cpu")
        return self._tag


def _same_tensors(one: tuple[AdapterColumns, ...], other: tuple[AdapterColumns, ...]) -> bool:
    return len(one) == len(other) and all(
        a.delta is b.delta and a.indices is b.indices and a.scale == b.scale for a, b in zip(one, other, strict=True)
    )


class _Thread(threading.local):
    def __init__(self) -> None:
        self.recording: list[bool] = []
        """Of each adapted model whose forward pass runs: whether a backward pass is to follow."""


THREAD = _Thread()


def may_be_recorded() -> bool:
    """Whether what runs now may be a part of a graph: with gradients, or within an autograd function's forward."""
    if torch.is_grad_enabled():
        return True
    return not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()


class ActiveColumns:
    """What is active over one weight. Knows tensors only; the layer above says what is wanted.

    Attributes:
        state: what the next forward pass sees.
        revisions: of each adapter of the layer.
        trusted: the adapters that an optimizer trains whose steps are seen. With others, every backward pass may be
            followed by a write that nobody sees, and `unaccounted` says that there was one.
    """

    def __init__(self) -> None:
        self.base = next_revision()
        self.state = State((), self.base)
        self.revisions: dict[str, int] = {}
        self.trusted: set[str] = set()
        self.unaccounted = False
        self._awaited: Counter[Any] = Counter()  # re-entrant checkpointing: first passes that are still to be repeated

    def changed(self, name: str) -> None:
        """Note that the columns of an adapter changed: backward passes that are pending can't have them any more."""
        self.revisions[name] = next_revision()

    def base_changed(self) -> None:
        """Note that the weight beneath the columns changed (a merge, a load)."""
        self.base = next_revision()
        self.state = State((), self.base)

    def notice(self) -> None:
        """Move the revisions of adapters whose version counters show a change."""
        for name in self.state.moved():
            if self.revisions.get(name, 0) == self._revision_in_state(name):
                self.changed(name)

    def _revision_in_state(self, name: str) -> int:
        return next(c.revision for c in self.state.columns if c.name == name)

    def note_forward(self) -> None:
        """Note that a forward pass runs with the present state.

        Re-entrant checkpointing runs a first pass without gradients, which keeps nothing that the repeated one could be
        compared with; so first passes are counted. (Checkpointing that is not re-entrant is checked exactly.)

        Raises:
            RuntimeError: if a pass is repeated with columns that no first pass ran with.
        """
        if torch.is_grad_enabled():
            if self.state.columns and torch._C._current_graph_task_id() != -1:
                self._repeated()
        # A first pass runs within an autograd function; so does an evaluation's pass through checkpointing.
        elif may_be_recorded() and (not THREAD.recording or THREAD.recording[-1]):
            if self.state.key not in self._awaited:
                self._awaited = Counter({key: n for key, n in self._awaited.items() if self._is_current(key)})
            self._awaited[self.state.key] += 1

    def _is_current(self, key: Any) -> bool:
        return key[0] == self.base and all(self.revisions.get(name, 0) == revision for name, revision, _ in key[1])

    def _repeated(self) -> None:
        if self._awaited[self.state.key] > 0:
            self._awaited[self.state.key] -= 1
        elif any(self._awaited.values()) and _is_reentrant():
            raise RuntimeError(_REPEATED.format(now=names_of(self.state.columns)))

    def pass_of_batch(self, columns: tuple[AdapterColumns, ...], batch_tag: int) -> AddedPass:
        """A pass on a mixed batch, to which these columns are added."""
        return AddedPass(self, State(columns, self.base), batch_tag)

    def check_backward(self, state: State, saved_tag: Tensor) -> None:
        """Check that the columns of a forward pass are still known in its backward pass.

        Args:
            state: of the forward pass.
            saved_tag: its tag as autograd kept it: another one if activation checkpointing repeated the pass.

        Raises:
            RuntimeError: if its columns or the weight were changed since, or the repeated pass had others.
        """
        if saved_tag is not state.tag and int(saved_tag) != hash(state.key):
            raise RuntimeError(_REPEATED.format(now=names_of(self.state.columns)))
        if state.base != self.base:
            raise RuntimeError(
                "The weight of an adapted layer was merged, unmerged or loaded between forward and backward, or "
                "written by somebody else, or its columns rotated, or its adapter unloaded, so the gradient can't be "
                "computed. Run backward() first."
            )
        if not state.unchanged() or any(self.revisions.get(c.name, 0) != c.revision for c in state.columns):
            raise RuntimeError(
                f"The columns of {names_of(state.columns)} were modified between forward and backward (by an optimizer "
                "step or an in-place operation), so the gradient can't be computed. Run backward() first."
            )
        self.passed_back(state)

    def passed_back(self, state: State) -> None:
        """Note that a backward pass of `state` runs: an optimizer's step may follow that nobody sees."""
        for c in state.columns:
            if c.name not in self.trusted:
                self.unaccounted = True

    def has_trust(self) -> bool:
        """Whether optimizers whose steps are seen train all that is active."""
        return all(c.name in self.trusted for c in self.state.columns)


_REPEATED = (
    "Activation checkpointing repeats a forward pass with {now} active, but it first ran with other adapters or other "
    "values. Make the same adapters active again before backward(), or run backward() before switching or stepping."
)


def _is_reentrant() -> bool:
    """Whether re-entrant checkpointing, torch's or DeepSpeed's, repeats this pass: a backward of theirs runs it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "backward" and "checkpoint" in frame.f_code.co_filename.rpartition("/")[2]:
            return True
        frame = frame.f_back
    return False


class AddedPass(WeightSource):
    """One pass whose columns are added to what a layer computes: there is no weight, but the columns must stay as they
    are until its backward pass.

    Args:
        columns: what is active.
        state: what this pass adds.
        batch_tag: says which samples of a mixed batch have which adapter.
    """

    __slots__ = ("_tag", "columns", "state")

    def __init__(self, columns: ActiveColumns, state: State, batch_tag: int | None = None) -> None:
        self.columns, self.state = columns, state
        self._tag = state.tag if batch_tag is None else torch.tensor(hash((state.key, batch_tag)), device="cpu")

    @property
    def tag(self) -> Tensor:
        return self._tag

    def weight(self) -> Tensor:
        raise AssertionError("columns are added to an output")

    def weight_again(self, saved_tag: Tensor, wanted: bool) -> None:
        same = saved_tag is self._tag or int(saved_tag) == int(self._tag)
        self.columns.check_backward(self.state, self.state.tag if same else saved_tag)
