"""Trains the runs of a comparison, one after the other, and shares them with whoever else works on the same folder."""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.text import Text

from paca.comparison.divergence import diverged
from paca.comparison.kept_rows import ROWS, KeptRows
from paca.comparison.method_result import why_failed
from paca.comparison.rows import SHARES, Row, row_of, write_rows
from paca.comparison.schedule import FAILED, Job, Outcome, Schedule, schedule
from paca.comparison.settings import Comparison
from paca.comparison.time_left import seconds_left
from paca.comparison.training_process import (
    PROGRAM,
    TrainingProcess,
    failure_of,
    forget_what_passes,
    how_to_try_again,
)
from paca.messages.disk import DiskError, says_full
from paca.messages.say import say
from paca.messages.units import format_duration
from paca.training.folder.run_folder import RunFolder

_LOOK_EVERY = 0.5  # seconds
_PLAIN_LINE_EVERY = 60.0


class Work:
    """The runs of a comparison, on disk and to be done."""

    def __init__(
        self,
        comparison: Comparison,
        steps: Mapping[str, int | None],
        console: Console,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        """Args:
        comparison: With its methods made equal.
        steps: How many a run of each method makes, where that is known.
        console: Where progress is shown.
        program: What runs `train CONFIG`.
        """
        self.comparison = comparison
        self.steps = steps
        self.console = console
        self.program = program
        self.took: dict[Job, float] = {}
        """Seconds of the processes of the runs that ended here; a row has those after its imports."""
        self.by_row: dict[Job, Row] = {}
        """Those whose folder is gone, and whose row is there."""
        self._rows: dict[Job, Row] = {}

    def schedule(self) -> Schedule:
        """What is needed by now."""
        c = self.comparison
        return schedule(c.grids(), c.seeds, self.outcome, extend=c.extend)

    def row(self, job: Job) -> Row | None:
        """Of a run that ended; None while it has not."""
        if job not in self._rows:
            folder = self.comparison.folder(job)
            row = row_of(folder, job.method, self.comparison.config_path(job))
            if row is None and not folder.path.is_dir():
                row = KeptRows(self.comparison.path / ROWS).row(job.name)
                if row is not None:
                    self.by_row[job] = row
            if row is None:
                return None
            self._rows[job] = row
        return self._rows[job]

    def outcome(self, job: Job) -> Outcome | None:
        """How a run did; None while it has not ended."""
        row = self.row(job)
        if row is None:
            return None
        if row["score"] is None:
            return FAILED
        # A policy's loss says nothing of its answers.
        loss = math.inf if row["loss"] is None or row["metric"] == "reward" else row["loss"]
        error = row["score_stderr"] if row["metric"] in SHARES else None
        return Outcome(row["score"] if row["lower_is_better"] else -row["score"], loss, error or 0.0)

    def rows(self) -> list[Row]:
        """Of all runs that ended and are needed."""
        return [row for job in self.schedule().jobs if (row := self.row(job)) is not None]

    def left_and_taken(self, plan: Schedule) -> tuple[dict[str, int], dict[str, list[float]]]:
        """For each method how many runs have not ended, and the seconds of those with a score."""
        left, taken = dict(plan.expected), {name: list[float]() for name in plan.expected}
        for job in plan.jobs:
            if (row := self.row(job)) is not None:
                left[job.method] -= 1
                if row["score"] is not None:
                    taken[job.method].append(self.took.get(job, row["run_info"]["total_time"]))
        return left, taken

    def told_of_time(self) -> str | None:
        """What finished runs took, and by that the others; None without any."""
        plan = self.schedule()
        left, taken = self.left_and_taken(plan)
        seconds = sorted(itertools.chain.from_iterable(taken.values()))
        if not seconds:
            return None
        took = " to ".join(dict.fromkeys(map(format_duration, (seconds[0], seconds[-1]))))
        told = f"{len(seconds)} of these runs are finished, which took {took} each"
        rest = seconds_left(left, taken, plan.jobs[0].method, 0.0, None)
        if not rest:
            return told
        return f"{told}; by that the others take {'at least' if plan.growing else 'about'} {format_duration(rest)}"

    def run(self) -> None:
        """Train what is needed until nothing is left, here or elsewhere.

        Raises:
            DiskError: A run found the disk full.
            KeyboardInterrupt: Ctrl-C; the run that was going on has saved a checkpoint.
        """
        told = None
        for path in self.comparison.runs.glob("*"):  # each call tries those once more
            forget_what_passes(RunFolder(path))
        self._rows.clear()
        self.rows()
        if self.by_row:
            kept = self.comparison.path / ROWS
            say(self.console, f"By their rows in {kept}, as their folders are gone: {names_of(self.by_row)}.")
        for row in self.rows():
            if row["train_info"]["status"] == "failed":
                again = how_to_try_again(RunFolder(self.comparison.runs / row["name"]))
                why = why_failed(row).rstrip(".")
                say(self.console, f"{row['name']} failed before, and is not tried again: {why}. {again}", "yellow")
        while todo := [job for job in self.schedule().jobs if self.outcome(job) is None]:
            if any(self._trained(job) for job in todo):
                self._write_rows()
                continue
            holder = self.comparison.claim(todo[0].name).holder()
            if holder != told:
                say(self.console, f"Waiting for {todo[0].name}, which {holder} trains ...")
                told = holder
            time.sleep(_LOOK_EVERY)
        self._write_rows()

    def _write_rows(self) -> None:
        path, rows = self.comparison.path / ROWS, self.rows()
        for folder in map(self.comparison.folder, self._rows):
            if folder.finished():  # its checkpoints were for going on with it, and take most of its space
                shutil.rmtree(folder.checkpoints, ignore_errors=True)
        with self.comparison.claim("rows") as claim:  # others add theirs
            claim.take(wait=True)
            # Runs that this call does not ask for, with other seeds or rates, stay: a row may be all that is left.
            write_rows(path, [*rows, *KeptRows(path).others(rows)])

    def _trained(self, job: Job) -> bool:
        """Train a run, unless another process does. Whether it has ended by now."""
        with self.comparison.claim(job.name) as claim:
            if not claim.take():
                return False
            if self.row(job) is not None:  # ended by another process since it was looked for
                return True
            if job.seed == self.comparison.seeds[0] and job.rate not in self.comparison.grids()[job.method]:
                why = f"the best rate of {job.method} so far is the lowest or the highest that was tried"
                say(self.console, f"{job.rate:g} is tried as well: {why} (--no-extend would leave it at that)")
            process = TrainingProcess(
                self.comparison.config_file(job), self.comparison.folder(job), claim, self.program
            )
            try:
                with _Progress(self, job, process) as progress:
                    while not process.ended(_LOOK_EVERY):
                        progress.show()
            except KeyboardInterrupt:
                say(self.console, f"Stopping {job.name} at the end of its step (Ctrl-C again stops at once) ...")
                process.stop()
                raise
            process.finish()
            self._stop_if_full(job)
            self.took[job] = time.monotonic() - progress.started
        self._say_end(job)
        return True

    def _stop_if_full(self, job: Job) -> None:
        """The next runs would find the disk full as well, each after a start of its own."""
        folder = self.comparison.folder(job)
        failure = failure_of(folder)
        if failure is not None and says_full(failure["error_msg"]):
            forget_what_passes(folder)  # so that others who share the work don't take it for a failure
            raise DiskError(
                f"{failure['error_msg'].rstrip('.')}. {job.name} stopped there, and no further run is begun. Make "
                "room; the same command goes on from what is saved."
            )

    def _say_end(self, job: Job) -> None:
        row = self.row(job)
        if row is None:  # stopped by a signal of its own, with a checkpoint; it is taken up again
            return
        if row["train_info"]["status"] == "failed":
            folder = self.comparison.folder(job)
            why, log = why_failed(row).rstrip("."), folder.path / "log.txt"
            again = "" if diverged(row) else f" {how_to_try_again(folder)}"
            say(self.console, f"{job.name} failed: {why} (all it said: {log}).{again}", "yellow")
        else:
            time_taken = format_duration(row["run_info"]["total_time"])
            say(self.console, f"{job.name}: {row['metric']} {_number(row['score'])} in {time_taken}")


class _Progress:
    """How far a run and the whole comparison are: a live line in a terminal, plain lines now and then elsewhere."""

    def __init__(self, work: Work, job: Job, process: TrainingProcess) -> None:
        self.work, self.job, self.process = work, job, process
        self.started = self.last_plain = time.monotonic()
        plan = work.schedule()
        self.left, self.taken = work.left_and_taken(plan)
        self.growing, expected = plan.growing, sum(plan.expected.values())
        count = f"{'at least ' if self.growing else ''}{expected}"
        self.heading = f"run {expected - sum(self.left.values()) + 1} of {count}: {job.name}"
        self.last_line = self.heading
        self.live: Live | None = None
        self.before: float | None = None
        """Seconds until its first step, for the scores before training above all; those after it take about as long."""

    def __enter__(self) -> _Progress:
        if self.work.console.is_terminal:
            self.live = Live(Text(self.heading), console=self.work.console, refresh_per_second=4, transient=True)
            self.live.start()
        else:
            say(self.work.console, "  ".join([self.heading, *self._time_left(0.0)]) + " ...")
        return self

    def show(self) -> None:
        """Bring the line up to date."""
        now = time.monotonic()
        if self.live is not None:
            self.live.update(Text(self._line(now), no_wrap=True, overflow="ellipsis"))
        elif now - self.last_plain > _PLAIN_LINE_EVERY:
            self.last_plain = now
            if (line := self._line(now)) != self.last_line:  # it stays the same while held-out data is scored
                say(self.work.console, line)
            self.last_line = line

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def _line(self, now: float) -> str:
        parts, current = [self.heading], None
        total = self.work.steps.get(self.job.method)
        step = self.process.step()
        if step is not None:
            parts.append(f"step {step[0]}" + (f"/{total}" if total else ""))
            if self.before is None:
                self.before = max(0.0, now - self.started - step[1])
            if total:
                current = step[1] / step[0] * total + 2 * self.before
        return "  ".join([*parts, *self._time_left(now - self.started, current)])

    def _time_left(self, elapsed: float, expected: float | None = None) -> list[str]:
        left = seconds_left(self.left, self.taken, self.job.method, elapsed, expected)
        return [] if left is None else [f"{'at least' if self.growing else 'about'} {format_duration(left)} left"]


def names_of(jobs: Iterable[Job]) -> str:
    """Of runs, in words."""
    return ", ".join(job.name for job in jobs)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
