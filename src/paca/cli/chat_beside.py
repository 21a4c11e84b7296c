"""`paca chat --beside`: two adapters, or an adapter and its base model, answer every line side by side."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from paca.messages.shown import without_controls
from paca.pretrained.conversation import answering, check_tools, opening, told_of_system, unknown_form
from paca.pretrained.generation import Message, stream_reply
from paca.pretrained.hub_adapter import adapter_of_hub
from paca.pretrained.in_turn import ModelsInTurn


class SideBySide:
    """Two conversations with the same questions. Adapters of one base model share it in memory."""

    def __init__(self, path: str, other: str, system: str | None, console: Console, **sampling: Any) -> None:
        self.system, self.console, self.sampling = system, console, sampling
        self.sides = ((path, False), (path, True) if other == "base" else (other, False))
        self._places = [str(adapter_of_hub(name) or name) for name, _ in self.sides]
        self._models = ModelsInTurn()
        self.titles: list[str] = []
        told: dict[str, str | None] = {}
        for side, (name, base) in enumerate(self.sides):
            loaded = self._load(side)
            with answering(loaded, base):  # raises where there is no adapter to leave out
                if tools := sampling.get("tools"):
                    check_tools(loaded, tools)
                title = f"{loaded.base}, without adapter" if base else name
            told[title] = told_of_system(loaded, system)
            self.titles.append(f"{title}\n{unknown_form(loaded, base) or ''}".strip())
        if len(told) == 2 and len(set(told.values())) == 1:
            told = {"Both": told[title]}
        self.remarks = [f"{who}: {text}" for who, text in told.items() if text is not None]
        self.begin()

    def begin(self) -> None:
        """Start a new conversation."""
        self.histories: tuple[list[Message], list[Message]] = ([], [])

    def ask(self, line: str, role: str = "user") -> None:
        """Show both answers as they grow, the left one first; Ctrl-C ends them early."""
        question: Message = {"role": role, "content": line}
        answers = ["", ""]
        live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        with live or nullcontext(), suppress(KeyboardInterrupt):
            for side, (_, base) in enumerate(self.sides):
                loaded = self._load(side)
                messages = [*opening(loaded, self.system), *self.histories[side], question]
                with answering(loaded, base):
                    for piece in stream_reply(loaded, messages, **self.sampling):
                        answers[side] += piece
                        if live is not None:
                            live.update(self._table(answers), refresh=True)
        if live is None:
            self.console.print(self._table(answers))  # a live table is cut to the height of a terminal
        for history, answer in zip(self.histories, answers, strict=True):
            history += [question, {"role": "assistant", "content": answer}]

    def _load(self, side: int) -> Any:
        return self._models.load(self._places[side], beside=self._places[1 - side])

    def _table(self, answers: list[str]) -> Table:
        table = Table(*(Column(Text(title), ratio=1) for title in self.titles), expand=True)
        table.add_row(*(Text(without_controls(answer)) for answer in answers))
        return table
