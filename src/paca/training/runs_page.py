"""The runs of a folder on one local page: Trackio's, filled from what each run writes, also while it goes."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from paca.messages.errors import PacaError
from paca.training.metrics import read_rows
from paca.training.tracking import ANSWERS, answers_of, figures_of, results_of

_DEEPEST = 3  # below the folder: a comparison keeps its runs two folders down


def show_runs(folder: Path, *, port: int | None, say: Callable[[str], None], browser: bool) -> None:
    """Serve the page until Ctrl-C. Trackio's own data of this user is left alone.

    Args:
        folder: Of a run, or of runs.
        port: Of the page; the first free one from 7860 when None.
        say: Shows the user a line.
        browser: Open the page in the user's browser.

    Raises:
        PacaError: There are no runs, or Trackio is not installed.
    """
    if find_spec("trackio") is None:
        raise PacaError(
            'paca runs needs trackio. Install paca\'s extra of that name, as in pip install "./paca[trackio]", or: pip '
            "install trackio"
        )
    found = find_runs(folder)
    if not found:
        raise PacaError(f"There are no runs in {folder}: no metrics.jsonl in it, nor in its folders. Give another one.")
    with tempfile.TemporaryDirectory() as place:
        os.environ["TRACKIO_DIR"] = place  # before its import, which reads it
        import trackio

        page = _Page(folder, trackio)
        page.update()
        with _quiet():
            served = trackio.show(page.project, open_browser=browser, block_thread=False, share=False, server_port=port)
        say(f"{len(found)} runs: {served[1].rstrip('/')}/?project={page.project} (Ctrl-C ends it)")
        try:
            while True:
                time.sleep(2)
                page.update()
        except KeyboardInterrupt:
            served[0].close()


def find_runs(folder: Path) -> list[Path]:
    """The folders of runs in `folder`, itself among them."""
    depths = ("/".join(["*"] * depth + ["metrics.jsonl"]) for depth in range(_DEEPEST + 1))
    return sorted(file.parent for pattern in depths for file in folder.glob(pattern))


class _Page:
    """What the page shows of each run so far."""

    def __init__(self, folder: Path, trackio: Any) -> None:
        self.folder = folder
        self.trackio = trackio
        self.project = "".join(c if c.isalnum() else "-" for c in folder.resolve().name) or "runs"
        self.shown: dict[Path, set[tuple[int, bool]]] = {}
        self.finished: set[Path] = set()

    def update(self) -> None:
        """Add what the runs have written since."""
        for run in find_runs(self.folder):
            shown = self.shown.setdefault(run, set())
            rows = [row for row in read_rows(run / "metrics.jsonl") if _key(row) not in shown]
            summary = _read(run / "summary.json") if run not in self.finished else {}
            if not rows and not summary:
                continue
            with _quiet():
                log = self.trackio.init(
                    project=self.project,
                    name=str(run.relative_to(self.folder)) if run != self.folder else run.resolve().name,
                    config=_settings(run),
                    resume="allow",
                    embed=False,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                )
                for row in rows:
                    log.log(_named(row), step=row["step"])
                if summary:
                    log.log(_named(results_of(summary)), step=summary["steps"])
                    if answers := answers_of(summary["scores"] or {}):
                        table = self.trackio.Table(columns=list(ANSWERS), data=answers)
                        log.log({"eval/answers": table}, step=summary["steps"])
                    self.finished.add(run)
                log.finish()
            shown.update(map(_key, rows))


def _key(row: dict[str, Any]) -> tuple[int, bool]:
    """A run that is resumed writes some steps again, with the same values."""
    return row["step"], "eval_loss" in row


def _named(row: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a row by the names that trackers know them by."""
    known = {name: value for name, value in row.items() if value is not None and name not in ("step", "seconds")}
    if "peak_memory_bytes" in known:
        known = {**known, **figures_of(row)}
        del known["peak_memory_bytes"]
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in known.items()
    }


def _settings(run: Path) -> dict[str, Any]:
    """The settings of a run, each by its dotted key."""
    file = run / "config.yaml"
    sections = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in (values or {}).items()}


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Trackio prints a line for each run that is opened and closed."""
    with redirect_stdout(StringIO()):
        yield
