"""Operations in any order, beside a plain float64 model. Many more: `make sequences` (docs/reliability.md)."""

from __future__ import annotations

import pytest

from operation_sequences.__main__ import run
from operation_sequences.interrupts_everywhere import interrupt_everywhere, operations
from operation_sequences.subjects import SUBJECTS


@pytest.mark.slow(reason="tries many cases")
@pytest.mark.parametrize("kind", SUBJECTS)
def test_sequences_of_operations_give_what_the_float64_model_says(kind):
    run(kind, sequences=15, operations=8, number=1, compiled=0.1 if kind == "words" else 0.0, shrink=False)


def test_ctrl_c_at_any_line_leaves_a_base_that_can_be_put_back(tmp_path):
    subject = SUBJECTS["words"]
    known = operations(subject, tmp_path)
    for first, name in enumerate(("merge", "unmerge", "rotate", "hot swap", "train")):
        places = list(interrupt_everywhere(subject, name, known[name], range(20 + first, 5000, 61)))
        assert len(places) > 1
        assert [(where, wrong) for where, wrong in places if wrong] == [], name
