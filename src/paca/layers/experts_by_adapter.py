"""Mixed batches through stacks of experts: the experts run once per adapter, on the tokens of its samples.

Experts see single tokens, in no order that says whose they are. But each token's result depends on that token and its
routing alone. So the tokens of one adapter's samples are run by themselves, with its columns in the stacks, as they are
when that adapter runs alone; a backward pass finds the columns of each of these passes again as it always does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paca.layers import PacaExpertStack
from paca.layers.mixed_batch import BASE, MixedBatch, current_mixed_batch

ONE_AT_A_TIME = threading.RLock()  # the stacks hold one adapter's columns at a time


class NoteSamples:
    """A hook before the block around the experts `name`: notes how the tokens that these will get are shared out among
    samples."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, parent: nn.Module, args: Any, kwargs: Any = None) -> None:  # `_pass_names` says why
        batch = current_mixed_batch(parent)
        if batch is not None:
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            shape: Sequence[int] = () if given is None else given.shape
            samples, length, _ = shape if len(shape) == 3 else (0, 0, 0)
            batch.samples_before[self.name] = samples, length


def _own_forward(own: Any, experts: Any) -> Any:
    return own or type(experts).forward.__get__(experts)


class ExpertsByAdapter:
    """The forward of `experts`, which the model calls `name`, while mixed batches run. The block `parent` around them
    gets `(samples, length, hidden)`."""

    def __init__(self, experts: nn.Module, name: str, parent: nn.Module) -> None:
        self.experts, self.name = experts, name
        self.own = vars(experts).get("forward")  # accelerate's, if there is one
        self.forward: Callable[..., Tensor] = experts.forward
        parent.register_forward_pre_hook(NoteSamples(name), with_kwargs=True)

    def __reduce__(self) -> Any:  # a copy that is made meanwhile has the experts' own forward
        return _own_forward, (self.own, self.experts)

    @torch.compiler.disable  # which adapters there are is a matter of run time
    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batch = current_mixed_batch(self.experts)
        if batch is None:
            return self.forward(hidden_states, *args, **kwargs)
        stacks = [child for child in self.experts.children() if isinstance(child, PacaExpertStack)]
        groups = self._tokens_by_adapter(hidden_states, batch, stacks)
        with ONE_AT_A_TIME:
            parts = []
            for adapter, tokens in groups.items():
                batch.adapter = adapter
                try:
                    parts.append(self._run(tokens, hidden_states, args, kwargs))
                finally:
                    batch.adapter = BASE
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts).index_select(0, torch.cat(list(groups.values())).argsort())

    def _run(self, tokens: Tensor, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        count = hidden_states.shape[0]
        if tokens.numel() == count:
            return self.forward(hidden_states, *args, **kwargs)

        def of_these(value: Any) -> Any:
            return value.index_select(0, tokens) if isinstance(value, Tensor) else value

        routing = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if any(value.dim() == 0 or value.shape[0] != count for value in routing):
            raise ValueError(
                f"{self.name} takes something besides one row per token, so PaCA can't run a mixed batch "
                "(adapter_names) through it. Run one batch per adapter, with set_adapter in between."
            )
        return self.forward(
            of_these(hidden_states), *map(of_these, args), **{name: of_these(value) for name, value in kwargs.items()}
        )

    def _tokens_by_adapter(
        self, hidden_states: Tensor, batch: MixedBatch, stacks: list[PacaExpertStack]
    ) -> dict[str, Tensor]:
        """Per adapter, the numbers of its samples' tokens, ascending; those without columns here are `"__base__"`'s.
        Raise `ValueError` if it can't be told which token is whose."""
        tokens = hidden_states.shape[0]
        here = {name for stack in stacks if not stack._disable_adapters for name in stack.paca_delta}
        if not here & set(batch.names):
            return {BASE: torch.arange(tokens, device=hidden_states.device)}
        samples, length = batch.samples_before.get(self.name, (0, 0))
        if samples * length != tokens or hidden_states.dim() != 2:
            raise ValueError(
                f"{self.name} gets {tuple(hidden_states.shape)}, which is not the tokens of all samples one after "
                "another, so it can't be told which adapter each has (adapter_names). Run one batch per adapter, with "
                "set_adapter in between."
            )
        samples_of: dict[str, list[int]] = {}
        for sample, name in enumerate(batch.names_of(samples)):
            samples_of.setdefault(name if name in here else BASE, []).append(sample)
        numbers = torch.arange(tokens, device=hidden_states.device).view(samples, length)
        return {name: numbers[of_it].reshape(-1) for name, of_it in samples_of.items()}


def adapted_experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The experts modules that hold adapted stacks, with their names."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if any(isinstance(child, PacaExpertStack) for child in module.children())
    ]


def split_by_adapter(model: nn.Module) -> None:
    """Let experts run once per adapter when a mixed batch comes."""
    for name, experts in adapted_experts(model):
        if not isinstance(experts.forward, ExpertsByAdapter):
            experts.forward = ExpertsByAdapter(experts, name, model.get_submodule(name.rpartition(".")[0]))


def run_together(model: nn.Module) -> None:
    """Undo `split_by_adapter`, but for its hooks."""
    for _, experts in adapted_experts(model):
        splitting = experts.forward
        if isinstance(splitting, ExpertsByAdapter):
            if splitting.own is None:
                del experts.forward
            else:
                experts.forward = splitting.own
