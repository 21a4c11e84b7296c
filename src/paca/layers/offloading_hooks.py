"""What accelerate's hooks on a module say: whether its weight is elsewhere between passes, and where it runs."""

from __future__ import annotations

from typing import Any

from torch import nn


def has_offloaded_params(module: nn.Module) -> bool:
    """As accelerate's, and of a module with several hooks, as `cpu_offload` gives one that it is called with itself."""
    return any(getattr(hook, "offload", False) for hook in _hooks_of(module))


def execution_device(module: nn.Module) -> Any:
    """Where a module runs; None if no hook says it."""
    devices = (getattr(hook, "execution_device", None) for hook in _hooks_of(module))
    return next((device for device in devices if device is not None), None)


def _hooks_of(module: nn.Module) -> tuple[Any, ...]:
    hook = getattr(module, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", (hook,)))  # of a SequentialHook
