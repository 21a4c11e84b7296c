"""Who is told how far an evaluation is, in tests."""

from __future__ import annotations


class Tally:
    """Counts what an evaluation computes; may stop it, as Ctrl-C does."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.begun: list[tuple[str, int]] = []
        self.done = 0
        self.stop_after = stop_after

    def begin(self, who: str, what: str, total: int, at_a_time: int = 1) -> None:
        self.begun.append((who, total))

    def advance(self) -> None:
        self.done += 1
        if self.done == self.stop_after:
            raise KeyboardInterrupt
