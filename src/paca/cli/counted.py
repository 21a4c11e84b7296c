"""How many of a model's answers are there already, for people who wait."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from paca.messages.say import say
from paca.messages.units import format_duration

_SECONDS_BETWEEN_LINES = 60.0


class Counted:
    """A progress line in a terminal; in a log file a line at both ends of each work, and one about each minute.

    Both tell the time left. What rich tells goes by the last half minute, and a batch may take longer.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._done = self._total = 0
        self._at_a_time = 1
        self._who = self._what = ""
        self._began = self._told = 0.0

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *error: object) -> None:
        self.finish()

    def begin(self, who: str, what: str, total: int, at_a_time: int = 1) -> None:
        """Show new work in place of the old."""
        self.finish()
        self._who, self._what, self._done, self._total, self._at_a_time = who, what, 0, total, at_a_time
        self._began = self._told = time.monotonic()
        if not self._console.is_terminal:
            self._say_count()
            return
        label = TextColumn("{task.description}", markup=False)
        columns = (label, BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[time]}"))
        self._progress = Progress(*columns, console=self._console)
        self._progress.add_task(f"{who}: {what}", total=total, time="")
        self._progress.start()

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], advance=1, time=self._time())
        elif self._done == self._total or (self._done < self._total and self._line_is_due()):
            self._told = time.monotonic()
            self._say_count()
        if self._done == self._total:
            self.finish()

    def _line_is_due(self) -> bool:
        # A batch's answers come one right after another: all that it took time for are there with the last.
        return self._done % self._at_a_time == 0 and time.monotonic() - self._told > _SECONDS_BETWEEN_LINES

    def _time(self) -> str:
        taken = time.monotonic() - self._began
        if self._done >= self._total:
            return f"in {format_duration(taken)}"
        return f"{format_duration(taken / self._done * (self._total - self._done))} left"

    def _say_count(self) -> None:
        time_of_it = f", {self._time()}" if self._done else ""
        say(self._console, f"{self._who}: {self._done:,} of {self._total:,} {self._what}{time_of_it}")

    def finish(self) -> None:
        """Leave the line as it stands."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
