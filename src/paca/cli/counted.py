"""How many of a model's answers are there already, for people who wait."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from paca.messages.say import say

_SECONDS_BETWEEN_LINES = 60.0


class Counted:
    """A progress line in a terminal; in a log file a line at both ends of each work, and one about each minute."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._done = self._total = 0
        self._who = self._what = ""
        self._told = 0.0

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *error: object) -> None:
        self.finish()

    def begin(self, who: str, what: str, total: int) -> None:
        """Show new work in place of the old."""
        self.finish()
        self._who, self._what, self._done, self._total, self._told = who, what, 0, total, time.monotonic()
        if not self._console.is_terminal:
            self._say_count()
            return
        label = TextColumn("{task.description}", markup=False)
        columns = (label, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self._console)
        self._progress.add_task(f"{who}: {what}", total=total)
        self._progress.start()

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        if self._progress is not None:
            self._progress.advance(self._progress.task_ids[0])
        elif self._done == self._total or (self._done < self._total and self._line_is_due()):
            self._told = time.monotonic()
            self._say_count()
        if self._done == self._total:
            self.finish()

    def _line_is_due(self) -> bool:
        return time.monotonic() - self._told > _SECONDS_BETWEEN_LINES

    def _say_count(self) -> None:
        say(self._console, f"{self._who}: {self._done:,} of {self._total:,} {self._what}")

    def finish(self) -> None:
        """Leave the line as it stands."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
