"""Which module is running, and of what kind it is: whose activations they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import transformers.activations
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from transformers.pytorch_utils import Conv1D

LINEAR = "linear layers"
ATTENTION = "attention"
MLP = "MLP"
NORM = "norms"
RESIDUAL = "residual stream"

_ACTIVATION_FILES = (nn.SiLU.__module__, transformers.activations.__name__)


def _own_kind(module: nn.Module) -> str | None:
    """The kind that the module's class speaks for; None if only what it is in can tell."""
    name = type(module).__name__.lower()
    if isinstance(module, (BaseTunerLayer, nn.Linear, Conv1D, nn.Conv2d)):
        return LINEAR
    if "norm" in name:
        return NORM
    if "attention" in name or "attn" in name or "rotary" in name:
        return ATTENTION
    if any(word in name for word in ("mlp", "feedforward", "expert")) or type(module).__module__ in _ACTIVATION_FILES:
        return MLP
    return None


class ModuleStack:
    """The modules that are running, outermost first."""

    def __init__(self) -> None:
        self.running: list[nn.Module] = []

    def kind(self) -> str:
        """The kind of the innermost running module that has one."""
        return next(filter(None, map(_own_kind, reversed(self.running))), RESIDUAL)

    @contextmanager
    def following(self, after: Callable[[nn.Module, Any], None]) -> Iterator[None]:
        """Keep `running` up to date, and call `after(module, output)` when a module's forward has ended."""

        def enter(module: nn.Module, args: Any) -> None:
            self.running.append(module)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            assert self.running.pop() is module
            after(module, output)

        handles = (register_module_forward_pre_hook(enter), register_module_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.running.clear()
