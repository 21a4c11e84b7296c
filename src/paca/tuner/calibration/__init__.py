"""Choosing columns by what calibration batches show of a model, which is left as it was."""

from paca.tuner.calibration.selecting import select

__all__ = ["select"]
