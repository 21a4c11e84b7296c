"""A weight that somebody wrote around its columns, cast, or put into the place of another, which may come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from paca.columns.kept import Kept, holds, sum_of
from paca.columns.state import State
from paca.functional.column_blocks import read_columns


class Aside(NamedTuple):
    """What a weight holds in whose place another is (`torch.func.functional_call`)."""

    state: State
    kept: Kept
    folded: Kept | None
    held: Sequence[Kept]  # the values of its columns, by which it is known when it is back

    def is_in(self, weight: Tensor, dim: int) -> bool:
        return all(_has(weight, dim, kept, kept.values) for kept in self.held)


def adopt(columns: Any, weight: Tensor) -> None:
    """Go on with a weight that holds the columns of one that was left, and may be another elsewhere: backward passes
    that are pending can't have what it was."""
    if columns._left_as[1] != weight.untyped_storage()._cdata:
        _set_aside(columns, weight)
    state = columns.state.columns
    columns.base_changed()
    columns._set_state(State(state, columns.base))
    columns.kept = columns.kept._replace(values=columns.kept.values.to(weight.dtype))
    folded = columns._folded
    columns._folded = folded and folded._replace(values=folded.values.to(weight.dtype))


def found_again(columns: Any, weight: Tensor) -> bool:
    """Whether it is known what a weight holds that is not the one that was left: it was set aside, or is another one
    with the columns that were parked, or a pretrained one without columns."""
    aside, parked, dim = columns.aside, columns.parked, columns.dim
    if aside is not None and aside.is_in(weight, dim):
        _set_aside(columns, weight)
        columns.base, columns.kept, columns._folded = aside.state.base, aside.kept, aside.folded
        state = aside.state
    elif not columns.state.columns and parked is not None and _has(weight, dim, columns.kept, parked[1]):
        _set_aside(columns, weight)
        columns.base_changed()
        state = State(parked[0].columns, columns.base)
    elif columns.state.columns and holds(weight, dim, columns._all_kept(weight), ()):
        columns.base_changed()
        state = columns.state
    else:
        return False
    columns.parked, columns._parked_for_now = None, False
    columns._set_state(state)
    return True


def _has(weight: Tensor, dim: int, kept: Kept, values: Tensor) -> bool:
    """Whether these `values` are where `kept` belongs."""
    now = read_columns(weight.detach(), dim, kept.positions.to(weight.device))
    return now.dtype == values.dtype and kept._replace(values=values).equal(now)


def _set_aside(columns: Any, weight: Tensor) -> None:
    state, dim = columns.state, columns.dim
    held = [
        kept._replace(values=sum_of(kept, state.columns, dim).to(weight.dtype)) for kept in columns._all_kept(weight)
    ]
    columns.aside = Aside(state, columns.kept, columns._folded, held)
