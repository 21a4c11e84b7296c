"""A KeyboardInterrupt at a chosen line of paca's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import peft

import paca

_FOLDERS = (str(Path(paca.__file__).parent), str(Path(peft.__file__).parent))
_IGNORED = {"forget", "<lambda>"}  # called back by the garbage collector, where Python drops exceptions


class Interrupted:
    """Whether it came, and where."""

    where: str | None = None


@contextmanager
def interrupted_at(line: int) -> Iterator[Interrupted]:
    """Raise KeyboardInterrupt before the `line`-th line of paca or PEFT that runs within; goes on after the block."""
    report, left = Interrupted(), line

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        code = frame.f_code
        if not code.co_filename.startswith(_FOLDERS) or code.co_name in _IGNORED:
            return None
        if event == "line":
            left -= 1
            if left <= 0 and report.where is None:
                report.where = f"{code.co_filename.rpartition('site-packages/')[2]}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield report
    except KeyboardInterrupt:
        if report.where is None:
            raise
    finally:
        sys.settrace(before)
