"""A KeyboardInterrupt at a chosen line of paca's."""

from __future__ import annotations

import sys
from collections.abc import Container
from pathlib import Path
from types import FrameType
from typing import Any

import peft

import paca
from paca.columns.resident import WRITING

FOLDERS = (str(Path(paca.__file__).parent), str(Path(peft.__file__).parent))
_IGNORED = {"forget", "<lambda>"}  # called back by the garbage collector, where Python drops exceptions


class interrupted_at:
    """Raise KeyboardInterrupt before the `line`-th line of paca or PEFT that runs within; goes on after the block.

    Args:
        functions: Count only lines of functions of these names.
        folders: Of the files whose lines count.
    """

    where: str | None = None
    """Whether it came, and where."""

    def __init__(self, line: int, functions: Container[str] | None = None, folders: tuple[str, ...] = FOLDERS) -> None:
        self.left, self.functions, self.folders = line, functions, folders

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(self.folders) or code.co_name in _IGNORED:
            return None
        if self.functions is not None and code.co_name not in self.functions:
            return None
        if event == "line":
            self.left -= 1
            if self.left <= 0 and self.where is None:
                self.where = f"{code.co_filename.rpartition('site-packages/')[2]}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._trace

    def __enter__(self) -> interrupted_at:
        self.before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> bool:
        sys.settrace(self.before)
        while WRITING._is_owned():  # a line event comes before the exit of a `with` block too, where no signal can
            WRITING.release()
        return kind is KeyboardInterrupt and self.where is not None
