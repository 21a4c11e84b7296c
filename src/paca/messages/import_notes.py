"""Notes of libraries while they are imported, about what paca's user neither asked for nor misses."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_NOTES = {
    "torchao": r"Failed to load \S*/_C_(cutlass|mxfp8)",
    "torch.utils._pytree": r".* is an Enum subclass and is now natively supported",
    "torch.utils.cpp_extension": r"No CUDA runtime is found",
    "bitsandbytes.backends.cpu.ops": r"Failed to load CPU gemm_4bit_forward",
    "kernels._internals.hf_hub": r"Skipping publisher trust check",
}
"""By logger: the kernels for CUDA that torchao brings, torchao's way to register its types with torch, a compiler for
CUDA where there is no such device, and an optional kernel that bitsandbytes looks for on CPUs, which it may neither
fetch nor check without the hub."""
NOTING = tuple(_NOTES)
"""The loggers that leave such notes."""


@contextmanager
def hold_import_notes() -> Iterator[None]:
    """Pass these notes on to the logger `paca`, at level INFO, instead of printing them as warnings.

    PEFT and transformers import torchao and bitsandbytes wherever they are installed, whether they are used or not.
    That CUDA's kernels do not load is held back only where torch was built without CUDA. Any other warning is shown.
    """
    loggers = [logging.getLogger(name) for name in NOTING]
    for logger in loggers:
        logger.addFilter(_is_no_note)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_no_note)


def _is_no_note(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    if not re.match(_NOTES[record.name], message) or (record.name == "torchao" and sys.modules["torch"].version.cuda):
        return True
    logging.getLogger("paca").info("%s, while it was imported: %s", record.name, message)
    return False
