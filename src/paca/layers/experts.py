"""PaCA for stacks of experts: 3-D parameters such as `gate_up_proj` and `down_proj` of transformers' experts.

While it is adapted, the parameter is held by a module in its place, under its name; the experts' own forward asks that
module for the weight and gets a `StackView`. Every expert of a stack trains the same input columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paca.columns.state import State
from paca.layers.base import PacaLayer
from paca.layers.expert_view import StackView
from paca.layers.lent_weight import refuse_lent_stack
from paca.layers.mixed_batch import after_steps, current_mixed_batch
from paca.layers.resident_weight import ResidentWeight


class ExpertStack(nn.Module):
    """Holds a stack `weight (experts, out_features, in_features)` that was a parameter of its experts module. `places`
    are the names of all parameters of that, in the order in which they go back."""

    def __init__(self, weight: nn.Parameter, places: tuple[str, ...]) -> None:
        super().__init__()
        self._parameters["weight"] = weight  # PEFT's low_cpu_mem_usage sends whatever is registered to the meta device
        self.bias = None
        self.places = places


class TransposedExpertStack(ExpertStack):
    """The same with `weight (experts, in_features, out_features)`, as gpt-oss stores it."""


class ResidentStack(ResidentWeight, ExpertStack):
    """An `ExpertStack` with resident columns `weight[:, :, indices]`."""

    stock_class = ExpertStack
    input_dim = -1

    _cut: tuple[State, tuple[bool, ...], list[tuple[Tensor, ...]]] | None = None

    def weight_shape(self) -> tuple[int, int]:
        return self.weight.shape[-3 - self.input_dim], self.weight.shape[self.input_dim]

    def forward(self) -> StackView | Tensor:  # type: ignore[override]
        """The stack as one forward pass sees it: the plain weight if adapters are disabled or merged and no gradient is
        wanted. Else another thread's mixed batch may write columns while it runs.

        That way such a model runs the stock code on the stock parameter.
        """
        if type(self._parameters.get("weight")) is Tensor and self.columns.whole:
            refuse_lent_stack()
        state, owner = self.state_now(), self.owner()
        if not torch.is_grad_enabled() and not state.columns and (owner._disable_adapters or owner.merged):
            return self.weight
        return StackView(self, self.columns.trained(state, self.owner()), state)

    def deltas_by_expert(self, deltas: tuple[Tensor, ...], state: State) -> list[tuple[Tensor, ...]]:
        """The deltas of `state`, cut into `(out_features, r)` per expert.

        Cut once and kept until the deltas change: taken one by one, each expert's backward would make a gradient of the
        whole delta's size.
        """
        requiring = tuple(delta.requires_grad for delta in deltas)
        # What FSDP2 gathers is another graph's leaf in each pass: its parts must not be kept.
        if not torch.is_grad_enabled() or not self.columns.whole:
            return [delta.unbind(0) for delta in deltas]
        cut = self._cut  # read once: another thread may keep another state's
        if cut is None or cut[0] is not state or cut[1] != requiring:
            cut = self._cut = (state, requiring, [delta.unbind(0) for delta in deltas])
        return cut[2]

    def release(self) -> None:
        self._cut = None
        super().release()

    # The parameter keeps the name in state dicts that it had in its experts module.

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix.removesuffix(".")] = destination.pop(prefix + "weight")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cut": None}  # tensors of a graph can't be copied


class ResidentTransposedStack(ResidentStack, TransposedExpertStack):
    """A `TransposedExpertStack` with resident columns `weight[:, indices, :]`."""

    stock_class = TransposedExpertStack
    input_dim = -2


class PacaExpertStack(PacaLayer):
    """The adapted stack: stands where the parameter was, and is used by the experts' forward as the parameter was.

    `paca_delta` is `(experts, out_features, r)` per adapter, however the stack is stored; `paca_indices` is
    `(r,)`.
    """

    delta_axes = "(experts, out_features, r)"
    delta_column_dim = -1
    multiplies_a_matrix = False
    runs_adapters_in_turn = True

    def delta_shape(self, r: int) -> tuple[int, ...]:
        return self.base_layer.weight.shape[0], self.out_features, r

    def wanted_names(self) -> list[str]:
        batch = current_mixed_batch(self)
        if batch is None:
            return super().wanted_names()
        # The rows of one adapter are run by themselves.
        return [batch.adapter] if batch.adapter in self.paca_delta and not self._disable_adapters else []

    @torch.compiler.disable  # a graph must not be specialized on what is resident while it is traced
    def forward(self) -> StackView | Tensor:
        """The stack as the running forward pass sees it."""
        stack: StackView | Tensor = after_steps(self.base_layer)
        return stack

    def __getitem__(self, index: Any) -> StackView | Tensor:
        return self()[index]

    def transpose(self, first: int, second: int) -> StackView | Tensor:
        return self().transpose(first, second)

    @property
    def mT(self) -> StackView | Tensor:
        return self().mT

    def __getattr__(self, name: str) -> Any:
        of_the_weight = name in ("shape", "dtype", "device", "data_ptr")
        return getattr(self.base_layer.weight, name) if of_the_weight else super().__getattr__(name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*(a() if isinstance(a, PacaExpertStack) else a for a in args), **(kwargs or {}))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if prefix + "base_layer" in state_dict:
            state_dict[prefix + "base_layer.weight"] = state_dict.pop(prefix + "base_layer")
        super()._load_from_state_dict(state_dict, prefix, *rest)


_TRANSPOSED = {
    "JetMoeParallelExperts": False,
    "Llama4TextExperts": True,
    "LongcatFlashExperts": False,
    "Step3p7Experts": False,
}
"""Of transformers' classes that take no part in its experts interface, which would say so."""


def is_transposed(experts: nn.Module) -> bool | None:
    """Whether stacks are stored as `(experts, in_features, out_features)`; None if that is not known."""
    stored: bool | None = getattr(experts, "is_transposed", _TRANSPOSED.get(type(experts).__name__))
    return stored


def stack_of(experts: nn.Module, name: str) -> ExpertStack:
    """The parameter `name` of `experts` in a module of its own; `experts` is left as it is."""
    places = tuple(experts._parameters)
    for sibling in experts.children():
        if isinstance(sibling, PacaExpertStack):
            places = sibling.base_layer.places
    weight: Any = experts._parameters[name]
    return (TransposedExpertStack if is_transposed(experts) else ExpertStack)(weight, places)


def put_parameter_back(experts: nn.Module, name: str, stack: ExpertStack) -> None:
    """Make the stack's weight the parameter `name` of `experts` again, in its old place."""
    del experts._modules[name]
    experts._parameters[name] = stack._parameters["weight"]
    for place in stack.places:
        if place in experts._parameters:
            experts._parameters[place] = experts._parameters.pop(place)
