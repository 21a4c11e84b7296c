"""The repeated blocks of a model, and copies of it with fewer of them.

The memory of a training step is linear in the number of blocks of a kind. So it is enough to look at two and at three
of each kind: what a further one adds is the difference.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Hashable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest.mock import patch

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from paca.layers import paca_layers
from paca.planning.shadow import find_ends
from paca.tuner import entry

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class RepeatedBlocks:
    """The blocks of a model."""

    path: str
    """Name in the model of the `ModuleList` that holds them."""
    kinds: tuple[Hashable, ...]
    """For each block, what it is like: equal for blocks that need the same memory."""

    def owner(self, model: nn.Module) -> nn.Module:
        """The module that runs the blocks: what comes after it is the output layer and the loss."""
        return model.get_submodule(self.path.rpartition(".")[0])

    def sample(self, repeats: int) -> tuple[int, ...]:
        """Numbers of the blocks, at most `repeats` of each kind, in order: the last ones, so that the last is in it."""
        taken: Counter[Hashable] = Counter()
        chosen = []
        for number in reversed(range(len(self.kinds))):
            if taken[self.kinds[number]] < repeats:
                taken[self.kinds[number]] += 1
                chosen.append(number)
        return tuple(reversed(chosen))

    def with_one_more(self, sample: tuple[int, ...], kind: Hashable) -> tuple[int, ...]:
        """`sample` and the last block of `kind` that is not in it."""
        missing = [number for number, own in enumerate(self.kinds) if own == kind and number not in sample]
        return tuple(sorted((*sample, missing[-1])))


def find_blocks(model: nn.Module) -> RepeatedBlocks | None:
    """The list of blocks that holds most of the parameters of `model`, a transformers model.

    None if it has none, or if blocks use other blocks' keys and values, so that none can be left out.
    """
    if getattr(_text_config(model), "num_kv_shared_layers", 0):
        return None
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 1
        and all(isinstance(getattr(block, "base_layer", block), GradientCheckpointingLayer) for block in module)
    ]
    if not lists:
        return None
    path, blocks = max(lists, key=lambda entry: sum(p.numel() for p in entry[1].parameters()))
    layer_types = _layer_types(model, len(blocks))
    kinds: list[Hashable] = []
    trained_below = False  # a block with nothing to train below it gets no gradient, and keeps nothing
    for number, block in enumerate(blocks):
        parameters = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in block.named_parameters())
        kinds.append((type(getattr(block, "base_layer", block)), layer_types[number], parameters, trained_below))
        trained_below = trained_below or any(p.requires_grad for p in block.parameters())
    return RepeatedBlocks(path, tuple(kinds))


def copy_with_blocks(model: Model, blocks: RepeatedBlocks | None, chosen: tuple[int, ...]) -> Model:
    """A copy of `model`, a model without PEFT's wrapper, that has only the `chosen` of its blocks (all if None)."""
    with ExitStack() as undo:
        if entry.entry_of(model) is not None:
            undo.callback(entry.install, model)  # once its hooks are back: `remove` has it forget its layers
        for hooks in (model._forward_pre_hooks, model._forward_hooks, model._forward_hooks_always_called):
            undo.enter_context(patch.dict(hooks))
        entry.remove(model)  # it lists all adapted layers, which would be copied along
        if blocks is not None:
            block_list = model.get_submodule(blocks.path)
            few = {str(place): block_list._modules[str(number)] for place, number in enumerate(chosen)}
            undo.enter_context(patch.object(block_list, "_modules", few))
        small = copy.deepcopy(model)
    if blocks is not None:
        _shorten_config(small, len(blocks.kinds), chosen)
        _renumber(small.get_submodule(blocks.path))
    if paca_layers(small):
        entry.install(small)
    find_ends(small)
    return small


def _text_config(model: nn.Module) -> Any:
    return model.config.get_text_config()  # type: ignore[operator, union-attr]


def _layer_types(model: nn.Module, count: int) -> list[Any]:
    types = getattr(_text_config(model), "layer_types", None)
    return list(types) if types is not None and len(types) == count else [None] * count


def _shorten_config(model: nn.Module, count: int, chosen: tuple[int, ...]) -> None:
    """Models look up a block's type by its place, in the configuration."""
    config = _text_config(model)
    types = getattr(config, "layer_types", None)
    derived = isinstance(getattr(type(config), "layer_types", None), property)  # from num_hidden_layers
    if types is not None and len(types) == count and not derived:
        config.layer_types = [types[number] for number in chosen]
    if getattr(config, "num_hidden_layers", None) == count:
        config.num_hidden_layers = len(chosen)


def _renumber(blocks: nn.Module) -> None:
    """They find their keys and values by their place, in a cache."""
    for place, block in enumerate(blocks.children()):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = place  # type: ignore[assignment]
