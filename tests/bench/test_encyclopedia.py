"""The encyclopedia entries that methods are compared on: which are usable, and how they are split."""

from __future__ import annotations

import pytest
from benchmarks.quality.encyclopedia import TEST_EXAMPLES, build_examples, clean_summary

SENTENCE = "A kernel is the set of all vectors that a linear map sends to zero. "
GOOD = (SENTENCE * 4).strip()


def summary(title: str, extract: str = GOOD, description: str = "Concept") -> dict[str, str]:
    return {"title": title, "extract": extract, "description": description, "topic": "Mathematics"}


def test_a_whole_paragraph_is_kept_as_it_is() -> None:
    assert clean_summary(GOOD) == GOOD
    assert clean_summary(f"{GOOD}[12]") == GOOD
    assert clean_summary(GOOD.replace("zero. A", "zero.[a] A", 1)) == GOOD
    assert clean_summary(GOOD.replace("of all", "of\u00a0all")) == GOOD
    assert clean_summary(GOOD.replace("linear", "line\u0301aire")) == GOOD.replace("linear", "linéaire")


@pytest.mark.parametrize(
    "broken",
    [
        GOOD.replace("zero. A", "zero.\nA", 1),
        GOOD.replace("a linear", "the  linear"),
        GOOD.replace("kernel is", "kernel , is"),
        GOOD.replace("kernel is", "kernel (; from Old English) is"),
        GOOD.replace("kernel is", "kernel (Greek ) is"),
        GOOD.replace("a linear", "\u2060\u2060 linear"),
        GOOD.replace("zero. A", "zero.A", 1),
        GOOD[:-1],
        GOOD[:-1] + ":",
        "Kernel may refer to several things. " + GOOD,
        SENTENCE.strip(),
        GOOD * 2,
        "",
    ],
)
def test_broken_short_long_and_ambiguous_summaries_are_dropped(broken: str) -> None:
    assert clean_summary(broken) is None


def test_the_split_depends_on_the_subject_alone() -> None:
    titles = [f"Title {number}" for number in range(4000)]
    train, held_back = build_examples([summary(title, f"{GOOD} {title}.") for title in titles])
    assert len(train) + len(held_back) == len(titles)
    assert TEST_EXAMPLES < 0.04 * len(titles) < len(held_back) < 0.06 * len(titles)
    alone, _ = build_examples([summary(title, f"{GOOD} {title}.") for title in titles[:500]])
    assert all(example in train for example in alone)


def test_an_example_is_a_conversation_with_title_and_description() -> None:
    train, held_back = build_examples([summary("Jupiter (god)", description="Chief deity")])
    assert [*train, *held_back] == [
        {
            "messages": [
                {
                    "role": "user",
                    "content": "Write a short encyclopedia entry about Jupiter (god).\nIn a few words: Chief deity",
                },
                {"role": "assistant", "content": GOOD},
            ]
        }
    ]
    assert build_examples([summary("Jupiter", description="")]) == ([], [])
