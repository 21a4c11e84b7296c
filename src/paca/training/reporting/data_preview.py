"""A sample of the training data, for people: one example as the model reads it, and how long examples are."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from paca.data.labels import raise_or_shorten
from paca.data.sample import Sample
from paca.data.tokens import WHY_LEFT_OUT
from paca.messages.say import say

_LONGEST_PIECE = 800
"""Characters of a piece of the example that are shown: its beginning and its end."""
_BAR = 32
_FEW = 0.03
"""Share of examples that may be cut without a warning."""
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""What a terminal would obey: control characters, and those that turn the direction of writing."""


def show_sample(sample: Sample, console: Console) -> None:
    """Print it. What the loss falls on is green where there are colours, else in brackets."""
    colours = console.color_system is not None
    marked = "green" if colours else "in ⟦ ⟧"
    for number, (origin, pieces, rejected) in enumerate(sample.shown):
        which = "One of another source" if number else "An example of middle length"
        say(console, f"\n{which} ({origin}){'' if number else f'; what the loss falls on is {marked}'}:\n")
        _show_pieces(pieces, console, colours)
        if rejected:
            say(console, "\nThe same with the answer that is rejected:\n")
            _show_pieces(rejected, console, colours)
    say(console, "")
    for line in length_lines(sample):
        say(console, line)


def _show_pieces(pieces: Sequence[tuple[str, bool]], console: Console, colours: bool) -> None:
    text = Text()
    for piece, counts in pieces:
        piece = _CONTROLS.sub(_visible, _shortened(piece))
        if counts and not colours:
            piece = f"⟦{piece}⟧"
        text.append(piece, style="green" if counts else None)
    console.print(text, soft_wrap=True, highlight=False)


def length_lines(sample: Sample) -> list[str]:
    """The lengths in words, and as bars."""
    which = "all" if sample.sampled == sample.examples else f"a sample of {sample.sampled:,} of the"
    lines = [
        f"Tokens of {which} {sample.examples:,} training examples: at least {sample.shortest:,}, median "
        f"{sample.median:,}, 95 % up to {sample.percentile_95:,}, at most {sample.longest:,}.",
    ]
    notes = [] if sample.share is None else [f"The loss falls on {100 * sample.share:.0f} % of them."]
    if sample.limit is not None:
        share = f" ({100 * sample.cut / sample.sampled:.1f} %)" if sample.cut else ""
        notes.append(f"train.max_length = {sample.limit:,} cuts {sample.cut:,} of these examples{share}.")
    if sample.unanswered:
        notes.append(f"Nothing of the answer is left in {sample.unanswered:,}: {_then(sample)}.")
    if sample.left_out:
        notes.append(f"{sample.left_out:,} answers do not count: {WHY_LEFT_OUT}.")
    lines += [" ".join(notes)] if notes else []
    wide = max(len(f"{end:,}") for _, end, _ in sample.histogram)
    most = max(count for _, _, count in sample.histogram)
    for start, end, count in sample.histogram:
        bar = "█" * round(_BAR * count / most) or ("▏" if count else "")
        lines.append(f"{start:>{wide},} – {end:>{wide},}  {bar:<{_BAR}} {count:,}")
    return lines


def _then(sample: Sample) -> str:
    """What a run does with examples of which nothing of the answer is left."""
    if not sample.leave_out:
        return "a run refuses those, or leaves them out (data.unusable: leave_out)"
    return "the run leaves them out" if sample.unanswered < sample.sampled else "a run refuses that"


def cut_warning(sample: Sample | None, context: int | None = None) -> str | None:
    """What to tell the user if more than a few examples are cut, or any is of no use; None otherwise.

    Args:
        sample: Of the training data, where one was taken.
        context: Positions that the model was made for, where it says so.
    """
    if sample is None or not sample.cut:
        return None
    if sample.cut <= _FEW * sample.sampled and not sample.unanswered:
        return None
    looked = "" if sample.sampled == sample.examples else " that were looked at"
    lost = f", and leaves nothing of the answer in {sample.unanswered:,} of them" if sample.unanswered else ""
    assert sample.limit is not None
    most = sample.longest if context is None else min(sample.longest, context)
    made_for = "" if most == sample.longest else f", and the model was made for {context:,} positions"
    advice = f"set train.max_length={most} if the memory suffices, or " if sample.limit < most else ""
    return (
        f"train.max_length = {sample.limit:,} cuts {sample.cut:,} of {sample.sampled:,} examples{looked} "
        f"({100 * sample.cut / sample.sampled:.1f} %){lost}. The longest has {sample.longest:,} tokens"
        f"{made_for}: {advice}shorten or remove long examples."
    )


def told_of_unanswered(sample: Sample, context: int | None) -> str:
    """What to tell the user of examples with nothing to learn; `context` as in `cut_warning`."""
    looked = "" if sample.sampled == sample.examples else " that were looked at"
    advice = raise_or_shorten(sample.limit or sample.longest, sample.longest, context)
    return (
        f"{sample.unanswered:,} of {sample.sampled:,} examples{looked} have no token that counts in the loss. {advice} "
        "or remove these examples, or set data.unusable: leave_out."
    )


def sample_section(values: dict[str, Any] | None) -> str:
    """A part of an HTML page; empty without a sample.

    Args:
        values: Of `Sample.as_dict`, perhaps read from a file.
    """
    if values is None:
        return ""
    sample = Sample(**values)
    text = ""
    for number, (origin, pieces, rejected) in enumerate(sample.shown):
        text += f"</pre>\n<p>One of another source ({html.escape(origin)}):</p>\n<pre>" if number else ""
        text += _marked(pieces)
        if rejected:
            text += f"</pre>\n<p>The same with the answer that is rejected:</p>\n<pre>{_marked(rejected)}"
    return (
        "<h2>Data</h2>\n<style>mark { color: inherit; background: #2e9e5b55; }</style>\n"
        f'<p class="sub">An example of middle length ({html.escape(sample.origin)}) as the model reads it; the loss '
        f"falls on what is <mark>marked</mark>.</p>\n<pre>{text}</pre>\n"
        f"<pre>{html.escape(chr(10).join(length_lines(sample)))}</pre>"
    )


def _marked(pieces: Sequence[tuple[str, bool]]) -> str:
    return "".join(
        f"<mark>{html.escape(_shortened(piece))}</mark>" if counts else html.escape(_shortened(piece))
        for piece, counts in pieces
    )


def _visible(found: re.Match[str]) -> str:
    number = ord(found[0])
    return chr(0x2400 + number) if number < 0x20 else f"\\u{number:04x}"


def _shortened(piece: str) -> str:
    if len(piece) <= _LONGEST_PIECE:
        return piece
    left_out = len(piece) - _LONGEST_PIECE
    return f"{piece[: _LONGEST_PIECE // 2]} … {left_out:,} characters … {piece[-_LONGEST_PIECE // 2 :]}"
