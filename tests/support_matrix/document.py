"""`docs/support-matrix.md`, from the outcomes of the cells and from nothing else."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

from support_matrix.cell import Outcome
from support_matrix.guides import OPERATIONS_IN_GUIDES, ROWS_IN_GUIDES
from support_matrix.operations import OPERATIONS
from support_matrix.quantizations import NOT_RUN, QUANTIZATIONS, REFUSED_QUANTIZATIONS
from support_matrix.subject import Refused, Subject
from support_matrix.table import ADAPT, LAYERS, REFUSED_LAYERS, Outcomes

INTRODUCTION = """\
# What works with what

<!-- Written by `make matrix`. Don't edit: tests/test_support_matrix.py compares. -->

The tests run every cell on a tiny model on a CPU, and compare its outcome with this page.

- **✓** it works; [what is checked](#what-is-checked).
- **no** paca refuses it, and the model computes what it did before. The note begins paca's message, whose further
  sentences say what to do.
- **–** there is nothing to do, for the reason in the note.

Rows lead to the guide on such layers. LAYER, CLASS, CHOICE and TYPE stand for names. Layers are the libraries' own,
unless the row says *stand-in*: GPTQ, AWQ, EETQ and AQLM multiply on GPUs only, so a layer with their interface takes
their place.
"""

LAYERS_TEXT = """\
## Layers

*Resident*, *patched* and *additive* are [the ways in which columns take effect](guides/quantized.md).
"""

QUANTIZATIONS_TEXT = """\
## Quantized weights

These are linear layers. The libraries' other layers are in the last table.
"""

REFUSED_TEXT = """\
## Refused altogether

Naming such a layer in `target_modules` (or `target_parameters`) raises `ValueError`, whose message begins so.
"""

NOT_RUN_TEXT = """\
## Not run
"""

CHECKED_TEXT = """\
## What is checked

Each name leads to the guide that says how to do it.
"""

NAMES = (
    (r"^(first|second|lin1|target|body\.target|lm_head|transformer\.wte|model\.[\w.]+)(?=:? )", "LAYER"),
    (r"\ban? [\w.]+(?= can't give| \(a subclass|, (whose|which) | of \w+ that accelerate)", "a CLASS"),
    (r"(a CLASS) \(a subclass of \w+,", r"\1 (a subclass of CLASS,"),
    (r"(a CLASS) of \w+ that", r"\1 that"),
    (r"(?<=for which selection=)'\w+'", "CHOICE"),
    (r"(?<=The adapter also holds ).*?(?= whole)", "LAYER"),
    (r"(?<=Models of type )'\w+'", "TYPE"),
    (r"(?<=it adapts )Linear, .*? aqlm\.", "the layers above."),
)
"""What a message names, and what stands for it here, so that messages which differ in names alone are one."""

MARKS = {"works": "✓", "refused": "no", "explained": "–"}


class Notes:
    """Numbered notes, one for each different text."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, outcome: Outcome) -> str:
        """What a cell shows."""
        sign = MARKS[outcome.kind]
        if not outcome.reason:
            return sign
        number = self._numbers.setdefault(_general(outcome.reason), len(self._numbers) + 1)
        return f"{sign}[^{number}]"

    def lines(self) -> list[str]:
        """The notes themselves."""
        return [f"[^{number}]: {_escaped(text)}" for text, number in self._numbers.items()]


def document(outcomes: Outcomes) -> str:
    """The whole page."""
    notes = Notes()
    parts = [
        INTRODUCTION,
        LAYERS_TEXT,
        *_table(LAYERS, outcomes, notes),
        "",
        QUANTIZATIONS_TEXT,
        *_table(QUANTIZATIONS, outcomes, notes),
        "",
        REFUSED_TEXT,
        *_refusals((*REFUSED_LAYERS, *REFUSED_QUANTIZATIONS), outcomes),
        "",
        NOT_RUN_TEXT,
        *(f"- {title}: {reason}" for title, reason in NOT_RUN),
        "",
        CHECKED_TEXT,
        *(f"- {_operation(title)}: {' '.join((check.__doc__ or '').split())}" for title, check in OPERATIONS.items()),
        "",
        "The models are in float32. Where results are not equal bit for bit, the relative error is within 2e-5.",
        "Compiled models run with `aot_eager`; of language models the adapted layers, or the block of experts.",
        "",
        *notes.lines(),
    ]
    return "\n".join(parts) + "\n"


def _table(rows: Iterable[Subject], outcomes: Outcomes, notes: Notes) -> list[str]:
    """A column for each operation that does not work everywhere, below a line that names the others.

    Columns with the same outcomes are one, and rows too.
    """
    rows = tuple(rows)
    found = {name: [Outcome.of(outcomes[row.key][name]) for row in rows] for name in OPERATIONS}
    always = [name for name, cells in found.items() if all(cell.kind == "works" for cell in cells)]
    shown = [name for name in OPERATIONS if name not in always]
    lines = [textwrap.fill(f"**✓ in every row**: {'; '.join(always)}.", 120, break_on_hyphens=False), ""]
    marks = [[notes.mark(found[name][number]) for name in shown] for number in range(len(rows))]
    columns = _alike(zip(zip(*marks, strict=True), shown, strict=True))
    modes = (", ".join(sorted(row.modes)) for row in rows)
    cells = zip(modes, *columns, strict=True)
    lines += [f"| | mode | {' | '.join(columns.values())} |", "|---|---|" + ":-:|" * len(columns)]
    alike = _alike(zip(cells, map(_title, rows), strict=True))
    return lines + [f"| {titles} | {' | '.join(row)} |" for row, titles in alike.items()]


def _alike(named: Iterable[tuple[tuple[str, ...], str]]) -> dict[tuple[str, ...], str]:
    """The names of those that are alike, as one."""
    names: dict[tuple[str, ...], list[str]] = {}
    for marks, name in named:
        names.setdefault(marks, []).append(name)
    return {marks: "; ".join(found) for marks, found in names.items()}


def _refusals(rows: Iterable[Refused], outcomes: Outcomes) -> list[str]:
    alike = _alike(((_general(Outcome.of(outcomes[row.key][ADAPT]).reason),), _title(row)) for row in rows)
    lines = ["| | the message |", "|---|---|"]
    return lines + [f"| {titles} | {_escaped(message)} |" for (message,), titles in alike.items()]


def _title(row: Subject | Refused) -> str:
    """A row's name, which leads to its guide."""
    return f"[{row.title}]({ROWS_IN_GUIDES[row.key]})"


def _operation(title: str) -> str:
    """An operation's name, which leads to its guide."""
    return f"**[{title}]({OPERATIONS_IN_GUIDES[title]})**"


def _general(message: str) -> str:
    """A message's first sentence, without names. The others say what to do, as the guides do."""
    for name, sign in NAMES:
        message = re.sub(name, sign, message)
    return re.split(r"(?<=\.) (?=[A-Z])", message, maxsplit=1)[0]


def _escaped(text: str) -> str:
    """Markdown's own signs in a message stand for themselves."""
    for sign in ("\\", "|", "*", "_", "<", "["):
        text = text.replace(sign, f"\\{sign}")
    return text
