"""What no command shows: notes from one library to another."""

from __future__ import annotations

import logging
import warnings

_NOTES = ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops")
"""Loggers that tell, while their library is imported, which kernels of other machines it does without."""


def hide_library_notes() -> None:
    """Hide warnings about the next releases of libraries; nothing a user of a command can act on."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in _NOTES:
        logging.getLogger(name).setLevel(logging.ERROR)
