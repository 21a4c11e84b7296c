"""Load training examples from a file or the hub, in the shape that TRL's SFTTrainer takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import xxhash
from datasets import Dataset, Value

from paca.data import named_columns, sources
from paca.data.conversion import FAMILIES, converted
from paca.data.file_content import add_image_files
from paca.data.recognition import describe, for_another_trainer, recognise
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
    """The name of the form that the data had, such as `"alpaca"`."""

    source: str
    """The source as the user wrote it."""

    description: str
    """One line for people: the form, the columns, what became of them, how many examples."""

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


def load_examples(
    source: str,
    *,
    format: str | None = None,
    split: str = "train",
    limit: int | None = None,
    family: str = "text",
    leave_out: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Examples:
    """Load examples and bring them into the shape that a trainer takes.

    Args:
        source: A `.jsonl`, `.json` (an array of objects; both also `.gz`), `.csv`, `.tsv` or `.parquet` file, a folder
            of such files (read in the order of their names) or of what `save_to_disk` of datasets left, or a dataset
            on the hub: `owner/name`, with a configuration `owner/name:config`, and with any split that datasets
            understands `owner/name[train[:1000]]`.
        format: `"messages"`, `"prompt-completion"`, `"alpaca"`, `"sharegpt"`, `"question-answer"`,
            `"mmlu"`, `"arc"`, `"oasst-messages"`, `"oasst-trees"` or `"text"`. Recognised from the columns
            when absent. Alpaca and question-answer rows become a `user` and an `assistant` message; those of mmlu
            and arc as well, the options listed below the question and the right one's label as the answer. Of a tree of
            messages the best-ranked conversation is taken. Texts given as prompt and completion stay as they are.
        split: The split of a hub dataset whose `source` names none, of one that was saved with splits, and of a folder
            whose files are named by splits.
        limit: Use only so many examples, from the start.
        family: What they are to be: `"text"` for SFT, `"preferences"`, `"prompts"` or `"labels"`, each with
            forms of its own.
        leave_out: Leave out records from which nothing can be learned, such as those with an empty answer.
        columns: Names that a form knows, each with the data's own column for it, such as `{"question": "input"}`.

    Raises:
        PacaError: The source does not exist, is empty or cannot be parsed, its form is unknown or ambiguous, or an
            example has a field of the wrong type or an empty answer; the text names the file and the line.
        LacksColumns: It lacks columns of `format`.
    """
    if limit is not None and limit < 1:
        raise PacaError(f"The limit of examples is {limit}; expected at least 1.")
    given, forms = dict(columns or {}), FAMILIES[family]
    named_columns.check_names(given, {name for form in forms.values() for name in form.columns})
    optional = frozenset(name for name in given if any(name in form.optional for form in forms.values()))
    found = replace(sources.find_source(source, split), columns=tuple(given.items()), optional=optional)
    first = next(found.rows(), None)
    if first is None:
        raise PacaError(f"{source} holds no examples: it is empty.")
    there = list(first[1])
    own = {name: column for name, column in given.items() if name in there}
    try:
        form = recognise(there, format, source, forms, own)
    except PacaError as error:
        if format is not None:
            raise
        others = {name: forms for name, forms in FAMILIES.items() if name != family}
        raise PacaError(f"{error}{for_another_trainer(there, others)}") from None
    dataset = converted(found, form, family, limit, leave_out, there)
    usable, note = dataset, ""
    if leave_out:
        first = dataset.select_columns(dataset.column_names[0]).with_format("arrow")[:]
        usable = dataset.select(np.flatnonzero(first.column(0).is_valid()))
    if count := len(dataset) - len(usable):
        note = f"; {count:,} left out, as nothing can be learned from them"
    if found.left_out:
        of_all = len(found.files) + found.left_out
        note += f"; of {len(found.files)} of the folder's {of_all} files, by their names those of the split {split!r}"
    return Examples(usable, form.name, source, describe(form, there, usable, given) + note)


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
    for name, mask in (("kept for training", ~chosen), ("held out", chosen)):
        dataset = examples.dataset.select(np.flatnonzero(mask))
        parts.append(
            replace(examples, dataset=dataset, description=f"{examples.description}; {len(dataset):,} of them {name}")
        )
    return parts[0], parts[1]
