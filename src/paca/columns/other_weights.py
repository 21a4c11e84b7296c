"""A weight that is not as it was left: somebody wrote around its columns, cast it, or put another in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from paca.columns.folded_in_weight import originals_of_folded, put_folded
from paca.columns.kept import Kept, holds, positions_of, sum_of
from paca.columns.lost import names_of
from paca.columns.not_whole import refuse_overwritten
from paca.columns.state import AdapterColumns, State
from paca.functional.column_blocks import put_columns, read_columns, version_of


def find_out(columns: Any, weight: Tensor) -> None:
    """Find out what a weight holds that is not as it was left. Raise `RuntimeError` if that is not known."""
    active = columns.state.columns
    if holds(weight, columns.dim, columns._all_kept(weight), active):
        if not columns.as_left(weight):
            _adopt(columns, weight)
    elif not _found_again(columns, weight):
        refuse_overwritten(active or (columns.parked[0].columns if columns.parked else ()))


def _adopt(columns: Any, weight: Tensor) -> None:
    """Go on with a weight that holds the columns of one that was left, and may be another elsewhere: backward passes
    that are pending can't have what it was."""
    state, kept, folded = columns.state.columns, columns.kept, columns._folded
    columns.kept = kept._replace(values=kept.values.to(weight.dtype))
    columns.memory = StorageWeakRef(weight.untyped_storage())
    columns._folded = folded and folded._replace(values=folded.values.to(weight.dtype))
    # With the same version it was moved by `.data` as it is, which no counter shows.
    if columns.whole and (version_of(weight) != columns._left_as[0] or type(weight) is not nn.Parameter):
        columns.base_changed()
        columns._set_state(State(state, columns.base))


def _found_again(columns: Any, weight: Tensor) -> bool:
    """Whether it is known what a weight holds that is not the one that was left: the columns that were parked, or none,
    as a pretrained one."""
    parked, dim, none = columns.parked, columns.dim, not columns.state.columns
    if none and parked is not None and _has(weight, dim, columns.kept, parked[1]):
        held = parked[0]
    elif not none and holds(weight, dim, columns._all_kept(weight), ()):
        held = State((), columns.base)
    else:
        return False
    columns.base_changed()
    columns.memory = StorageWeakRef(weight.untyped_storage())
    columns.parked, columns._parked_for_now = None, False
    columns._set_state(State(held.columns, columns.base))
    return True


@torch.no_grad()
def refuse_snapshot(module: Any, state_dict: dict[str, Any], prefix: str) -> None:
    """Raise `RuntimeError` if the values for the weight of a layer hold the columns of the deltas beside them, which
    would count twice then."""
    columns, name = module.columns, f"{prefix}base_layer.weight"
    loaded, state = state_dict[name], _held_last(columns)
    given = [(c, state_dict.get(f"{prefix}paca_delta.{c.name}", c.delta)) for c in state.columns]
    plain = type(loaded) in (Tensor, nn.Parameter) and not loaded.is_meta and loaded.shape == module.weight.shape
    if not given or not plain or any(delta.shape != c.delta.shape for c, delta in given):
        return
    kept, dim = list(columns._all_kept(loaded)), columns.dim
    active = tuple(c._replace(delta=delta.to(c.delta.device)) for c, delta in given)
    if holds(loaded, dim, kept, active) and not holds(loaded, dim, kept, ()):
        raise RuntimeError(
            f"The values for {name} hold the columns of {names_of(active)}, as named_parameters() shows them while it "
            "is active: loaded beside the deltas, they would count twice. Load what state_dict() gave, which has the "
            "pretrained values, or the trained parameters alone (those that require grad)."
        )


@torch.no_grad()
def copy_with(columns: Any, lent: Tensor, wanted: tuple[AdapterColumns, ...]) -> Tensor:
    """A copy of a weight that was put into the place of the module's own, with the columns `wanted` in it.

    It may hold those of the module's own weight, as what `named_parameters` gives does: they are taken out. Raises
    `RuntimeError` if it holds neither them nor the pretrained ones.
    """
    dim, weight = columns.dim, lent.detach().clone()
    state = _held_last(columns)
    if state.columns:
        kept = [one._replace(values=one.values.to(weight.dtype)) for one in columns._all_kept(weight)]
        if holds(weight, dim, kept, state.columns):
            for one in kept:
                one.put_into(weight, dim)
        elif not holds(weight, dim, kept, ()):
            refuse_overwritten(state.columns)
    if wanted:
        originals = Kept.of(weight, dim, positions_of(wanted, weight.device))
        if any(c.folded is not None for c in wanted):
            put_folded(originals_of_folded(weight, dim, wanted), weight, dim, wanted)
        put_columns(weight, dim, originals.positions, sum_of(originals, wanted, dim).to(weight.dtype))
    return weight


def _held_last(columns: Any) -> State:
    """What the weight holds, or held before it was parked."""
    parked: State = columns.state if columns.state.columns or columns.parked is None else columns.parked[0]
    return parked


def _has(weight: Tensor, dim: int, kept: Kept, values: Tensor) -> bool:
    """Whether these `values` are where `kept` belongs."""
    now = read_columns(weight.detach(), dim, kept.positions.to(weight.device))
    return now.dtype == values.dtype and kept._replace(values=values).equal(now)
