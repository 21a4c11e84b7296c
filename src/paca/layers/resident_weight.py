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

from paca.columns.resident import ResidentColumns
from paca.columns.sharded import ShardedWeight, check_whole, is_sharded
from paca.columns.state import State
from paca.functional.linear import partial_linear
from paca.layers.compiled import compiled_linear, new_handle


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
    sharded: ShardedWeight | None = None
    """What FSDP2 has made of the weight."""

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 puts the shard and the gathered weight into each other's place with setattr.
        if name == "weight":
            if self.sharded is not None:
                self.sharded.note(value)
            elif is_sharded(value):
                self.sharded = ShardedWeight(value, self.resident)
                self.sharded.check()
                self.resident.sharded(self.sharded.rows, self.sharded.rows_of)
        super().__setattr__(name, value)

    @property
    def home(self) -> Tensor:
        """Where the columns live: the weight, or, if FSDP2 shards it, the rows of it that this process owns."""
        return self.weight if self.sharded is None else self.sharded.rows

    def home_to_write(self) -> Tensor:
        """``home``, for a call that may write it."""
        if self.sharded is not None:
            self.sharded.before_write()
        return self.home

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
        if is_sharded(module.weight):
            module.sharded = ShardedWeight(module.weight, module.resident)
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
        self.resident.let_go(self.home_to_write())
        self.bring_gathered_up_to_date()
        del self.resident, self.handle
        self.__dict__.pop("sharded", None)
        self.__class__ = self.stock_class  # type: ignore[assignment]
        del self.owner
        ResidentWeight._rebind_forward(self)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._run_compiled(x) if self.sharded is None else self._run_uncompiled(x)
        resident, weight = self.resident, self.weight
        if self.sharded is not None:
            self._prepare_sharded(self.sharded)
        elif resident.stale(weight):
            resident.refresh(weight)
        if not torch.is_grad_enabled():
            if torch._C._current_graph_task_id() == -1:
                resident.note_forward()  # re-entrant checkpointing runs its first pass without gradients
            return super().forward(x)
        resident.note_forward()
        state = resident.state
        return self._run_partial(x, state)

    def bring_gathered_up_to_date(self) -> None:
        """If FSDP2 keeps a gathered copy just now, make it what the rows are."""
        if self.sharded is not None and not is_sharded(self.weight):
            self.sharded.bring_up_to_date(self.weight)

    def _prepare_sharded(self, sharded: ShardedWeight) -> None:
        """Make the gathered weight hold what is wanted; usually it does."""
        check_whole(self.weight)
        if self.resident.stale(sharded.rows):
            self.resident.refresh(self.home_to_write())
        sharded.bring_up_to_date(self.weight)

    def _deltas_of(self, state: State) -> tuple[Tensor, ...]:
        """The deltas of ``state`` that gradients go to: all rows of them."""
        if self.sharded is None:
            return state.deltas
        gathered = self.owner().paca_delta
        return tuple(gathered[c.name] for c in state.columns)

    def _before_backward(self, state: State) -> Callable[[int], None]:
        """What a backward pass has to call, with the saved tag, before it reads the weight."""
        if self.sharded is None:
            return partial(self.resident.before_backward, self.weight, state)
        return partial(self.sharded.before_backward, self.weight, state)

    def _run_partial(self, x: Tensor, state: State) -> Tensor:
        """Run on the weight, which holds ``state``, such that gradients reach the deltas."""
        return partial_linear(
            x,
            self.weight,
            self.bias,
            self._deltas_of(state),
            state.indices,
            state.scales,
            input_dim=self.input_dim,
            runs=state.runs,
            before_backward=self._before_backward(state),
            state_tag=state.tag_tensor,
        )

    @torch.compiler.disable  # FSDP2's own hooks break the graph around the layer anyway
    def _run_uncompiled(self, x: Tensor) -> Tensor:
        owner = self.owner()
        if owner is not None:
            owner.push_columns()
        return self.forward(x)

    def _run_compiled(self, x: Tensor) -> Tensor:
        """Run within a graph that is being compiled."""
        return compiled_linear(self, x)

    # -- the weight as others see it: always the pretrained one ---------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ResidentWeight:
        self.resident.park(self.home_to_write())
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.resident.park(self.home_to_write())
        if not keep_vars and self.sharded is None:  # with it, the caller asks for the parameter itself
            self.resident.lend(self.weight)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            self._note_handed_out(destination[prefix + "weight"])

    def _note_handed_out(self, shared: Tensor) -> None:
        if self.sharded is None:
            self.resident.handed_out(shared)
        else:
            self.sharded.handed_out(shared)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *rest: Any
    ) -> None:
        if prefix + "weight" in state_dict:
            if self.resident.merged:
                names = ", ".join(repr(c.name) for c in self.resident.merged)
                raise RuntimeError(f"{prefix}weight can't be loaded while {names} is merged into it: unmerge first.")
            self.resident.park(self.home_to_write())
            self.resident.reloaded()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)

    def __getstate__(self) -> dict[str, Any]:
        self.resident.park(self.home_to_write())
        state = self.__dict__.copy()
        del state["handle"], state["owner"]
        state.pop("sharded", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if is_sharded(self.weight):
            self.sharded = ShardedWeight(self.weight, self.resident)
        self.handle = new_handle(self)
        self.owner = lambda: None  # the adapted layer above, if there is one, makes itself known again
