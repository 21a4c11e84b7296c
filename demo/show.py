"""Show what the demo's run changed: three answers before and after, the numbers, and what to do next.

Run as `python -m demo.show` from the project's folder. All of it is in the run's `summary.json`; no model is loaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

RUN = Path("runs/demo")
SHOWN = 3


def one_line(answer: str) -> str:
    """The answer as it is compared: runs of spaces and line breaks count as one space."""
    return " ".join(answer.split())


def right_of_all(score: dict[str, Any]) -> str:
    """Such as "45 of 48"."""
    return f"{round(score['exact_match'] * score['examples'])} of {score['examples']}"


def answers(before: dict[str, str], after: dict[str, str]) -> Table:
    """One held-out question with the answer of either model, and the one that was expected."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    expected = one_line(after["reference"])
    table.add_row("  asked", Text(after["question"]))
    for label, sample in (("before", before), ("after", after)):
        answer = one_line(sample["answer"])
        right = answer == expected
        verdict = Text("  right" if right else "  wrong", style="bold green" if right else "bold red")
        table.add_row(f"  {label}", Text(answer) + verdict)
    table.add_row("  expected", Text(expected))
    return table


def show(run: Path, console: Console) -> None:
    """Print everything there is to see; exit where the run is not the demo's."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    if "exact_match" not in (summary["scores"] or {}).get("after", {}):
        sys.exit(f"{run} holds a run of another recipe. Train the demo there: make demo REDO=1")
    before, after = summary["scores"]["before"], summary["scores"]["after"]

    def heading(text: str) -> None:
        console.print(f"\n{text}", style="bold", highlight=False)

    def rows(pairs: list[tuple[str, str]]) -> None:
        width = max(len(label) for label, _ in pairs)
        for label, text in pairs:
            console.print(f"    {label:<{width}}  {text}", highlight=False, markup=False, soft_wrap=True)

    data, trained = summary["data"], summary["trainable_parameters"]
    heading(f"SmolLM2-135M-Instruct, fine-tuned with PaCA on {data['train_examples']:,} lines about people")
    rows(
        [
            ("exact records", f"{right_of_all(before)} before, {right_of_all(after)} after; none was trained on"),
            ("held-out loss", f"{summary['eval_loss_before']:.3f} before, {summary['eval_loss_after']:.3f} after"),
            ("trained", f"{trained:,} parameters, {summary['trainable_percent']:.2f} % of the model"),
            ("steps alone", f"{summary['train_seconds']:,.0f} s, {summary['tokens_per_second']:,.0f} tokens/s"),
            ("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"),
        ]
    )
    heading(f"The first {SHOWN} of the held-out people (in the order of a hash, so nobody chose them)")
    for pair in zip(before["samples"][:SHOWN], after["samples"][:SHOWN], strict=True):
        console.print(answers(*pair), "", highlight=False)

    console.print("Where things are", style="bold", highlight=False)
    rows(
        [
            ("adapter", f"{run}/adapter/ (loads with PEFT after `import paca`)"),
            ("report", f"{run}/report.html (open it in a browser)"),
            ("numbers", f"{run}/summary.json, {run}/metrics.jsonl"),
        ]
    )
    heading("What to type next")
    rows(
        [
            ("talk to it", f".venv/bin/paca chat {run}"),
            ("... or to the original", f".venv/bin/paca chat {run} --base"),
            ("a plain checkpoint", f".venv/bin/paca merge {run} --output runs/demo-merged"),
            ("your own model and data", "see README.md; recipes/demo.yaml is this run's recipe"),
            ("train this again", "make demo REDO=1"),
        ]
    )


if __name__ == "__main__":
    show(RUN, Console())
