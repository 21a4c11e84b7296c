"""The block of a README that is made from rows."""

from __future__ import annotations

from pathlib import Path

from paca.messages.errors import PacaError

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def replace_block(path: Path, content: str) -> None:
    """Put `content` between the markers of the file.

    Raises:
        PacaError: the file is missing, or doesn't have each marker once and in order.
    """
    if not path.is_file():
        raise PacaError(f"There is no file {str(path)!r} to put the table into.")
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise PacaError(f"{str(path)!r} needs one line {BEGIN} and, below it, one line {END}: the table goes between.")
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    path.write_text(f"{head}\n{content.strip()}\n{tail}", encoding="utf-8")
