"""A stock module whose weight holds resident columns.

The base layer of an adapted layer is turned into one of these classes while it is adapted (and back when the adapter
goes), so that hooks on it, state dicts, copies, pickles and moves see the right thing whoever asks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from paca.columns import State
from paca.functional.linear import partial_linear
from paca.layers.compiled import compiled_linear, new_handle
from paca.resident import ResidentColumns


class ResidentWeight(nn.Module):
    """Mixin in front of a stock module class, for ``weight`` (and ``bias``)."""

    stock_class: ClassVar[type[nn.Module]]
    """What the module was, and becomes again."""
    input_dim: ClassVar[int]
    """The dimension of ``weight`` that runs over the input features."""

    weight: Tensor
    bias: Any  # a parameter or None
    resident: ResidentColumns
    handle: Tensor
    owner: Callable[[], Any]
    """Gives the adapted layer above, which knows what is wanted; a weak reference."""

    @property
    def output_dim(self) -> int:
        """The dimension of ``weight`` that runs over the output features."""
        return 1 - self.input_dim

    @classmethod
    def adopt(cls, module: nn.Module) -> ResidentWeight:
        """Turn ``module``, an instance of ``stock_class``, into an instance of this class, in place."""
        assert type(module) is cls.stock_class
        module.__class__ = cls
        assert isinstance(module, cls)
        module.resident = ResidentColumns(cls.input_dim)
        module.handle = new_handle(module)
        module.owner = lambda: None
        module._rebind_forward()
        return module

    @classmethod
    def problem(cls, module: nn.Module) -> str | None:
        """What makes this module of ``stock_class`` one that can't be adapted, or None."""
        return None

    def _rebind_forward(self) -> None:
        # accelerate's hooks wrap `forward` on the instance and keep what they found as `_old_forward`.
        if "_old_forward" in self.__dict__:
            self._old_forward = type(self).forward.__get__(self)

    def release(self) -> None:
        """Park, and turn back into the stock module, in place."""
        self.resident.let_go(self.weight)
        del self.resident, self.handle
        self.__class__ = self.stock_class  # type: ignore[assignment]
        del self.owner
        ResidentWeight._rebind_forward(self)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._run_compiled(x)
        resident, weight = self.resident, self.weight
        if resident.stale(weight):
            resident.refresh(weight)
        if not torch.is_grad_enabled():
            if torch._C._current_graph_task_id() == -1:
                resident.note_forward()  # re-entrant checkpointing runs its first pass without gradients
            return super().forward(x)
        resident.note_forward()
        state = resident.state
        return self._run_partial(x, state)

    def _run_partial(self, x: Tensor, state: State) -> Tensor:
        """Run on the weight, which holds ``state``, such that gradients reach the deltas."""
        return partial_linear(
            x,
            self.weight,
            self.bias,
            state.deltas,
            state.indices,
            state.scales,
            input_dim=self.input_dim,
            runs=state.runs,
            before_backward=partial(self.resident.before_backward, self.weight, state),
            state_tag=state.tag_tensor,
        )

    def _run_compiled(self, x: Tensor) -> Tensor:
        """Run within a graph that is being compiled."""
        return compiled_linear(self, x)

    # -- the weight as others see it: always the pretrained one ---------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ResidentWeight:
        self.resident.park(self.weight)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.resident.park(self.weight)
        if not keep_vars:  # with it, the caller asks for the parameter itself
            self.resident.lend(self.weight)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            self.resident.handed_out(destination[prefix + "weight"])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *rest: Any
    ) -> None:
        if prefix + "weight" in state_dict:
            if self.resident.merged:
                names = ", ".join(repr(c.name) for c in self.resident.merged)
                raise RuntimeError(f"{prefix}weight can't be loaded while {names} is merged into it: unmerge first.")
            self.resident.park(self.weight)
            self.resident.reloaded()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)

    def __getstate__(self) -> dict[str, Any]:
        self.resident.park(self.weight)
        state = self.__dict__.copy()
        del state["handle"], state["owner"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.handle = new_handle(self)
        self.owner = lambda: None  # the adapted layer above, if there is one, makes itself known again
