"""The system message that all examples begin with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paca.data import load_examples
from paca.data.examples import split_heldout
from paca.data.system_message import shared_system

TURNS = [{"role": "user", "content": "Look"}, {"role": "assistant", "content": "Yes"}]
BRIEF, LONG = ({"role": "system", "content": text} for text in ("Be brief.", "Be long."))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"messages": [BRIEF, *TURNS]}] * 3, "Be brief."),
        ([{"messages": [BRIEF, *TURNS]}] * 1500 + [{"messages": [LONG, *TURNS]}], None),
        ([{"messages": [BRIEF, *TURNS]}] * 1500 + [{"messages": TURNS}], None),
        ([{"messages": TURNS}] * 2, None),
        ([{"messages": [*TURNS, BRIEF, *TURNS]}] * 2, None),
        ([{"messages": [{**BRIEF, "role": "developer"}, *TURNS]}] * 2, None),
        ([{"prompt": [BRIEF, TURNS[0]], "completion": [TURNS[1]]}] * 2, "Be brief."),
        ([{"conversations": TURNS, "system": "Be brief."}] * 2, "Be brief."),
        ([{"prompt": "Look", "completion": "Yes"}] * 2, None),
        ([{"text": "Look"}] * 2, None),
    ],
)
def test_one_system_message_is_found_where_all_have_it(
    tmp_path: Path, rows: list[dict[str, Any]], expected: str | None
) -> None:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert shared_system(load_examples(str(tmp_path / "data.jsonl"))) == expected


def test_of_data_that_was_split_its_own_part_counts(tmp_path: Path) -> None:
    rows = [{"messages": [BRIEF, *TURNS]}] * 3 + [{"messages": TURNS}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = load_examples(str(tmp_path / "data.jsonl"))
    parts = [split_heldout(examples, 1, seed) for seed in range(9)]
    train, held_out = next(pair for pair in parts if len(pair[1].dataset[0]["messages"]) == len(TURNS))
    assert (shared_system(train), shared_system(held_out)) == ("Be brief.", None)
