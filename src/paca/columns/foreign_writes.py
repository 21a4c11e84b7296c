"""What to make of a weight that somebody else wrote, or replaced."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from paca.columns.kept import Kept, sum_of
from paca.columns.state import AdapterColumns, names_of
from paca.functional.column_blocks import read_columns


def holds(weight: Tensor, dim: int, originals: Iterable[Kept], columns: tuple[AdapterColumns, ...]) -> bool:
    """Whether the places of `originals` in the weight hold `columns` over them, or the originals for none."""
    for kept in originals:
        now = read_columns(weight.detach(), dim, kept.positions.to(weight.device))
        if not Kept(kept.positions, now).equal(sum_of(kept, columns, dim).to(now)):
            return False
    return True


def refuse_overwritten(columns: tuple[AdapterColumns, ...]) -> None:
    """Raise `RuntimeError`: what is beneath `columns` is not known any more."""
    raise RuntimeError(
        f"The weight of a layer adapted by {names_of(columns)} was written or replaced while the adapter was active, "
        "so that its pretrained columns are not known any more. Change base weights under disable_adapter(), or "
        "through load_state_dict(). (torch's AveragedModel averages base weights too: average the trained parameters "
        "alone, for instance with model.load_state_dict(..., strict=False). DeepSpeed's bf16 and fp16 cast weights: "
        "load the model in that type.)"
    )
