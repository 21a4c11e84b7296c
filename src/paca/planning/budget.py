"""Amounts of memory: as people write them, and as the device has them."""

from __future__ import annotations

import re

import torch

from paca.messages.errors import PacaError

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_memory(text: str) -> int:
    """`"24GiB"`, `"24 GB"` or `"500MiB"` in bytes; a unit's B may be left out.

    Raises:
        PacaError: the text is no positive amount of memory.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    count = 0 if match is None else int(float(match[1]) * (_UNITS | _BINARY_UNITS)[match[2] or ""])
    if count <= 0:
        raise PacaError(f"{text!r} is no amount of memory. Give a number and a unit, such as 24GiB or 80GB.")
    return count


def available_memory(device: str) -> int:
    """Bytes that this process could use on `device`: free memory of the GPU, or what the system has available.

    Raises:
        PacaError: `device` is `"cuda"` and there is none.
    """
    if device == "cuda":
        if not torch.cuda.is_available():
            raise PacaError("There is no CUDA device here; say how much memory to plan for (--memory 24GiB).")
        return torch.cuda.mem_get_info()[0]
    import psutil

    own = psutil.Process().memory_info().rss  # the estimate counts the libraries of a process
    return psutil.virtual_memory().available + own
