"""What is active over one weight. Each adapter in a layer has a *revision*: a number that moves whenever its columns
change. A *state* is the (adapter, revision, scale) of each active one, over one revision of the weight beneath: equal
states are equal contents."""

from __future__ import annotations

import itertools
import sys
import threading
from contextlib import nullcontext
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from paca.columns import lost
from paca.columns.folded import Folded
from paca.functional.column_blocks import runs_of, version_of
from paca.functional.product import Trained

_REVISIONS = itertools.count(1)  # unique in the process: an adapter that is deleted and added again has other ones


class AdapterColumns(NamedTuple):
    """The columns of one adapter in one layer, as they are at one moment."""

    name: str
    delta: Tensor  # (out_features, r)
    indices: Tensor  # (r,) int64, sorted and unique
    scale: float  # paca_alpha / r, times whatever the user scaled the adapter by
    revision: int = 0
    folded: Folded | None = None  # those that the adapter trained before
    source: Tensor | None = None
    """If `delta` is but this process's rows of it: what has the gradient, and a version counter that shows writes."""

    @property
    def parameter(self) -> Tensor:
        """What has the gradient."""
        return self.delta if self.source is None else self.source

    def parts(self) -> tuple[AdapterColumns, ...]:
        """The trained columns, and beside them the folded ones as columns of their own."""
        if self.folded is None:
            return (self,)
        return self._replace(folded=None), AdapterColumns(self.name, self.folded.delta, self.folded.indices, self.scale)


FOR_NOW: tuple[AdapterColumns, ...] = type("ForNow", (tuple,), {})()
"""No columns, for one pass: the active ones come back, so that the weight is not its owner's to change."""


def is_sharded(value: object) -> bool:
    """Whether a parameter is a `DTensor`, as FSDP2 and tensor parallelism make them."""
    if type(value) in (nn.Parameter, Tensor) or not isinstance(value, Tensor) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def identity(weight: Tensor) -> tuple[int, int]:
    """What changes when somebody writes or replaces a weight."""
    return version_of(weight), weight.untyped_storage()._cdata


def memory_id(tensor: Tensor) -> int:
    """What changes when a tensor is given other memory (`.data =`), unseen by its counter. ZeRO-3 always does that."""
    return 0 if hasattr(tensor, "ds_id") else tensor.untyped_storage()._cdata


class State:
    """What is active over one weight: some adapters' columns, over one revision of it. Never changed. What is made of
    the tensors is taken from the state `like`, if they are the same: an optimizer's step leaves them."""

    __slots__ = ("__weakref__", "_tag", "base", "columns", "held", "key", "places", "trained", "watched")

    def __init__(self, columns: tuple[AdapterColumns, ...], base: int, like: State | None = None) -> None:
        self.columns, self.base = columns, base
        # With the tensors themselves: others may take their place for a while (torch.func.functional_call).
        self.key = (base, tuple([(c.name, c.revision, c.scale, id(c.indices), id(c.parameter)) for c in columns]))
        self._tag: Tensor | None = None
        # Every tensor that has a version counter, with its version: flat, since it is compared often. And what keeps
        # the address of its memory from others: `.data =` twice could get it again.
        tensors = [t for c in columns for t in (c.delta, c.indices, c.source) if t is not None]
        self.watched = [(t, t._version, memory_id(t)) for t in tensors if not t.is_inference()]
        self.held = [StorageWeakRef(t.untyped_storage()) for t, _, memory in self.watched if memory]
        # Where columns lie: trained ones anywhere by their indices, folded ones as they are scaled.
        self.places = [
            (id(c.indices), version_of(c.indices, c.revision), c.folded, c.folded and c.scale) for c in columns
        ]
        deltas, scales = tuple([c.delta for c in columns]), tuple([c.scale for c in columns])
        if like and like.places == self.places and all(map(is_, deltas + scales, like.trained[0] + like.trained[2])):
            self.trained: Trained = like.trained
        else:
            indices = tuple([c.indices for c in columns])
            self.trained = Trained(deltas, indices, scales, tuple(map(runs_of, indices)), (None,) * len(columns))

    def unchanged(self) -> bool:
        """Whether no tensor was changed in place since, as far as version counters tell."""
        for tensor, version, memory in self.watched:
            if tensor._version != version or memory_id(tensor) != memory:
                return False
        return True

    def moved(self) -> list[AdapterColumns]:
        """Those whose tensors were changed in place since, as far as version counters tell."""
        changed = {id(t) for t, version, memory in self.watched if t._version != version or memory_id(t) != memory}
        return [c for c in self.columns if changed & {id(c.delta), id(c.indices), id(c.source)}]

    @property
    def tag(self) -> Tensor:
        """A scalar tensor that stands for this state, for autograd to save; its value is the same for equal states."""
        if self._tag is None:
            # Autograd saves it, also if the first pass was inference; those that checkpointing repeats have it already.
            with torch.inference_mode(False), torch._C._DisableTorchDispatch():
                self._tag = torch.scalar_tensor(hash(self.key), dtype=torch.int64, device="cpu")
        return self._tag


class _Thread(threading.local):
    def __init__(self) -> None:
        self.passes: list[tuple[object, bool]] = []  # of models that run: the entry's mark; is a backward to follow


THREAD = _Thread()


class _Alone:
    """A block in which weights are written. A signal's handler runs within what it interrupts, so that no lock keeps it
    out: if it wants to write, it is refused before anything has changed."""

    _call: Any = None
    _unseen: Any = None

    def __enter__(self) -> None:
        if self._call is not None and lost.is_on_the_stack(self._call):  # else Ctrl-C ended it
            lost.refuse_handler()
        self._call = sys._getframe(1)
        self._unseen = lost.beside_checkpointing() if torch._C._len_torch_dispatch_stack() else nullcontext()
        self._unseen.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._unseen.__exit__(*error)
        self._call = None


ALONE = _Alone()


def may_be_recorded() -> bool:
    """Whether what runs now may be a part of a graph: with gradients, or within an autograd function's forward."""
    if torch.is_grad_enabled():
        return True
    return not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()


class ActiveColumns:
    """What is active over one weight. Knows tensors only; the layer above says what is wanted."""

    whole = True  # whether this process holds all rows, as compiled graphs, hot swaps and the like need
    parked: tuple[State, Tensor] | None = None  # the state that a park took out of a weight, and its columns
    entry: Any = None  # of the model that it is in
    alone: Any = None  # how its layer last ran without that (`columns.entry.in_other_mode`)

    _left_as: tuple[int, int] | None = None  # the `identity` of a weight that holds columns, as we left it

    def as_left(self, weight: Tensor | None) -> bool:
        """Whether the weight is as we left it: written or replaced by nobody else."""
        return self._left_as is None or (weight is not None and self._left_as == identity(weight))

    def __init__(self) -> None:
        self.base = next(_REVISIONS)
        self.state = State((), self.base)  # what the next forward pass sees
        self.revisions: dict[str, int] = {}  # of each adapter of the layer
        self.trusted: set[str] = set()  # the adapters that an optimizer trains whose steps are seen
        self.unaccounted = False  # a backward pass ran with others, which a write may have followed that nobody saw
        self.values_seen: dict[str, Any] = {}  # by adapter, what passes of columns that no weight holds ran with
        self._first_passes: dict[Any, list[State]] = {}  # of re-entrant checkpointing, by the key of their state

    def local(self, layer: Any, adapter_name: str) -> tuple[Tensor, Tensor | None]:
        """What of an adapter's delta belongs here, and the parameter it is a part of, if it is one."""
        return layer._modules["paca_delta"]._parameters.get(adapter_name), None  # under ZeRO-3 [] would gather it

    def changed(self, name: str) -> None:
        """Note that the columns of an adapter changed: backward passes that are pending can't have them any more."""
        self.revisions[name] = next(_REVISIONS)

    def written(self, columns: AdapterColumns) -> None:
        """Note a write that the delta's version counter does not show, and let it: `FactoredAdamW` looks there."""
        self.changed(columns.name)
        if columns.source is None and not columns.delta.is_inference():
            torch.autograd.graph.increment_version(columns.delta)

    def accounted(self) -> None:
        """Note a step of an active adapter: another's, that nobody saw, would not show beside it any more."""
        state = self.state if self.state.columns or self.parked is None else self.parked[0]
        for c in state.columns if self.unaccounted else ():
            if c.name not in self.trusted and c.parameter.requires_grad:
                self.changed(c.name)
        self.unaccounted = False

    def base_changed(self) -> None:
        """Note that the weight beneath the columns changed (a merge, a load)."""
        self.base = next(_REVISIONS)
        self.state = State((), self.base)

    def is_current(self, columns: AdapterColumns) -> bool:
        """Whether the adapter's columns did not change since, as far as anybody noted it."""
        return self.revisions.get(columns.name, 0) == columns.revision

    def notice(self) -> None:
        """Move the revisions of adapters whose version counters show a change, also of those that are parked now."""
        seen = [state for *_, state in list(self.values_seen.values())]  # another thread may note one
        for state in (self.state, *seen, *itertools.chain.from_iterable(self._first_passes.values())):
            for c in filter(self.is_current, state.moved()):
                unseen = any(t is c.delta and version == t._version for t, version, _ in state.watched)
                self.written(c) if unseen else self.changed(c.name)

    def note_forward(self, state: State | None = None) -> None:
        """Note a forward pass with `state`, or the present one. Raises if it repeats a pass that ran with others."""
        state = state or self.state
        if torch.is_grad_enabled():
            if torch._C._current_graph_task_id() != -1:  # also with none active: their gradients would be lost
                lost.check_repeated(self._first_passes, state.key, lost.names_of(state.columns))
        # A first pass runs within an autograd function; so does an evaluation's pass through checkpointing.
        elif may_be_recorded() and (not THREAD.passes or THREAD.passes[-1][1]):
            lost.note_first(self._first_passes, state, self.can_come_back)

    def can_come_back(self, state: State) -> bool:
        return state.base == self.base and all(map(self.is_current, state.columns))

    def check_backward(self, state: State, saved_tag: Tensor) -> None:
        """Raise `RuntimeError` if the columns or the weight of the forward pass with `state` changed since. `saved_tag`
        is its tag as autograd kept it: another one if activation checkpointing repeated the pass."""
        repeated = saved_tag is not state.tag and int(saved_tag) != hash(state.key)
        if repeated or not self.can_come_back(state) or not state.unchanged():
            then, now = lost.names_of(state.columns), lost.names_of(self.state.columns)
            lost.refuse_backward(repeated=repeated, base_changed=state.base != self.base, then=then, now=now)
        if not self.has_trust(state):
            self.unaccounted = True  # an optimizer's step may follow that nobody sees

    def has_trust(self, state: State | None = None) -> bool:
        """Whether optimizers whose steps are seen train all that is active."""
        return all([c.name in self.trusted for c in (state or self.state).columns])  # noqa: C419  (faster)
