"""Training examples in the shape that TRL's trainers take, and some of them held out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import xxhash
from datasets import Dataset, Value

from paca.data.file_content import add_image_files
from paca.messages.errors import PacaError


@dataclass(frozen=True)
class Examples:
    """Training examples and where they come from."""

    dataset: Dataset
    """One of: `messages` (list of messages), `prompt` and `completion` (two texts, or two lists of messages),
    or `text`; beside them `tools` (JSON text or null) where messages may use them, `options` (texts, or
    null) where the data lists what could be answered, and `origin` (`"train.jsonl, line 7"`, unique). Other families:
    `prompt`, `chosen` and `rejected`; `prompt` and any other columns; `label` and `text` or `image`."""

    format: str
    """The name of the form that the data had, such as `"alpaca"`; of several sources `"messages and alpaca"`."""

    source: str
    """The source as the user wrote it; of several their names, with commas."""

    description: str
    """One line for people: the form, the columns, what became of them, how many examples."""

    parts: tuple[Dataset, ...] = ()
    """Of several sources the `origin` of what each one gave, before any of it was held out."""

    also_trained: int = 0
    """How many of held-out ones are in the training data as well."""

    @property
    def is_conversational(self) -> bool:
        """Whether the examples are messages, which a chat template renders."""
        columns = self.dataset.features
        return "messages" in columns or ("prompt" in columns and columns["prompt"] != Value("string"))

    def content(self) -> str:
        """A hash of the rows, and of all bytes of images that lie in files."""
        content = xxhash.xxh128()
        for batch in self.dataset.with_format("arrow").iter(batch_size=1000):
            for part in batch.combine_chunks().to_batches():
                content.update(part.serialize())
                add_image_files(content, part, self.dataset.features)
        return content.hexdigest()


def split_heldout(examples: Examples, held_out: float, seed: int) -> tuple[Examples, Examples]:
    """Hold examples out for evaluation, at random but the same for the same seed.

    Args:
        examples: All examples.
        held_out: A fraction between 0 and 1 (at least one example is held out), or a whole number of examples, as
            `data.eval` is checked to be.
        seed: Decides which ones.

    Returns:
        `(train, eval)`, both in the order of the source.

    Raises:
        PacaError: There would be nothing left on one side.
    """
    total = len(examples.dataset)
    count = max(1, round(held_out * total)) if held_out < 1 else int(held_out)
    if count >= total:
        raise PacaError(
            f"Cannot hold {count:,} of {total:,} examples out: none would be left to train on. Hold out less "
            "(data.eval), or give more data."
        )
    chosen = np.zeros(total, dtype=bool)
    chosen[np.random.default_rng(seed).permutation(total)[:count]] = True
    parts = []
    for name, mask in (("to train on", ~chosen), ("held out", chosen)):
        dataset = examples.dataset.select(np.flatnonzero(mask))
        parts.append(
            replace(
                examples, dataset=dataset, description=f"{examples.description}; {len(dataset):,} of {total:,} {name}"
            )
        )
    return parts[0], parts[1]
