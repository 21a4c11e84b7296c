"""The runs of a folder on one local page.

Its curves are Trackio's page, filled from what each run writes, also while it goes; beside them two runs answer.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from paca.messages.errors import PacaError
from paca.messages.shown import shown
from paca.training.config.strict_yaml import read_yaml
from paca.training.folder.found_runs import find_runs, name_in, runs_to_show
from paca.training.reporting.answers import SideBySide
from paca.training.reporting.metrics import read_rows
from paca.training.reporting.tracking import ANSWERS, answers_of, figures_of, results_of

logger = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_PORTS = range(7860, 7960)
_PAGE = "/paca"  # Trackio's own page takes it that it lies at the root


def show_runs(folder: Path, *, port: int | None, say: Callable[[str], None], browser: bool) -> None:
    """Serve the page until Ctrl-C. Trackio's own data of this user is left alone.

    Args:
        folder: Of a run, or of runs.
        port: Of the page, on this machine's own address; the first free one from 7860 when None.
        say: Shows the user a line.
        browser: Open the page in the user's browser.

    Raises:
        PacaError: There are no runs, the port is taken, or Trackio or Gradio is not installed.
    """
    found = runs_to_show(folder)
    listening = _listen(port)
    with tempfile.TemporaryDirectory() as place:
        os.environ["TRACKIO_DIR"] = place  # before its import, which reads it
        import trackio

        page = _Page(folder, trackio)
        page.update()
        server, serving = _serve(folder, page.project, listening)
        address = f"http://{_HOST}:{listening.getsockname()[1]}{_PAGE}/"
        say(f"{len(found)} runs: {address} (Ctrl-C ends it)")
        if browser:
            webbrowser.open(address)
        try:
            while not server.should_exit:
                time.sleep(2)
                page.update()
        except KeyboardInterrupt:
            server.should_exit = True
            serving.join(timeout=10)  # a thread at work while Python ends can crash it
        else:
            raise PacaError("The page can't be served; the server's message is above.")


def _listen(port: int | None) -> socket.socket:
    """A socket that waits for browsers of this machine."""
    for one in _PORTS if port is None else [port]:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((_HOST, one))
            listening.listen()
        except OSError:
            listening.close()
        else:
            return listening
    taken = f"Port {port} is" if port is not None else f"All ports from {_PORTS[0]} to {_PORTS[-1]} are"
    raise PacaError(f"{taken} taken. Give another: --port NUMBER")


def _serve(folder: Path, project: str, listening: socket.socket) -> tuple[Any, threading.Thread]:
    """Serve the page from a thread that ends with the program. Returns the server and the thread."""
    import gradio
    import uvicorn
    from fastapi import FastAPI
    from trackio.server import make_trackio_server

    from paca.training.reporting.answers_page import page_of

    app = FastAPI()
    page = page_of(SideBySide(folder), f"/?project={project}")
    gradio.mount_gradio_app(app, page, path=_PAGE, footer_links=[], run_history=False, ssr_mode=False, pwa=False)
    with _quiet():
        app.mount("/", make_trackio_server().app)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    serving = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    serving.start()
    return server, serving


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
            try:
                rows = [row for row in read_rows(run / "metrics.jsonl") if _key(row) not in shown]
                summary = _read(run / "summary.json") if run not in self.finished else {}
                settings = _settings(run)
                steps = [(_named(row), row["step"]) for row in rows]
                results = (_named(results_of(summary)), summary["steps"]) if summary else None
                answers = answers_of(summary["scores"] or {}) if summary else []
            except Exception as error:  # it was removed, is begun anew, or is somebody else's; the others are shown
                logger.debug("%s can't be read: %r", run, error)
                continue
            if not steps and results is None:
                continue
            with _quiet():
                log = self.trackio.init(
                    project=self.project,
                    name=name_in(self.folder, run),
                    config=settings,
                    resume="allow",
                    embed=False,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                )
                for values, step in [*steps, *([] if results is None else [results])]:
                    log.log(values, step=step)
                if results is not None:
                    if answers:
                        table = self.trackio.Table(columns=list(ANSWERS), data=answers)
                        log.log({"eval/answers": table}, step=results[1])
                    self.finished.add(run)
                self.trackio.finish()  # not the run's own, after which Trackio ends it once more, aloud
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
    sections = read_yaml(file)[0] if file.is_file() else {}
    found = {f"{section}.{key}": value for section, values in sections.items() for key, value in (values or {}).items()}
    # A list may repeat another one by its name, and grow beyond all bounds where it is written out.
    return {key: shown(value) if isinstance(value, (list, dict)) else value for key, value in found.items()}


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Trackio prints a line for each run that is opened and closed."""
    with redirect_stdout(StringIO()):
        yield
