"""Run part of a block without keeping its intermediates, and run it again in the backward pass.

`torch.utils.checkpoint` (non-reentrant) does the work; two things are added. The part's input is usually a norm's
output, which nothing else needs: what is kept in its place is the norm's own input, which the norm keeps anyway. And
what the part's modules are like (adapters, trained values, hooks) is noted, so that a recomputation that would not
repeat the forward pass raises instead of giving wrong gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paca.layers.mixed_batch import current_mixed_batch

_SOURCE = "_paca_lean_source"


@dataclass(frozen=True)
class NormSource:
    """How to make a norm's output again."""

    normalize: Callable[[Tensor], Tensor]
    x: Tensor
    """The norm's input, detached."""
    version: int
    """The output's version counter: if it moved, somebody wrote into the output and it can't be made again."""


def note_source(output: Tensor, normalize: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Attach to a norm's `output` that it is `normalize(x)`. Returns `output`."""
    setattr(output, _SOURCE, NormSource(normalize, x.detach(), output._version))
    return output


def _source(hidden_states: Tensor) -> NormSource | None:
    source = getattr(hidden_states, _SOURCE, None)
    return source if source is not None and source.version == hidden_states._version else None


def recomputed(
    segment: Callable[[Tensor, bool], Tensor], hidden_states: Tensor, modules: Sequence[nn.Module]
) -> Tensor:
    """`segment(hidden_states, False)`, keeping no intermediates.

    Args:
        segment: Maps `(hidden_states, save_only)` to one tensor. With `save_only` it must save for its backward what it
            saves without, but the value of its result is not used.
        hidden_states: The input, `(..., hidden)`.
        modules: The modules that `segment` runs.

    Raises:
        RuntimeError: In the backward pass, if adapters, trained parameters or hooks of `modules` are others by then.

    In a mixed batch, which is over by the time of the backward pass, all is kept.
    """
    if torch.compiler.is_compiling():
        return checkpoint(lambda x: segment(x, False), hidden_states, use_reentrant=False)
    if current_mixed_batch() is not None:
        return segment(hidden_states, False)
    source = _source(hidden_states)
    needs_grad = hidden_states.requires_grad
    noted = _state(modules)
    first = [hidden_states]  # emptied by the forward pass, so that the closure doesn't keep the input alive
    del hidden_states

    def run(kept: Tensor) -> Tensor:
        if first:
            return segment(first.pop(), False)
        _check_state(noted, _state(modules))
        with torch.no_grad():
            x = kept.detach() if source_normalize is None else source_normalize(kept)
        return segment(x.requires_grad_(needs_grad), True)

    source_normalize = None if source is None else source.normalize
    kept = first[0] if source is None else source.x
    return checkpoint(run, kept, use_reentrant=False)


@dataclass(frozen=True)
class _State:
    adapters: tuple[Any, ...]
    hooks: tuple[int, ...]
    trained: dict[int, int]
    """Version counter of each trainable parameter, by its identity."""


def _state(modules: Sequence[nn.Module]) -> _State:
    adapters: list[Any] = []
    hooks: list[int] = []
    trained: dict[int, int] = {}
    for root in modules:
        for module in root.modules():
            if isinstance(module, BaseTunerLayer):
                adapters.append((tuple(module.active_adapters), module.disable_adapters, tuple(module.merged_adapters)))
            hooks.append(len(module._forward_pre_hooks) + len(module._forward_hooks))
            for parameter in module._parameters.values():
                if parameter is not None and parameter.requires_grad:
                    trained[id(parameter)] = parameter._version
    return _State(tuple(adapters), tuple(hooks), trained)


def _check_state(forward: _State, now: _State) -> None:
    if forward.adapters != now.adapters:
        changed = f"adapters were (active, disabled, merged) {forward.adapters} and are now {now.adapters}"
    elif forward.hooks != now.hooks:
        changed = "forward hooks were added or removed"
    elif any(now.trained.get(key, version) != version for key, version in forward.trained.items()):
        changed = "a trained parameter was modified in place"
    else:
        return
    raise RuntimeError(
        "the MLP can't be recomputed for the backward pass as it was in the forward pass: its "
        f"{changed}. Run the backward pass before the change, or use make_lean(model, recompute=None), which keeps "
        "gate and up."
    )
