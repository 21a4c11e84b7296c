"""Memory and time of training, before anything is loaded."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paca.planning.fitting import Candidate, Fit, fit, step_seconds
    from paca.planning.memory_estimate import MemoryEstimate, estimate
    from paca.planning.setting import Setting

__all__ = ["Candidate", "Fit", "MemoryEstimate", "Setting", "estimate", "fit", "step_seconds"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: it imports torch and transformers, which a misspelt device should not have to wait for.
    if name in __all__:
        return getattr(import_module("paca.planning.fitting"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
