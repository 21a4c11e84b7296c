"""One file per kind of layer, above a base class with the PEFT bookkeeping."""

from paca.layers.base import PacaLayer
from paca.layers.linear import RESIDENT_CLASSES, PacaLinear

__all__ = ["RESIDENT_CLASSES", "PacaLayer", "PacaLinear"]
