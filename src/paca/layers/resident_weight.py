"""A stock module whose weight holds resident columns.

The base layer of an adapted layer is turned into one of these classes while it is adapted (and back when the adapter
goes), so that hooks on it, state dicts, copies, pickles and moves see the right thing whoever asks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks as is_checkpointing

from paca.columns.entry import in_other_mode
from paca.columns.lost import lies_in_checkpointing, note_checkpointed, refuse_torn
from paca.columns.merging import MergeableColumns
from paca.columns.resident import WRITING
from paca.columns.sharded import ShardedColumns
from paca.columns.state import ALONE, State, is_sharded
from paca.columns.stepping import STEPPING, others_step
from paca.functional.product import Product, WeightSource, check_frozen
from paca.functional.train_columns import train_columns
from paca.layers.lent_weight import has_others, run_on_copy


class ResidentPass(WeightSource):
    """One forward pass on the resident weight of `module`, which holds `state`, for its backward pass."""

    def __init__(self, module: Any, state: State) -> None:
        self.module, self.state, self.columns, self.tag = module, state, module.columns, state.tag

    def weight(self) -> Tensor:
        check_frozen(self.module.weight)
        return self.module.weight

    def weight_again(self, saved_tag: Tensor, wanted: bool) -> Tensor | None:
        weight = self.module._parameters.get("weight")
        if not self.columns.untouched(weight, self.state, saved_tag):
            if wanted:
                self.columns.before_backward(self.module.weight, self.state, saved_tag)
            else:
                self.columns.find(weight)
                self.columns.check_backward(self.state, saved_tag)
        self.held = self.columns.state
        return self.weight() if wanted else None

    def check_after(self) -> None:
        now = self.columns.state
        if now is not self.held or now.key != self.state.key or self.columns.half_written:
            refuse_torn()


class ResidentWeight(nn.Module):
    """Mixin in front of a stock module class, for `weight` (and `bias`)."""

    stock_class: ClassVar[type[nn.Module]]  # what the module was, and becomes again
    input_dim: ClassVar[int]  # the dimension of `weight` that runs over the input features
    fixed_product: ClassVar[Product]  # what this kind of layer computes, where that does not depend on the module
    weight: Tensor
    bias: Any  # a parameter or None
    columns: MergeableColumns
    owner: Callable[[], Any]  # gives the adapted layer above, which knows what is wanted; a weak reference

    def product(self) -> Product:
        """What this layer computes."""
        return self.fixed_product

    def weight_shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`, however the weight is stored."""
        return self.weight.shape[1 - self.input_dim], self.weight.shape[self.input_dim]

    def weight_placement(self) -> tuple[torch.device, torch.dtype]:
        """Where the layer computes, and the type of its weight."""
        return self.weight.device, self.weight.dtype

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 puts the shard and the gathered weight into each other's place with setattr.
        if name == "weight" and "columns" in self.__dict__:
            if isinstance(self.columns, ShardedColumns):
                self.columns.replaced(value)
            elif is_sharded(value):
                ShardedColumns.of(self.columns, value).take_over()
        super().__setattr__(name, value)

    @classmethod
    def adopt(cls, module: Any) -> ResidentWeight:
        """Turn `module`, an instance of `stock_class`, into an instance of this class, in place."""
        module.__class__ = cls
        module.columns = MergeableColumns(cls.input_dim)
        module._set_up()
        return module

    def _set_up(self) -> None:
        if is_sharded(self.weight):
            ShardedColumns.of(self.columns, self.weight)
        self.owner = lambda: None  # the adapted layer above makes itself known
        rebind_forward(self)

    @classmethod
    def problem(cls, module: nn.Module) -> str | None:
        """What makes this module of `stock_class` one that can't be adapted, or None."""
        return None

    def release(self) -> None:
        """Park, and turn back into the stock module, in place."""
        self.columns.park(self.columns.home_to_write(self.weight))
        self.columns.base_changed()  # backward passes that are pending may not write into the weight any more
        self.columns.bring_up_to_date(self.weight)
        del self.columns, self.owner
        self.__class__ = self.stock_class  # type: ignore[assignment]
        rebind_forward(self)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # whoever changes what is active has written it by now
            traced, unwritten = self.columns.traced, getattr(self.columns.entry, "unwritten", False)
            if not self.columns.whole or unwritten or lies_in_checkpointing() or has_others(self, traced):
                return self._run_apart(x)
            if not torch.is_grad_enabled():
                return super().forward(x)
            return train_columns(self.product(), x, self.weight, self.bias, traced)
        columns, weight, owner = self.columns, self._parameters.get("weight"), self.owner()
        state = columns.looked_after(weight)
        if state is None or (owner is not None and not owner.has(state)):
            if type(weight) is Tensor and owner is not None and columns.whole:
                return run_on_copy(self, x, weight)
            weight, state = None, self.state_now()
        y = self._multiply(x, weight, state)
        if columns.state is state and not columns.half_written:
            return y
        with WRITING:  # another thread wrote meanwhile; now the others wait
            return self._multiply(x, None, self.state_now())

    def _multiply(self, x: Tensor, weight: Tensor | None, state: State) -> Tensor:
        """The product of `x` with the weight that holds `state`; without `weight`, the pass finds it itself."""
        if not torch.is_grad_enabled():
            return super().forward(x)
        trained = self.columns.trained(state, self.owner()) if weight is None else state.trained
        if is_checkpointing(True):
            note_checkpointed(self.columns, state)
        return train_columns(self.product(), x, weight, self.bias, trained, ResidentPass(self, state))

    def state_now(self) -> State:
        """What the weight holds; it is written before, if it is stale: the model did not look for this layer."""
        owner, weight, state = self.owner(), self.weight, self.columns.state
        self.columns.check_writable(weight)
        alone = in_other_mode(self.columns, self.training) or bool(STEPPING)
        if owner is not None and (alone or owner.stale()):
            with WRITING:  # steps and writes of other threads wait
                owner.check_held() if others_step([owner]) else owner.write(compare=alone)
                state = self.columns.state
        self.columns.bring_up_to_date(weight)
        self.columns.note_forward()
        return state

    # FSDP2's own hooks break the graph around the layer anyway, checkpointing around a block.
    @torch.compiler.disable(reason="its weight is parked or sharded, or other deltas are in the place of its own")
    def _run_apart(self, x: Tensor) -> Any:
        return self.forward(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ResidentWeight:
        home = self.columns.home_to_write(self.weight)
        self.columns.compare(home)  # later there is nothing left to compare with
        self.columns.park(home, for_now=True)
        self.columns.moved()
        return super()._apply(fn, recurse)

    @torch.compiler.disable
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        with WRITING, ALONE:  # so that it is parked while it is handed out
            self.columns.park_within(self.columns.home_to_write(self.weight), for_now=True)
            super()._save_to_state_dict(destination, prefix, keep_vars)
            if not keep_vars:  # with it, the caller asks for the parameter itself
                self.columns.handed_out(destination[prefix + "weight"])

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *rest: Any
    ) -> None:
        if prefix + "weight" in state_dict:
            self.columns.park(self.columns.home_to_write(self.weight), for_now=True)
            self.columns.reloaded(f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)

    def __getstate__(self) -> dict[str, Any]:
        self.columns.park(self.columns.home_to_write(self.weight), for_now=True)
        return {key: value for key, value in super().__getstate__().items() if key != "owner"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._set_up()


def rebind_forward(module: nn.Module) -> None:
    """Let accelerate's hooks, which wrap `forward` on the instance and keep what they found, run the class's own, also
    where they were taken off and left that on the instance."""
    if "_old_forward" in module.__dict__:
        module._old_forward = type(module).forward.__get__(module)
    elif getattr(module.__dict__.get("forward"), "__self__", None) is module:
        del module.forward
