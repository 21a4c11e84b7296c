"""Two runs, or a run and its base model, answer one prompt side by side."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from paca.messages.errors import PacaError
from paca.pretrained.conversation import answering, opening, speaker, told_of_system, unknown_form
from paca.pretrained.generation import stream_reply
from paca.pretrained.in_turn import ModelsInTurn
from paca.training.folder.found_runs import find_answering, name_in, state_of

logger = logging.getLogger(__name__)

BASE = "the base model of the other side, without adapter"
"""The name that stands for the model that the other side's adapter was trained on."""


class Shown(NamedTuple):
    """One side, so far."""

    answer: str = ""
    note: str = ""
    """Who answers, how far it is, or why there is no answer."""


class SideBySide:
    """Answers prompts by the runs and adapters of a folder, one side after the other: they share what they can."""

    def __init__(self, folder: Path) -> None:
        """Args:
        folder: Of runs, of adapters, or of one.
        """
        self.folder = folder
        self._models = ModelsInTurn()
        self._answering = threading.Lock()
        self._stopped = threading.Event()

    def choices(self) -> list[tuple[str, str]]:
        """What can be chosen: how it is shown, and its name. The newest first, those that can't answer yet last."""
        found = [(name_in(self.folder, path), state_of(path)) for path in find_answering(self.folder)]
        found.sort(key=lambda one: one[1] is not None)
        return [(name if state is None else f"{name} ({state})", name) for name, state in found]

    def stop(self) -> None:
        """End the answers that are being given."""
        self._stopped.set()

    def answers(
        self, left: str, right: str, prompt: str, *, system: str | None, max_new_tokens: int, temperature: float
    ) -> Iterator[tuple[Shown, Shown]]:
        """Both sides as they grow, first the left one. What goes wrong with a side is its note.

        Args:
            left, right: Names of `choices`, or `BASE` for one of them.
            prompt: What is asked.
            system: The system message; empty for none. None: the one that all training data of a side began with.
            max_new_tokens: Longest answer, in tokens.
            temperature: As of `stream_reply`.
        """
        if not self._answering.acquire(blocking=False):
            yield Shown(note="Another prompt is being answered. Wait for its end, or stop it."), Shown()
            return
        shown = [Shown(), Shown()]
        try:
            self._stopped.clear()
            for side, (name, other) in enumerate(((left, right), (right, left))):
                try:
                    for one in self._side(name, other, prompt, system, max_new_tokens, temperature):
                        shown[side] = one
                        yield shown[0], shown[1]
                except Exception as error:
                    if not isinstance(error, PacaError):
                        logger.exception("No answer from %s.", name)
                    reason = str(error) if isinstance(error, PacaError) else f"{type(error).__name__}: {error}"
                    shown[side] = Shown(shown[side].answer, f"No answer: {reason}")
                    yield shown[0], shown[1]
        finally:
            self._answering.release()

    def _side(
        self, name: str, other: str, prompt: str, system: str | None, max_new_tokens: int, temperature: float
    ) -> Iterator[Shown]:
        base = name == BASE
        if self._stopped.is_set():
            yield Shown(note="Stopped.")
            return
        yield Shown(note="Loading ...")
        path = self._path(other if base else name)
        try:
            loaded = self._models.load(path, beside=None if other == BASE else self._path(other))
        except PacaError as error:
            raise PacaError(
                f"The base model is loaded with the adapter of the other side. {error}" if base else str(error)
            ) from error
        who = speaker(loaded, base)
        for remark in (unknown_form(loaded, base), told_of_system(loaded, system)):
            who += "" if remark is None else f". {remark}"
        messages = [*opening(loaded, system), {"role": "user", "content": prompt}]
        answer = ""
        yield Shown(note=f"{who} ...")
        with answering(loaded, base):
            for piece in stream_reply(loaded, messages, max_new_tokens=max_new_tokens, temperature=temperature):
                answer += piece
                yield Shown(answer, f"{who} ...")
                if self._stopped.is_set():
                    yield Shown(answer, f"{who} (stopped)")
                    return
        yield Shown(answer, who)

    def _path(self, name: str) -> Path:
        if name == BASE:
            raise PacaError("Both sides are the base model of the other. Choose a run or an adapter for one of them.")
        for path in find_answering(self.folder):
            if name_in(self.folder, path) == name:
                return path
        raise PacaError(f"There is no {name!r} in {self.folder} any more. Open the page again.")
