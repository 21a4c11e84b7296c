"""The `adapter_names` that PEFT passes from a model's `forward` and `generate`: checked, and made to be seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from paca.layers import paca_layers
from paca.layers.experts_by_adapter import NoteSamples, run_together, split_by_adapter
from paca.layers.fast_paths import allow_fast_paths, call_every_layer
from paca.layers.mixed_batch import BASE, MixedBatch, Running, current_mixed_batch, end_left_over, running
from paca.tuner.entry import entry_of


@torch.compiler.disable
def mixed_batch(
    model: nn.Module, adapter_names: Sequence[str], arguments: Mapping[str, Any]
) -> AbstractContextManager[None]:
    """Run the forward passes within, called with `arguments`, with one adapter per sample, `"__base__"` for none.

    The weights are parked by the first of them; afterwards, the next ordinary forward pass sees the active adapters.
    Other threads may run mixed batches of their own meanwhile, or ordinary forward passes: each layer looks which
    columns its thread wants, writes them, and multiplies again if another thread wrote others in between. Raise
    `ValueError` for names that are no list of loaded adapters, or for adapters that can't be mixed now."""
    end_left_over()
    return running(_BatchOfModel(model, _check(model, adapter_names), _repeats(arguments)))


class _BatchOfModel(MixedBatch):
    """While it runs, modules that need the names look for them."""

    def __init__(self, model: nn.Module, names: Sequence[str], repeats: int) -> None:
        super().__init__(names, repeats)
        self.model, self.entry = model, entry_of(model)
        self.members = frozenset(map(id, model.modules()))

    def begin(self) -> None:
        split_by_adapter(self.model)
        call_every_layer(self.model)
        for wrapper in _wrappers(self.model):
            if _pass_names not in wrapper._forward_pre_hooks.values():
                wrapper.register_forward_pre_hook(_pass_names, with_kwargs=True)

    def end(self) -> None:
        if not any(batch.entry is self.entry for batch in Running.batches if batch is not self):
            run_together(self.model)
            allow_fast_paths(self.model)
            for module in self.model.modules():
                _take_out_hooks(module)


def _take_out_hooks(module: nn.Module) -> None:
    """Those that `begin` put in: their handles may be lost (Ctrl-C)."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _pass_names or isinstance(hook, NoteSamples):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _check(model: nn.Module, adapter_names: Sequence[str]) -> tuple[str, ...]:
    if model.training:
        raise ValueError(
            "adapter_names can't be given in training mode (nor in PEFT's LoRA). Call model.eval() first; gradients "
            "reach each sample's adapter in evaluation mode as well."
        )
    if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
        raise ValueError(f"adapter_names must be a list with one adapter's name per sample; got {adapter_names!r}.")
    layers = paca_layers(model)
    known = {name for layer in layers for name in layer.paca_delta}
    known |= {name for wrapper in _wrappers(model) for name in wrapper._adapters}
    unknown = sorted(set(adapter_names) - known - {BASE})
    if unknown:
        raise ValueError(
            f"adapter_names holds {unknown[0]!r}, which is no loaded adapter. There are {', '.join(sorted(known))}, "
            f"and {BASE} for the base model."
        )
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        raise ValueError(
            f"adapter_names can't be given while {', '.join(merged)} is merged into the weights. Call "
            "unmerge_adapter() first."
        )
    rotated = sorted(set(adapter_names) & {name for layer in layers for name in layer.folded})
    if rotated:
        raise ValueError(
            f"adapter_names can't hold {rotated[0]!r}, whose columns were rotated: most of them are not at hand. Save "
            "the adapter, load the saved one under a name of its own (load_adapter), and give that."
        )
    return tuple(adapter_names)


def _wrappers(model: nn.Module) -> list[AuxiliaryTrainingWrapper]:
    return [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]


def _repeats(arguments: Mapping[str, Any]) -> int:
    """How often `generate(**arguments)` repeats each sample."""
    config = arguments.get("generation_config")
    counts = [arguments.get(key) or getattr(config, key, None) or 1 for key in ("num_beams", "num_return_sequences")]
    return max(counts)


def _pass_names(module: Any, args: Any, kwargs: Any = None) -> tuple[Any, dict[str, Any]] | None:
    """Tell a module that is trained whole which samples are whose; other threads' calls pass unchanged.

    They may come while the hook is put in or taken out, and torch then calls it without `kwargs`.
    """
    batch = current_mixed_batch(module)
    if batch is None:
        return None
    if not args:
        raise ValueError(
            "A module that is trained whole (modules_to_save) was called without a positional argument, so PEFT "
            "can't run a mixed batch (adapter_names) through it."
        )
    names = batch.names_of(len(args[0]))
    return args, {**kwargs, "adapter_names": [name if name in module._adapters else BASE for name in names]}
