"""A weight that somebody wrote around its columns, cast, or put into the place of another, which may come back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn

from paca.columns.kept import Kept, holds, sum_of
from paca.columns.state import State
from paca.functional.column_blocks import read_columns

_MOST = 8
"""Weights that are remembered though no pass of theirs is pending."""


class Aside(NamedTuple):
    """What a weight holds in whose place another is (`torch.func.functional_call`)."""

    identity: tuple[int, int]
    """By which it is known when it is back."""
    held: Sequence[Kept]
    """The values of its columns: memory that is free again may get another weight."""
    base: int
    state: Callable[[], State | None]
    """Of one that was put in, passes that are pending have it: its deltas may be a part of a graph."""
    kept: Kept
    folded: Kept | None
    for_now: bool
    is_home: bool
    """Whether it is the module's own, in whose place the others were put."""

    def is_it(self, weight: Tensor, identity: tuple[int, int], dim: int) -> bool:
        return self.identity == identity and self.is_in(weight, dim)

    def is_in(self, weight: Tensor, dim: int) -> bool:
        """Whether `weight` holds the same columns."""
        return all(_has(weight, dim, kept, kept.values) for kept in self.held)


def in_place_of_it(module: Any) -> Any:
    """A module of which another's weight may have the place now: what a pass asks it for, with the weight of now."""
    weight = module._parameters.get("weight")
    if weight is None or not any(aside.is_home for aside in module.columns.asides):
        return module
    return SimpleNamespace(weight=weight, _parameters={"weight": weight}, columns=module.columns)


def is_back(columns: Any, weight: Tensor, identity: tuple[int, int]) -> bool:
    """Whether a weight is one that was set aside; what it holds is known again then."""
    for aside in columns.asides:
        if aside.is_it(weight, identity, columns.dim):
            others = tuple(other for other in columns.asides if other is not aside)
            columns.asides = _with_present_one(columns, others, weight)
            columns.base, columns.kept, columns._folded = aside.base, aside.kept, aside.folded
            columns.parked, columns._parked_for_now = None, aside.for_now
            state = aside.state()
            if state is None:
                for kept in columns._all_kept(weight):
                    kept.put_into(weight, columns.dim)
                state = State((), columns.base)
            columns._set_state(state)
            return True
    return False


def adopt(columns: Any, weight: Tensor, identity: tuple[int, int]) -> None:
    """Go on with a weight that holds the columns of one that was left, and may be another elsewhere: backward passes
    that are pending can't have what it was."""
    version, memory = columns._left_as
    state, kept, folded = columns.state.columns, columns.kept, columns._folded
    # With the same version it was moved by `.data` as it is, which no counter shows.
    is_other = columns.whole and (identity[0] != version or type(weight) is not nn.Parameter)
    if is_other and identity[1] != memory:
        columns.asides = _with_present_one(columns, columns.asides, weight)
    columns.kept = kept._replace(values=kept.values.to(weight.dtype))
    columns._folded = folded and folded._replace(values=folded.values.to(weight.dtype))
    if is_other:
        columns.base_changed()
        columns._set_state(State(state, columns.base))


def found_again(columns: Any, weight: Tensor) -> bool:
    """Whether it is known what a weight holds that is not the one that was left: the columns of one that was set aside,
    those that were parked, or none, as a pretrained one."""
    parked, dim, none = columns.parked, columns.dim, not columns.state.columns
    like = next((aside for aside in columns.asides if aside.state() and aside.is_in(weight, dim)), None)
    if like is not None:
        columns.asides = _with_present_one(columns, columns.asides, weight)
        columns.kept, columns._folded, held = like.kept, like.folded, like.state()
    elif none and parked is not None and _has(weight, dim, columns.kept, parked[1]):
        columns.asides = _with_present_one(columns, columns.asides, weight)
        held = parked[0]
    elif not none and holds(weight, dim, columns._all_kept(weight), ()):
        columns.asides = _with_present_one(columns, columns.asides, weight)
        held = State((), columns.base)
    else:
        return False
    columns.base_changed()
    columns.parked, columns._parked_for_now = None, False
    columns._set_state(State(held.columns, columns.base))
    return True


def _has(weight: Tensor, dim: int, kept: Kept, values: Tensor) -> bool:
    """Whether these `values` are where `kept` belongs."""
    now = read_columns(weight.detach(), dim, kept.positions.to(weight.device))
    return now.dtype == values.dtype and kept._replace(values=values).equal(now)


def _with_present_one(columns: Any, asides: tuple[Aside, ...], weight: Tensor) -> tuple[Aside, ...]:
    """Those that are aside, without old ones of which no pass is pending, and the one that was there till now."""
    state, dim = columns.state, columns.dim
    if columns._left_as is None or not columns.whole:
        return asides
    held = [
        kept._replace(values=sum_of(kept, state.columns, dim).to(weight.dtype)) for kept in columns._all_kept(weight)
    ]
    is_home = not any(aside.is_home for aside in columns.asides)
    present = Aside(
        columns._left_as,
        held,
        columns.base,
        (lambda: state) if is_home else weakref.ref(state),
        columns.kept,
        columns._folded,
        columns._parked_for_now,
        is_home,
    )
    newest = {id(aside) for aside in asides[-_MOST:]}
    kept = [aside for aside in asides if aside.is_home or id(aside) in newest or aside.state() is not None]
    return (*kept, present)
