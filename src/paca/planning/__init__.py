"""Memory and time of training, before anything is loaded."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paca.planning.budget import available_memory, longest_batch, warn_if_too_large
    from paca.planning.fitting import Candidate, Fit, fit, step_seconds
    from paca.planning.memory_estimate import MemoryEstimate, estimate
    from paca.planning.setting import Setting

__all__ = [
    "Candidate",
    "Fit",
    "MemoryEstimate",
    "Setting",
    "available_memory",
    "estimate",
    "fit",
    "longest_batch",
    "step_seconds",
    "warn_if_too_large",
]
_PLACES = {
    **dict.fromkeys(("available_memory", "longest_batch", "warn_if_too_large"), "budget"),
    **dict.fromkeys(("Candidate", "Fit", "fit", "step_seconds"), "fitting"),
    **dict.fromkeys(("MemoryEstimate", "estimate"), "memory_estimate"),
    "Setting": "setting",
}


def __getattr__(name: str) -> Any:
    # Loaded on first use: they import torch and transformers, which a misspelt device should not have to wait for.
    if name in _PLACES:
        return getattr(import_module(f"paca.planning.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
