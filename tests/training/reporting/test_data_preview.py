"""What people see of their data: in a terminal, in a log file, in the report."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from paca.data import load_examples
from paca.data.sample import Sample, take_sample
from paca.training import describe, load_run_config
from paca.training.plan import show_plan
from paca.training.reporting.data_preview import cut_warning, length_lines, sample_section, show_sample
from tiny_checkpoint import CONTEXT, byte_tokenizer


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    rows = [{"prompt": "<b>ask</b> " + "x" * n, "completion": "[red]answer"} for n in (0, 5, 100, 5000)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return take_sample(load_examples(str(path)), byte_tokenizer(), limit=115)


def shown(sample: Sample, **options: object) -> str:
    console = Console(file=io.StringIO(), width=80, **options)  # type: ignore[arg-type]
    show_sample(sample, console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_what_counts_is_in_brackets_where_there_are_no_colours(sample: Sample) -> None:
    text = shown(sample)
    assert "(data.jsonl, line 3); what the loss falls on is in ⟦ ⟧:" in text
    assert "<b>ask</b> " + "x" * 100 + "⟦[red⟧ [train.max_length cuts off 8 tokens here] " in text


def test_what_counts_is_green_in_a_terminal(sample: Sample) -> None:
    text = shown(sample, force_terminal=True, color_system="standard", legacy_windows=False)
    assert "what the loss falls on is green" in text
    assert "\x1b[32m[red\x1b[0m [train.max_length cuts off 8 tokens here]" in text
    assert "⟦" not in text


def test_lengths_are_said_and_drawn(sample: Sample) -> None:
    lines = length_lines(sample)
    assert lines[0].startswith("Tokens of all 4 training examples: at least 23, median 75, 95 % up to ")
    assert lines[0].endswith("at most 5,023.")
    assert "train.max_length = 115 cuts 2 of these examples (50.0 %)." in lines[1]
    assert "Nothing of the answer is left in 1: a run refuses those, or leaves them out" in lines[1]
    left_out = length_lines(replace(sample, leave_out=True))[1]
    assert left_out.endswith("Nothing of the answer is left in 1: the run leaves them out.")
    assert lines[2].split() == ["23", "–", "522", "█" * 32, "3"]
    assert lines[-1].split()[-1] == "1"


def test_examples_that_are_cut_are_warned_of(sample: Sample) -> None:
    told = str(cut_warning(sample))
    assert "max_length = 115 cuts 2 of 4 examples (50.0 %), and leaves nothing of the answer in 1 of them. The" in told
    assert "The longest has 5,023 tokens: set train.max_length=5023 if " in told
    few = replace(sample, sampled=1000, examples=5000, cut=30, unanswered=0)
    assert cut_warning(few) is None
    assert "cuts 31 of 1,000 examples that were looked at (3.1 %). The" in str(cut_warning(replace(few, cut=31)))
    assert "nothing of the answer in 1 of them" in str(cut_warning(replace(few, unanswered=1)))
    assert cut_warning(None) is None


def test_no_length_is_advised_that_the_model_was_not_made_for(sample: Sample) -> None:
    more = "The longest has 5,023 tokens, and the model was made for"
    assert f"{more} 512 positions: set train.max_length=512 if the memory" in str(cut_warning(sample, 512))
    assert f"{more} 115 positions: shorten or remove long examples." in str(cut_warning(sample, 115))
    assert cut_warning(sample, 5023) == cut_warning(sample)


def test_a_long_piece_is_shortened_and_control_characters_reach_no_terminal(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "begin\x1b[2J\x07\u202e" + "x" * 3000 + "end", "completion": "yes"}) + "\n")
    text = shown(take_sample(load_examples(str(path)), byte_tokenizer()))
    assert "\x1b" not in text
    assert r"begin␛[2J␇\u202e" in text
    assert "xend⟦yes" in text
    assert "characters …" in text
    assert len(text) < 3000


def test_the_report_marks_the_same_and_escapes_it(sample: Sample) -> None:
    page = sample_section(json.loads(json.dumps(sample.as_dict())))
    assert "&lt;b&gt;ask&lt;/b&gt; " + "x" * 100 + "<mark>[red</mark> [train.max_length cuts off 8 tokens" in page
    assert "cuts 2 of these examples" in page
    assert sample_section(None) == ""


def test_an_example_of_each_source_is_shown(tmp_path: Path) -> None:
    sources = []
    for name in ("<aa>", "b"):
        sources.append(str(tmp_path / f"{name}.jsonl"))
        Path(sources[-1]).write_text(json.dumps({"prompt": f"ask {name}", "completion": "yes"}) + "\n")
    sample = take_sample(load_examples(sources), byte_tokenizer())
    text = shown(sample)
    assert "An example of middle length (<aa>.jsonl, line 1); what the loss falls on is in ⟦ ⟧:\n\nask <aa>⟦yes" in text
    assert "One of another source (b.jsonl, line 1):\n\nask b⟦yes" in text
    page = sample_section(json.loads(json.dumps(sample.as_dict())))
    assert "<p>One of another source (b.jsonl, line 1):</p>\n<pre>ask b<mark>yes" in page


def test_a_plan_knows_what_its_model_was_made_for(config_file: Path, tmp_path: Path) -> None:
    data, output = tmp_path / "long.jsonl", io.StringIO()
    records = [{"prompt": "Go on: ", "completion": "a" * length} for length in (10, CONTEXT)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    files = [f"data.train={data}", "data.eval=null"]
    for length in (CONTEXT, CONTEXT + 100):
        show_plan(describe(load_run_config(config_file, [*files, f"train.max_length={length}"])), Console(file=output))
    cut, beyond = (line for line in output.getvalue().splitlines() if line.startswith("Warning: "))
    assert cut.endswith(f"and the model was made for {CONTEXT} positions: shorten or remove long examples.")
    assert beyond.startswith(f"Warning: The model was made for {CONTEXT} positions, and train.max_length = ")
