"""Show what the demo's run changed: the numbers, one answer before and after, and what to do next.

Run as `python -m demo.show` from the project's folder. The answers are made once and kept in the run folder.
"""

from __future__ import annotations

import json
from pathlib import Path

from demo.prepare import CACHE
from rich.console import Console
from rich.padding import Padding

from paca_command import enter_package, import_package

RUN = Path("runs/demo")
TEST = CACHE / "data/test.jsonl"
ANSWER_TOKENS = 120


def held_out_question() -> tuple[str, str]:
    """(prompt, reference answer) of the first held-out example: the order is that of hashes, so nobody chose it."""
    with open(TEST, encoding="utf-8") as file:
        user, assistant = json.loads(file.readline())["messages"]
    return user["content"], assistant["content"]


def answers(run: Path, prompt: str) -> dict[str, str]:
    """The model's answers to `prompt` without and with the run's adapter, likeliest token each time."""
    file = run / "answers.json"
    if file.is_file() and file.stat().st_mtime >= (run / "summary.json").stat().st_mtime:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["prompt"] == prompt:
            return kept
    import_package()
    from paca.pretrained.generation import load_for_generation, stream_reply

    loaded = load_for_generation(run)
    question = [{"role": "user", "content": prompt}]
    after = "".join(stream_reply(loaded, question, max_new_tokens=ANSWER_TOKENS))
    with loaded.model.disable_adapter():
        before = "".join(stream_reply(loaded, question, max_new_tokens=ANSWER_TOKENS))
    made = {"prompt": prompt, "before": before, "after": after}
    file.write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return made


def show(run: Path, console: Console) -> None:
    """Print everything there is to see."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    prompt, reference = held_out_question()
    with console.status("Answering a held-out question, before and after ..."):
        made = answers(run, prompt)

    def heading(text: str) -> None:
        console.print(f"\n{text}", style="bold", highlight=False)

    def paragraph(text: str) -> None:
        console.print(Padding(text, (0, 0, 0, 4)), highlight=False, markup=False)

    def rows(pairs: list[tuple[str, str]]) -> None:
        width = max(len(label) for label, _ in pairs)
        for label, text in pairs:
            console.print(f"    {label:<{width}}  {text}", highlight=False, markup=False, soft_wrap=True)

    data, trained = summary["data"], summary["trainable_parameters"]
    heading(f"SmolLM2-135M-Instruct, fine-tuned with PaCA on {data['train_examples']:,} encyclopedia summaries")
    rows(
        [
            ("held-out loss", f"{summary['eval_loss_before']:.3f} before, {summary['eval_loss_after']:.3f} after"),
            ("held-out titles", f"{data['eval_examples']}, none of which was trained on"),
            ("trained", f"{trained:,} parameters, {summary['trainable_percent']:.2f} % of the model"),
            ("speed", f"{summary['tokens_per_second']:,.0f} tokens/s over {summary['tokens']:,} tokens"),
            ("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"),
            ("time", f"{summary['seconds'] / 60:.1f} minutes, the two evaluations included"),
        ]
    )
    heading("One of the held-out titles (the first)")
    paragraph(prompt)
    for title, text in (("Before:", made["before"]), ("After:", made["after"]), ("The encyclopedia says:", reference)):
        console.print(f"  {title}", style="bold", highlight=False)
        paragraph(text.strip())

    heading("Where things are")
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
    enter_package()  # answers that are kept are shown without waiting for torch
    from paca.cli.quiet import hide_library_notes
    from paca.cli.waiting_threads import let_waiting_threads_sleep

    let_waiting_threads_sleep()
    hide_library_notes()
    show(RUN, Console())
