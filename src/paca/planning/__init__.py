"""Memory and time of training, before anything is loaded."""

from paca.planning.budget import available_memory, longest_batch, warn_if_too_large
from paca.planning.estimate import MemoryEstimate, estimate
from paca.planning.fit import Candidate, Fit, fit, step_seconds
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
