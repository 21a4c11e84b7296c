"""An adapted layer that is moved, cast, copied or replicated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Moved(nn.Module):
    """Base class of `PacaLayer`, which has these."""

    base_layer: Any
    paca_delta: Any
    paca_indices: Any
    in_features: int
    own: Callable[[], None]
    write: Callable[..., None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Moved:
        before = {name: (id(delta), delta.dtype, delta.device) for name, delta in self.paca_delta.items()}
        super()._apply(fn, recurse)
        self.own()
        for name, delta in self.paca_delta.items():
            if before[name] != (id(delta), delta.dtype, delta.device):
                self.base_layer.columns.changed(name)
        real = (i for i in self.paca_indices.values() if type(i) is Tensor and not i.is_meta)
        if all(bool(((i >= 0) & (i < self.in_features)).all()) for i in real):
            self.write()  # else `to_empty` left what memory held: values are yet to be loaded
        return self

    def _replicate_for_data_parallel(self) -> Moved:
        raise RuntimeError(
            "torch.nn.DataParallel copies the model to every GPU in each step, and PaCA's columns don't go along. "
            "Start a process for each GPU (torchrun, accelerate launch), or show it only one (CUDA_VISIBLE_DEVICES=0)."
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.base_layer.owner() is None:  # else this is a shallow copy, of a layer that stays the owner
            self.own()
        self.write()  # the copy's weight holds what is active, as the original's did
