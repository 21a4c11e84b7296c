"""Where the columns of a weight live: in the parameter itself, or, in `paca.columns.sharded`, in FSDP2's rows of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from paca.columns.resident import ResidentColumns
from paca.columns.state import State
from paca.functional.train_columns import Trained


def is_sharded(value: object) -> bool:
    """Whether a parameter is a `DTensor`, as FSDP2 and tensor parallelism make them."""
    if type(value) in (nn.Parameter, Tensor) or not isinstance(value, Tensor) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def check_not_flattened(weight: Tensor) -> None:
    """Raise for a weight that is a piece of FSDP1's flat parameter: what is written there is lost, and it has no
    version counter and no memory of its own by which others' writes could be seen.

    Raises:
        RuntimeError: naming FSDP2.
    """
    # Two attributes of FSDP1 that are not public (torch 2.13): of the parameter, and of what it is a view of in a pass.
    flat: Any = weight if isinstance(weight, nn.Parameter) else weight._base
    if hasattr(flat, "_fsdp_flattened") or hasattr(flat, "_is_flat_param"):
        raise RuntimeError(
            "A layer that PaCA adapts is wrapped by FSDP1 (FullyShardedDataParallel), which keeps weights flattened. "
            "PaCA can't write columns there. Use FSDP2 (fully_shard, or fsdp_version: 2 for accelerate)."
        )


class WholeWeight:
    """The columns live in the parameter that the layer multiplies with.

    Args:
        columns: what is active.
    """

    whole = True
    """Whether this process holds all rows, so that compiled graphs, hot swaps and the like can use them."""

    def __init__(self, columns: ResidentColumns) -> None:
        self.columns = columns

    def home(self, weight: Tensor) -> Tensor:
        """What columns are written into, given the module's weight."""
        return weight

    def home_to_write(self, weight: Tensor) -> Tensor:
        """`home`, for a call that may write it."""
        check_not_flattened(weight)
        return weight

    def replaced(self, value: Any) -> None:
        """Note that `value` takes the weight's place in the module."""

    def check(self, weight: Tensor) -> None:
        """Raise if a layer is about to run on a part of its weight.

        Raises:
            RuntimeError: under tensor parallelism, ZeRO-3 and FSDP1.
        """
        if type(weight) is not nn.Parameter or weight.dim() < 2:
            self.check_writable(weight)

    def check_writable(self, weight: Tensor) -> None:
        """`check`, for a call that may write the weight."""
        check_not_flattened(weight)
        if weight.dim() < 2:
            raise RuntimeError(
                f"A weight that PaCA trains columns of has the shape {tuple(weight.shape)}: DeepSpeed's ZeRO-3 and "
                "FSDP1 take weights away between uses, or flatten them. Use ZeRO stage 1 or 2, or FSDP2 (fully_shard)."
            )
        if is_sharded(weight):
            raise RuntimeError(
                "A layer that PaCA adapts runs on a sharded weight (a DTensor), as tensor parallelism does it. That is "
                "not supported: its gradients would be wrong. FSDP2 (fully_shard) is. Train with "
                "DistributedDataParallel, or leave the layer out of target_modules."
            )

    def local(self, layer: Any, adapter_name: str) -> tuple[Tensor, Tensor | None]:
        """What of an adapter's delta belongs to `home`, and the parameter it is a part of, if it is one."""
        delta = layer.paca_delta[adapter_name]
        if is_sharded(delta):
            raise RuntimeError(
                f"The deltas of adapter {adapter_name!r} are sharded, and the weight below them is not. Shard both, or "
                "none (ignored_params)."
            )
        return delta, None

    def bring_up_to_date(self, weight: Tensor) -> None:
        """Make the weight that the layer multiplies with what `home` is."""

    def entered(self, model: nn.Module, layers: list[Any]) -> None:
        """Note that a forward pass of `model` begins, which has these adapted layers."""

    def trained(self, state: State, layer: Any) -> Trained:
        """The columns of `state` that gradients go to."""
        return state.trained

    def before_backward(self, weight: Tensor, state: State, saved_tag: Tensor) -> None:
        """Make `weight` hold what the forward pass with `state` saw. Raises as `ResidentColumns` does."""
        self.columns.before_backward(weight, state, saved_tag)

    def lend(self, weight: Tensor) -> None:
        """Note that a state dict is about to share the parked weight."""
        self.columns.lend(weight)

    def handed_out(self, shared: Any) -> None:
        """Note what the state dict got."""
        self.columns.handed_out(shared)
