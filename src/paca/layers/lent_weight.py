"""What `torch.func.functional_call` puts into the place of a module's own: a weight is the caller's, so a copy of it
gets the columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paca.columns.lost import names_of, refuse_backward
from paca.columns.other_weights import copy_with
from paca.columns.resident import WRITING
from paca.columns.state import State
from paca.functional.column_blocks import version_of
from paca.functional.product import Trained, WeightSource, check_frozen
from paca.functional.train_columns import train_columns


class LentPass(WeightSource):
    """One forward pass on a copy of `lent`, which is made anew for its backward pass."""

    def __init__(self, columns: Any, lent: Tensor, state: State) -> None:
        self.columns, self.lent, self.state, self.tag = columns, lent, state, state.tag
        self.version = version_of(lent)

    def weight(self) -> Tensor:
        check_frozen(self.lent)
        with WRITING:
            return copy_with(self.columns, self.lent, self.state.columns)

    def weight_again(self, saved_tag: Tensor, wanted: bool) -> Tensor | None:
        self.columns.check_backward(self.state, saved_tag)
        if version_of(self.lent) != self.version:
            names = names_of(self.state.columns)
            refuse_backward(repeated=False, base_changed=True, then=names, now=names)
        return self.weight() if wanted else None


def run_on_copy(module: Any, x: Tensor, lent: Tensor) -> Tensor:
    """What `module`, a `ResidentWeight`, gives for `x` with `lent` as its weight."""
    columns, owner = module.columns, module.owner()
    columns.check_writable(lent)
    columns.notice()
    state = State(owner.wanted(), columns.base)
    columns.note_forward(state)
    source = LentPass(columns, lent, state)
    if not torch.is_grad_enabled():
        y: Tensor = module.product().apply(x, source.weight(), module.bias)
        return y
    return train_columns(module.product(), x, None, module.bias, state.trained, source)


def has_others(module: Any, traced: Trained) -> bool:
    """Whether others are in the place of a layer's delta while a graph is traced (`functional_call` within it). Asked
    of one alone: a graph that looked at several would be compiled again after a switch, by which gradients move. And
    not while it is exported, when others stand for its own."""
    owner = None if torch.compiler.is_exporting() else module.owner()
    deltas = {} if owner is None else owner._modules["paca_delta"]._parameters
    return len(deltas) == len(traced.deltas) == 1 and next(iter(deltas.values())) is not traced.deltas[0]


def refuse_lent_stack() -> None:
    """Raise `RuntimeError`: only deltas can be put into the place of an adapted stack's."""
    raise RuntimeError(
        "torch.func.functional_call was given the weight of an adapted stack of experts, in which PaCA would write "
        "columns. Give it the trained parameters alone (those that require grad)."
    )
