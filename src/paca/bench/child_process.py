"""Starting, asking and watching the process that runs one method."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from types import TracebackType
from typing import Any

import psutil

from paca.bench.settings import BenchSettings, Point

_WATCH_PERIOD = 0.005  # seconds


class ChildFailed(Exception):
    """The child could not measure; the text says why."""


class MeasuringChild:
    """One method in a process of its own.

    Args:
        settings: With `settings.memory`, the process is stopped as soon as it holds more than that above its libraries.
        method: Name of the method.

    Raises:
        ChildFailed: The model could not be made, or the process ended before it was ready.
    """

    def __init__(self, settings: BenchSettings, method: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "paca.bench.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._over_budget = False
        ready = self._ask({"settings": asdict(settings), "method": method})
        if "failed" in ready:
            self.close()
            raise ChildFailed(ready["failed"])
        self.libraries: int = ready["libraries"]
        """Bytes before the model was made."""
        self.weights: int = ready["weights"]
        """Bytes with the model, before the method changed it."""
        self.source: str = ready["source"]
        """What counted the bytes."""
        if settings.memory is not None and settings.torch_device.type != "cuda":
            limit = self.libraries + settings.memory
            threading.Thread(target=self._watch, args=(limit,), daemon=True).start()

    def run(self, point: Point) -> dict[str, Any]:
        """Run two steps of this size: `fits`, `peak` in bytes or None, `reason`.

        Raises:
            ChildFailed: The process ended, for another reason than its budget.
        """
        try:
            return self._ask(point._asdict())
        except ChildFailed:
            if not self._over_budget:
                raise
            return {"fits": False, "peak": None, "reason": "over the budget"}

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def __enter__(self) -> MeasuringChild:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it is gone, as the empty answer will show
        line = process.stdout.readline()
        if not line:
            status = process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            how = "was killed, most likely because the machine ran out of memory" if status == -9 else "failed"
            raise ChildFailed(
                f"the measuring process {how} (exit status {status}): {said[-1] if said else 'no message'}"
            )
        return json.loads(line)

    def _watch(self, limit: int) -> None:
        stop = threading.Event()
        try:
            watched = psutil.Process(self._process.pid)
            while not stop.wait(_WATCH_PERIOD):
                if watched.memory_info().rss > limit:
                    self._over_budget = True
                    watched.kill()
                    return
        except psutil.NoSuchProcess:
            return
