"""Examples that are longer than a model was made for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from paca.data import load_examples
from paca.data.sample import Sample, take_sample
from paca.messages.errors import PacaError
from paca.training.positions import check_positions, context_warning
from tiny_checkpoint import byte_tokenizer


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    rows = [{"prompt": "ask " + "x" * n, "completion": "answer"} for n in (0, 5000)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return take_sample(load_examples(str(path)), byte_tokenizer(), limit=115)


def test_examples_longer_than_the_model_was_made_for_are_warned_of(sample: Sample) -> None:
    told = str(context_warning(sample, {"max_length": 1024}, 512))
    assert told.startswith("The model was made for 512 positions, and train.max_length = 1,024 lets examples be longer")
    assert f"(the longest has {sample.longest:,} tokens)" in told
    assert "Set train.max_length=512, or" in told
    assert "train.max_length = null lets" in str(context_warning(sample, {"max_length": None}, 512))
    for limit, context in ((512, 512), (1024, None), (None, sample.longest), (9000, 6000)):
        assert context_warning(sample, {"max_length": limit}, context) is None
    more = replace(sample, examples=5000)
    assert context_warning(more, {"max_length": 9000}, 6000) is not None  # others may be longer


def test_a_prompt_with_the_longest_answer_is_warned_of(sample: Sample) -> None:
    settings = {"max_completion_length": 100}
    told = str(context_warning(sample, settings, sample.longest + 99))
    assert f"longest prompt has {sample.longest:,} tokens, and train.max_completion_length = 100 lets an answer" in told
    assert context_warning(sample, settings, sample.longest + 100) is None


def test_examples_beyond_a_table_of_positions_are_refused(sample: Sample) -> None:
    check_positions(sample, {"max_length": 512}, 512)
    check_positions(sample, {"max_length": None}, None)
    with pytest.raises(PacaError, match=r"made for 512 positions, .* it fails there\. Set train\.max_length=512, or"):
        check_positions(sample, {"max_length": 513}, 512)
    with pytest.raises(PacaError, match=r"the model fails there\. Lower train\.max_completion_length, or shorten"):
        check_positions(sample, {"max_completion_length": 1}, sample.longest)
