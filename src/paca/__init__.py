"""PaCA, Partial Connection Adaptation: fine-tune at the speed and memory of the frozen model.

Importing this package makes PaCA a method that PEFT knows::

    import paca, peft
    model = peft.get_peft_model(model, paca.PacaConfig(r=16))

The import itself is light: torch, transformers and PEFT are loaded with the first name that needs them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from paca.messages.errors import PacaError
from paca.peft_import import when_peft_is_imported

if TYPE_CHECKING:
    from paca.config import PacaConfig
    from paca.lean import make_lean, undo_lean
    from paca.tuner.calibration import select
    from paca.tuner.entry import refresh
    from paca.tuner.hotswap import hotswap_adapter
    from paca.tuner.model import PacaModel
    from paca.tuner.rotation.callback import RotateColumns
    from paca.tuner.rotation.rotate import rotate, set_trained_columns, trained_columns
    from paca.tuner.tied_weights import untie_embeddings

__version__ = version("paca-tuning")
__all__ = [
    "PacaConfig",
    "PacaError",
    "PacaModel",
    "RotateColumns",
    "hotswap_adapter",
    "make_lean",
    "refresh",
    "rotate",
    "select",
    "set_trained_columns",
    "trained_columns",
    "undo_lean",
    "untie_embeddings",
]

_MODULES = {
    "PacaConfig": "paca.config",
    "PacaModel": "paca.tuner.model",
    "RotateColumns": "paca.tuner.rotation.callback",
    "hotswap_adapter": "paca.tuner.hotswap",
    "make_lean": "paca.lean",
    "refresh": "paca.tuner.entry",
    "rotate": "paca.tuner.rotation.rotate",
    "select": "paca.tuner.calibration",
    "set_trained_columns": "paca.tuner.rotation.rotate",
    "trained_columns": "paca.tuner.rotation.rotate",
    "undo_lean": "paca.lean",
    "untie_embeddings": "paca.tuner.tied_weights",
}
"""Where each name that is loaded on first use lies."""


def _register() -> None:
    from paca.tuner.registration import register

    # These two alone: the others need more of transformers, whose import may have led here and is not done then.
    register(_load("PacaConfig"), _load("PacaModel"))


def _load(name: str) -> Any:
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("peft")  # which registers
    return globals().get(name) or _load(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps ``paca.refresh`` the function: the import system would set it to the submodule of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _MODULES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


when_peft_is_imported(_register)
