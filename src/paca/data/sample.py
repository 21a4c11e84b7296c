"""What a sample of the data is to the model: lengths in tokens, the share that counts in the loss, one example."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute
from transformers import PreTrainedTokenizerBase

from paca.data.conversion import ORIGIN
from paca.data.examples import Examples
from paca.data.formats import Example
from paca.data.tokens import IGNORED, Tokens, encode, training_template, what_stays

SAMPLED = 1000
"""Examples that are tokenized, at most."""
_CHARACTERS = 4_000_000
"""No further example is tokenized after so many: about a million tokens, some seconds of work."""
_BINS = 10

Pieces = list[tuple[str, bool]]
"""Texts, and whether each counts in the loss."""


class Shown(NamedTuple):
    """An example as the model reads it."""

    origin: str
    pieces: Pieces
    rejected: Pieces
    """The same of the answer that is worse, where pairs are compared."""


@dataclass(frozen=True)
class Sample:
    """Some of the examples as tokens. Plain values, so that a summary can keep them."""

    sampled: int
    examples: int
    """In all."""
    shortest: int
    """Tokens before anything is cut, as the three below."""
    median: int
    percentile_95: int
    longest: int
    cut: int
    """How many are longer than `limit`."""
    limit: int | None
    """`train.max_length`."""
    unanswered: int
    """How many have no token that counts once they are cut."""
    left_out: int
    """Answers within them that do not count: `paca.data.tokens.WHY_LEFT_OUT`."""
    mean: float
    """Tokens once they are cut; of a pair, those of both answers."""
    padded: float
    """Tokens to which a batch is padded, on average."""
    share: float | None
    """Of the tokens, once they are cut, that count in the loss; None where it does not fall on tokens one by one."""
    histogram: list[tuple[int, int, int]]
    """`(from, to, examples)`, both ends included."""
    origin: str
    """Where the example of middle length is from, and its text."""
    pieces: Pieces
    rejected: Pieces = field(default_factory=list)
    """As of `Shown`."""
    leave_out: bool = False
    """Whether a run leaves out the `unanswered`."""
    others: list[Shown] = field(default_factory=list)
    """Where there are several sources, the example of middle length of each of the others."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each, before anything is cut, in the order of the data; a summary does without."""
    longest_learned: int = 0
    """As `longest`, of those that a run does not leave out; a summary does without."""

    @property
    def shown(self) -> list[Shown]:
        """All examples to look at."""
        return [Shown(self.origin, self.pieces, self.rejected), *(Shown(*other) for other in self.others)]

    def followed_by(self, answer: Callable[[str], Pieces]) -> Sample:
        """With what comes after the text of each example that is shown, by its origin."""
        first, *others = (
            Shown(each.origin, [*each.pieces, *answer(each.origin)], each.rejected) for each in self.shown
        )
        return dataclasses.replace(self, pieces=first.pieces, others=others)

    @property
    def refused(self) -> bool:
        """Whether a run refuses the data for what was seen of it."""
        return self.unanswered > 0 and (not self.leave_out or self.unanswered == self.examples)

    @property
    def unusable(self) -> int:
        """How many a run leaves out, where all examples were looked at; 0 where it refuses them, or is not known."""
        known = self.leave_out and self.sampled == self.examples
        return self.unanswered if known and self.unanswered < self.examples else 0

    def as_dict(self) -> dict[str, Any]:
        """For `summary.json`, as it is read back."""
        values = dataclasses.asdict(self)
        del values["lengths"], values["longest_learned"]
        return dict(json.loads(json.dumps(values)))


def take_sample(
    examples: Examples,
    tokenizer: PreTrainedTokenizerBase,
    forms: Callable[[Example], Sequence[Tokens]] | None = None,
    *,
    everything: bool = False,
    limit: int | None = None,
    keep_end: bool = False,
    batch_size: int = 1,
    leave_out: bool = False,
    cuts: bool = True,
) -> Sample:
    """Tokenize a sample of the examples, the same one each time.

    Args:
        examples: Not tokenized.
        tokenizer: Of the model.
        forms: What the model reads of an example: one sequence, or a better and a worse one. By default what `encode`
            makes of it.
        everything: As `encode` takes it.
        limit: Tokens at which an example is cut.
        keep_end: Whether its end is what stays.
        batch_size: Examples that are padded to the longest of them.
        leave_out: Whether a run leaves out what has no token that counts.
        cuts: Whether the example that is shown is cut; the trainer may refuse those over the limit instead.

    Raises:
        PacaError: As `encode`.
    """
    count = len(examples.dataset)
    order = range(count) if count <= SAMPLED else np.random.default_rng(0).permutation(count)[:SAMPLED]
    template, sequences, origins, characters = training_template(tokenizer), [], [], 0
    if forms is None:

        def forms(example: Example) -> Sequence[Tokens]:
            return [encode(example, tokenizer, everything=everything, template=template)]

    for example in examples.dataset.select(order):
        sequences.append(forms(example))
        origins.append(str(example[ORIGIN]))
        characters += sum(len(str(value)) for value in example.values())
        if characters > _CHARACTERS:
            break
    found = [max(each, key=lambda tokens: len(tokens.ids)) for each in sequences]  # what a batch is padded to
    lengths = np.array([len(tokens.ids) for tokens in found])
    stays = what_stays(limit, keep_end=keep_end)
    by_token = all(len(each) == 1 for each in sequences) and any(_counting(tokens.labels) for tokens in found)
    counted = [_counting(tokens.labels[stays][1:]) for tokens in found] if by_token else []
    learned = np.flatnonzero(counted) if leave_out and any(counted) else np.arange(len(found))
    kept = np.sort(lengths[learned] if limit is None else np.minimum(lengths[learned], limit))

    def shown(those: np.ndarray[Any, Any]) -> Shown:
        """The one of middle length."""
        middle = int(those[np.argsort(lengths[those], kind="stable")[len(those) // 2]])
        first, *more = (_pieces_kept(tokens, stays if cuts else slice(None), tokenizer) for tokens in sequences[middle])
        return Shown(origins[middle], first, [piece for pieces in more for piece in pieces])

    origin, pieces, rejected = shown(learned)
    read = [sum(len(tokens.ids[stays]) for tokens in sequences[index]) for index in learned]
    shares = (np.arange(len(kept) + 1) / len(kept)) ** batch_size  # of batches whose longest is among the first n
    usual = lengths[lengths <= 2 * np.percentile(lengths, 95)].max()  # the few beyond have one bar, the last
    edges = np.unique([*np.linspace(lengths.min(), usual + 1, _BINS + 1).astype(int), lengths.max() + 1])
    return Sample(
        sampled=len(found),
        examples=count,
        shortest=int(lengths.min()),
        median=int(np.median(lengths)),
        percentile_95=int(np.percentile(lengths, 95)),
        longest=int(lengths.max()),
        cut=0 if limit is None else int((lengths > limit).sum()),
        limit=limit,
        unanswered=counted.count(0),
        left_out=sum(tokens.left_out for tokens in found),
        mean=float(np.mean(read)),
        padded=float((kept * np.diff(shares)).sum()),
        share=sum(counted) / int(kept.sum()) if by_token else None,
        histogram=[
            (int(start), int(end) - 1, int(((lengths >= start) & (lengths < end)).sum()))
            for start, end in itertools.pairwise(edges)
        ],
        origin=origin,
        pieces=pieces,
        rejected=rejected,
        leave_out=leave_out,
        lengths=lengths.tolist(),
        longest_learned=int(lengths[learned].max()),
        others=[
            shown(learned[found_there])
            for there in _of_each_part(examples, origins)
            if origin not in there and (found_there := np.array([origins[at] in there for at in learned])).any()
        ],
    )


def _of_each_part(examples: Examples, origins: Sequence[str]) -> Iterator[set[str]]:
    """Which of the origins each of several sources has; one that is named twice counts once."""
    wanted, before = pyarrow.array(origins), set[str]()
    for part in examples.parts:
        column = part.data.column(ORIGIN)  # with what a selection leaves out: that is of the same source
        there = set(column.filter(pyarrow.compute.is_in(column, value_set=wanted.cast(column.type))).to_pylist())
        yield there - before
        before |= there


def _counting(labels: Sequence[int]) -> int:
    return sum(label != IGNORED for label in labels)


def _pieces_kept(tokens: Tokens, stays: slice, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Text of what is left of an example once it is cut, and how much is cut off."""
    left = dataclasses.replace(tokens, ids=tokens.ids[stays], labels=tokens.labels[stays])
    pieces, lost = _pieces(left, tokenizer), len(tokens.ids) - len(left.ids)
    if not lost:
        return pieces
    mark = (f" [train.max_length cuts off {lost:,} token{'' if lost == 1 else 's'} here] ", False)
    return [*pieces, mark] if stays.start is None else [mark, *pieces]


def _pieces(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    counts = [label != IGNORED for label in tokens.labels]
    # Nothing stands before the first token that it could be told from. A part of a character is shown with the rest.
    if not str(tokenizer.decode(tokens.ids[:1])).endswith("\ufffd"):
        counts[:1] = [False] * len(counts[:1])
    ends = [index + 1 for index in range(len(counts)) if counts[index : index + 1] != counts[index + 1 : index + 2]]
    pieces, shown = [], 0
    for end in ends:
        # The beginning each time: decoded alone, a piece would lose the space before its first word.
        text = str(tokenizer.decode(tokens.ids[:end], clean_up_tokenization_spaces=False))
        pieces.append((text[shown:], counts[end - 1]))
        shown = len(text)
    return pieces
