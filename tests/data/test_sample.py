"""A sample of the data as tokens, against plain sums over all of it."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paca.data import encode, load_examples
from paca.data import sample as sample_module
from paca.data.examples import split_heldout
from paca.data.sample import Sample, take_sample
from paca.data.tokens import IGNORED
from tiny_checkpoint import byte_tokenizer

ROWS = [{"prompt": "ab" * n, "completion": "xyz" * (1 + n % 3)} for n in (1, 2, 3, 5, 8, 30)]


def load(folder: Path, rows: list[dict[str, Any]]) -> Any:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_examples(str(path))


@pytest.mark.parametrize("limit", [None, 20, 200])
@pytest.mark.parametrize("keep_end", [False, True])
def test_numbers_are_those_of_plain_sums(tmp_path: Path, limit: int | None, keep_end: bool) -> None:
    tokenizer = byte_tokenizer()
    examples = load(tmp_path, ROWS)
    found = take_sample(examples, tokenizer, limit=limit, keep_end=keep_end, batch_size=2)
    all_tokens = [encode(example, tokenizer) for example in examples.dataset]
    lengths = [len(tokens.ids) for tokens in all_tokens]
    kept = [length if limit is None else min(length, limit) for length in lengths]
    labels = [
        tokens.labels if limit is None else tokens.labels[-limit:] if keep_end else tokens.labels[:limit]
        for tokens in all_tokens
    ]
    counted = [sum(label != IGNORED for label in row[1:]) for row in labels]
    assert (found.sampled, found.examples) == (6, 6)
    assert (found.shortest, found.longest) == (min(lengths), max(lengths))
    assert found.median == int(statistics.median(lengths))
    assert found.cut == sum(limit is not None and length > limit for length in lengths)
    assert found.unanswered == counted.count(0) == (1 if limit == 20 and not keep_end else 0)
    assert found.mean == pytest.approx(statistics.mean(kept))
    assert found.share == pytest.approx(sum(counted) / sum(kept))
    pairs = [max(pair) for pair in itertools.product(kept, repeat=2)]  # two drawn at random
    assert found.padded == pytest.approx(statistics.mean(pairs))
    assert sum(count for _, _, count in found.histogram) == 6
    for start, end, count in found.histogram:
        assert count == sum(start <= length <= end for length in lengths)
    assert json.loads(json.dumps(found.as_dict())) == found.as_dict()


def test_the_example_shown_is_of_middle_length_and_marks_what_counts(tmp_path: Path) -> None:
    found = take_sample(load(tmp_path, ROWS), byte_tokenizer())
    assert found.origin == "data.jsonl, line 4"
    assert found.pieces == [("ab" * 5, False), ("xyz" * 3 + "<|im_end|>", True)]
    turns = [("user", "é?"), ("assistant", " ñ 漢"), ("user", "why"), ("assistant", "so")]
    messages = [{"role": role, "content": text} for role, text in turns]
    talk = take_sample(load(tmp_path, [{"messages": messages}]), byte_tokenizer())
    assert talk.pieces == [
        ("<|im_start|>user\né?<|im_end|>\n<|im_start|>assistant\n", False),
        (" ñ 漢<|im_end|>\n", True),
        ("<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n", False),
        ("so<|im_end|>\n", True),
    ]
    assert talk.left_out == 0
    forgetful = byte_tokenizer("{% for m in messages[-2:] %}{{ m['content'] + eos_token }}{% endfor %}")
    assert take_sample(load(tmp_path, [{"messages": messages}]), forgetful).left_out == 1


def test_a_cut_example_is_shown_as_the_run_reads_it(tmp_path: Path) -> None:
    examples = load(tmp_path, ROWS)  # of 9, 14, 10, 20, 26 and 64 tokens
    found = take_sample(examples, byte_tokenizer(), limit=13)
    assert found.pieces == [("ab" * 5, False), ("xyz", True), (" [train.max_length cuts off 7 tokens here] ", False)]
    end = take_sample(examples, byte_tokenizer(), limit=13, keep_end=True)
    assert end.pieces[0] == (" [train.max_length cuts off 7 tokens here] ", False)
    assert end.pieces[1:] == [("bab", False), ("xyz" * 3 + "<|im_end|>", True)]
    assert take_sample(examples, byte_tokenizer(), limit=13, cuts=False).pieces[-1][1]


def test_what_a_run_leaves_out_is_neither_shown_nor_averaged(tmp_path: Path) -> None:
    examples = load(tmp_path, ROWS)
    refused = take_sample(examples, byte_tokenizer(), limit=9)
    found = take_sample(examples, byte_tokenizer(), limit=9, leave_out=True)
    assert (refused.unanswered, refused.unusable) == (3, 0)
    assert (found.unanswered, found.unusable) == (3, 3)
    assert (refused.origin, found.origin) == ("data.jsonl, line 4", "data.jsonl, line 3")
    assert found.pieces[:2] == [("ababab", False), ("xyz", True)]
    assert found.share == pytest.approx(2 * refused.share)  # type: ignore[operator]
    assert take_sample(examples, byte_tokenizer(), limit=2, leave_out=True).unusable == 0  # all: that is refused


def test_everything_counts_where_it_is_asked_for(tmp_path: Path) -> None:
    found = take_sample(load(tmp_path, ROWS[:1]), byte_tokenizer(), everything=True)
    assert found.pieces == [("a", False), ("bxyzxyz<|im_end|>", True)]
    assert found.share == pytest.approx(8 / 9)  # the first token is never predicted


def test_a_first_character_of_several_tokens_is_shown_with_the_rest(tmp_path: Path) -> None:
    found = take_sample(load(tmp_path, [{"text": "日本"}]), byte_tokenizer())
    assert found.pieces == [("日本<|im_end|>", True)]


def test_of_much_data_a_part_is_tokenized_the_same_one_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": "x" * n} for n in range(1, 3001)]
    examples = load(tmp_path, rows)
    found = take_sample(examples, byte_tokenizer())
    assert (found.sampled, found.examples) == (1000, 3000)
    assert found == take_sample(examples, byte_tokenizer())
    assert found.mean == pytest.approx(1501.5, rel=0.1)  # not the first ones
    monkeypatch.setattr(sample_module, "_CHARACTERS", 100_000)
    assert 10 < take_sample(examples, byte_tokenizer()).sampled < 200


def test_an_outlier_leaves_the_bars_of_all_others_apart(tmp_path: Path) -> None:
    rows = [{"prompt": "ab" * (1 + n % 20), "completion": "x"} for n in range(99)] + [
        {"prompt": "ab" * 4000, "completion": "x"}
    ]
    bars = [count for _, _, count in take_sample(load(tmp_path, rows), byte_tokenizer()).histogram]
    assert sum(bars) == 100
    assert bars[-1] == 1
    assert sum(count > 5 for count in bars) >= 5


def test_one_example_and_equal_ones_have_a_histogram(tmp_path: Path) -> None:
    for count in (1, 3):
        found = take_sample(load(tmp_path, [{"text": "abc"}] * count), byte_tokenizer(), batch_size=4)
        assert isinstance(found, Sample)
        assert found.histogram == [(4, 4, count)]
        assert found.padded == pytest.approx(4)
        assert np.isfinite(found.share)


def test_of_several_sources_each_shows_an_example(tmp_path: Path) -> None:
    """The one of middle length of all, then those of the others, in the order of the sources."""
    sources = []
    for name, letter, count in (("long", "l", 1), ("many", "m", 9), ("short", "s", 3)):
        path = tmp_path / name / "train.jsonl"
        path.parent.mkdir()
        extra = {"long": 40, "many": 20, "short": 0}[name]
        rows = [{"prompt": letter * (extra + n), "completion": "yes"} for n in range(1, count + 1)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append(str(path))
    examples = load_examples([*sources, sources[0]])
    found = take_sample(examples, byte_tokenizer())
    assert (found.origin, found.pieces[0]) == ("many/train.jsonl, line 5", ("m" * 25, False))
    assert [other.origin for other in found.others] == ["long/train.jsonl, line 1", "short/train.jsonl, line 2"]
    assert [other.pieces[0][0] for other in found.others] == ["l" * 41, "s" * 2]
    train, _ = split_heldout(examples, 3, seed=0)
    assert {each.origin for each in take_sample(train, byte_tokenizer()).shown} <= set(train.dataset["origin"])
    answered = found.followed_by(lambda origin: [(f" of {origin}", True)])
    assert [each.pieces[-1] for each in answered.shown] == [(f" of {each.origin}", True) for each in found.shown]
    assert [Sample(**json.loads(json.dumps(found.as_dict()))).shown[1].origin] == ["long/train.jsonl, line 1"]
    assert take_sample(load(tmp_path, ROWS), byte_tokenizer()).others == []
