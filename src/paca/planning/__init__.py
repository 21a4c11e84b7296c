"""Memory and time of training, before anything is loaded."""

from paca.planning.budget import available_memory, warn_if_too_large
from paca.planning.device_rates import (
    DequantizeRate,
    MatmulRate,
    fixed_rate,
    given_bandwidth,
    measure_dequantize_rate,
    measure_rate,
)
from paca.planning.estimate import MemoryEstimate, estimate
from paca.planning.fit import Candidate, Fit, fit, step_seconds
from paca.planning.probe import longest_batch
from paca.planning.setting import Setting

__all__ = [
    "Candidate",
    "DequantizeRate",
    "Fit",
    "MatmulRate",
    "MemoryEstimate",
    "Setting",
    "available_memory",
    "estimate",
    "fit",
    "fixed_rate",
    "given_bandwidth",
    "longest_batch",
    "measure_dequantize_rate",
    "measure_rate",
    "step_seconds",
    "warn_if_too_large",
]
