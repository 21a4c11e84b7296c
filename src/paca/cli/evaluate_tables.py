"""What `paca evaluate` prints: a model's numbers, with and without its adapter."""

from __future__ import annotations

import functools
import math
import shlex
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from paca.messages.program import program
from paca.messages.say import say
from paca.messages.shown import printable

if TYPE_CHECKING:
    from paca.evaluation.side_by_side import Row
    from paca.evaluation.statistics import Mean
    from paca.pretrained.generation import LoadedModel

_SHORTEST_TASK = 8  # columns of the table, with the space behind


def say_what_is_left(loaded: LoadedModel, console: Console) -> None:
    """Why there is no base beside an adapter that changed it."""
    from paca.pretrained.changed_base import left_on

    if (changed := left_on(loaded.model)) is not None:
        command = f"{program()} evaluate {shlex.quote(loaded.base)}"
        say(console, f"Without the adapter another model than its base is left ({changed}). The base: {command}")


def print_ratings(console: Console, results: dict[str, Any]) -> None:
    """Ratings in all, by turn and by category, and what the judge took."""
    models = results["models"]
    columns = {**models, **({"difference": results["difference"]} if "difference" in results else {})}
    table = Table("MT-Bench", *columns)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    first = next(iter(models.values()))
    rows: list[tuple[str, list[str]]] = [("all", ["all"])]
    rows += [(f"turn {turn}", ["turns", turn]) for turn in first["turns"]]
    rows += [(name, ["categories", name]) for name in first["categories"]]
    for label, keys in rows:
        found = {name: functools.reduce(lambda part, key: part[key], keys, scores) for name, scores in columns.items()}
        cells = [
            "-"
            if one["score"] is None
            else number((one["score"], one["stderr"]), digits=2, signed=name == "difference")
            for name, one in found.items()
        ]
        table.add_row(escape(printable(label, longest=100)), *cells)
    console.print(table)
    if ungraded := sum(scores["without_grade"] for scores in models.values()):
        answers = "1 answer" if ungraded == 1 else f"{ungraded} answers"
        out = ", which the difference leaves out on both sides" if "difference" in results else ""
        say(console, f"The judge named no grade for {answers}{out}. The same call asks again.", style="yellow")
    longest, context, cut = results["max_new_tokens"], results["context"], results["cut_questions"]
    if cut:
        asked = "1 question" if cut == 1 else f"{cut:,} questions"
        told = (
            f"{asked} lost the beginning: with answers of {longest:,} tokens there is no room in the model's context "
            f"of {context:,}. Ask for shorter ones with --max-new-tokens."
        )
        say(console, told, style="yellow")
    used = results["judge"]
    tokens = f"read {used['prompt_tokens']:,} tokens and wrote {used['completion_tokens']:,}"
    say(console, f"The judge {tokens}, in {used['requests']:,} requests, for the verdicts kept.")


def print_table(console: Console, rows: list[Row]) -> None:
    """Print the numbers, and below them what the errors don't say."""
    from paca.evaluation.side_by_side import note_on_errors

    console.print(table_of(rows, console.width))
    if note := note_on_errors(rows):
        say(console, note)


def table_of(rows: list[Row], width: int) -> Table:
    """Tasks down, base and adapter across, for so many columns of a terminal."""
    sides = list(rows[0].values) if rows else []
    compared = ["difference"] if any(row.difference is not None for row in rows) else []
    numbers = [[number(row.values[side]) for side in sides] for row in rows]
    for row, cells in zip(rows, numbers, strict=True):
        cells += [number(row.difference, signed=True)] if row.difference is not None else [""] * len(compared)
    metrics = [row.metric.replace(",", ",\n") for row in rows]  # its filter on a line of its own
    # Three numbers with their errors leave little of 80 columns. The name of a task is broken before a metric's.
    taken = sum(2 + max(map(len, column)) for column in zip([*sides, *compared], *numbers, strict=True))
    longest = max(len(line) for metric in ["metric", *metrics] for line in metric.split("\n"))
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold", width=max(1, min(longest, width - taken - _SHORTEST_TASK)))
    for side in [*sides, *compared]:
        table.add_column(side, justify="right", no_wrap=True)
    previous = None
    for row, metric, cells in zip(rows, metrics, numbers, strict=True):
        task = "" if row.task == previous else "  " * row.depth + escape(row.task)
        table.add_row(task, escape(metric), *cells)
        previous = row.task
    return table


def number(value: Mean, *, signed: bool = False, digits: int = 4) -> str:
    """`0.4500 ± 0.0210`, without an error of 0; large numbers have fewer digits, those beyond 1e7 an exponent."""
    size = max(abs(part) for part in value if part is not None)
    kind = f".{digits}g" if size >= 1e7 else f".{max(0, digits - int(math.log10(max(size, 1))))}f"
    text = f"{value[0]:{'+' if signed else ''}{kind}}"
    return text if not value[1] else f"{text} ± {value[1]:{kind}}"
