"""Mixed batches through torch's own transformer encoders, which may read their layers' weights without calling them.

In evaluation mode `nn.TransformerEncoderLayer` runs as one fused operator, unless it has hooks; and above such layers
`nn.TransformerEncoder` packs padded samples into a nested tensor, which only that operator takes.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class CallEveryLayer:
    """A forward pre-hook that does nothing: a module that has it does not take its fast path."""

    def __init__(self, module: nn.Module) -> None:
        self.nested = vars(module).get("use_nested_tensor", False)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        pass


def _hook_of(module: nn.Module) -> tuple[int, CallEveryLayer] | None:
    hooks = list(module._forward_pre_hooks.items())
    return next(((key, hook) for key, hook in hooks if isinstance(hook, CallEveryLayer)), None)


def _encoders(model: nn.Module) -> list[nn.TransformerEncoder | nn.TransformerEncoderLayer]:
    return [m for m in model.modules() if isinstance(m, (nn.TransformerEncoder, nn.TransformerEncoderLayer))]


def call_every_layer(model: nn.Module) -> None:
    """Let the encoders in `model` call their layers, as they do while they are trained."""
    for encoder in _encoders(model):
        if _hook_of(encoder) is None:
            hook = CallEveryLayer(encoder)
            encoder.register_forward_pre_hook(hook)
            if hook.nested:
                encoder.use_nested_tensor = False


def allow_fast_paths(model: nn.Module) -> None:
    """Undo `call_every_layer`, also where Ctrl-C ended it."""
    for encoder in _encoders(model):
        found = _hook_of(encoder)
        if found is not None:
            key, hook = found
            if hook.nested:
                encoder.use_nested_tensor = True
            del encoder._forward_pre_hooks[key]
