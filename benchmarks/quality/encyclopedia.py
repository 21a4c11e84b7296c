"""Encyclopedia entries to learn from: which summaries are usable, and how they are split."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from demo.prepare import subject_hash

TEST_SHARE = 0.05
TEST_EXAMPLES = 64
# Answers of about 45 to 125 tokens: long enough to have a style, short enough for 2 cores.
MIN_CHARACTERS, MAX_CHARACTERS = 200, 500

# Where a formula or a pronunciation was cut out of a summary it leaves such a hole behind.
HOLE = re.compile(r"\s[,.;:)]|\(\s*[,;)]|[,;]\s*[,;.]|[a-z]{2}\.[A-Z]")
DISAMBIGUATION = re.compile(r"^.{0,80}\b(may|can|could|might) (also |either )?refer to\b")
FOOTNOTE = re.compile(r"\[(\d{1,3}|[a-z])\]")
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")


def clean_summary(extract: str) -> str | None:
    """The summary as one tidy paragraph, or None when it is broken, too short or too long to be an answer."""
    if "\n" in extract:  # lists and displayed formulas, most of them cut short
        return None
    text = unicodedata.normalize("NFC", extract)
    if INVISIBLE.search(text):  # they stand where a formula was
        return None
    text = FOOTNOTE.sub("", text)
    text = re.sub(r"[\u00a0\u2009\u202f]", " ", text).strip()
    if "  " in text or HOLE.search(text) or DISAMBIGUATION.search(text):
        return None
    if not text.endswith((".", '."', ".”", ".)")) or not MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
        return None
    return text


def prompt(title: str, description: str) -> str:
    return f"Write a short encyclopedia entry about {title}.\nIn a few words: {description}"


def build_examples(summaries: Iterable[dict[str, str]]) -> tuple[list[dict], list[dict]]:
    """Split the usable summaries into (train, held back) conversations, both in the order of their hashes.

    Titles with a hash below `TEST_SHARE` are kept from training. The first `TEST_EXAMPLES` of them judge a run.
    """
    examples: list[tuple[float, str, dict]] = []
    for summary in summaries:
        title, description = summary["title"], summary["description"].strip()
        answer = clean_summary(summary["extract"])
        if answer is None or not description:
            continue
        messages = [
            {"role": "user", "content": prompt(title, description)},
            {"role": "assistant", "content": answer},
        ]
        examples.append((subject_hash(title), title, {"messages": messages}))
    examples.sort(key=lambda example: example[:2])
    train = [example for position, _, example in examples if position >= TEST_SHARE]
    return train, [example for position, _, example in examples if position < TEST_SHARE]
