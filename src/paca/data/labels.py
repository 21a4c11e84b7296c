"""A check that every example has a token that counts in the loss."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from trl import SFTConfig

from paca.data.examples import ORIGIN, Examples
from paca.data.tokens import IGNORED
from paca.messages.errors import PacaError

_NAMED = 3  # examples that an error lists; the rest it counts


def check_labels(prepared: Dataset, examples: Examples, args: SFTConfig, *, leave_out: bool = False) -> int:
    """Make sure that every example has a token that counts in the loss.

    TRL cuts an example to `args.max_length` tokens and silently drops it when no answer is left; with packing it
    keeps it without any label. Either way the run would learn from less than it was given.

    Args:
        prepared: What `SFTTrainer` made of the examples (its `train_dataset` or `eval_dataset`): `input_ids`
            and `labels`, packed or not.
        examples: What it was given, tokenized.
        args: The configuration it was given.
        leave_out: Count those without one, unless all are.

    Returns:
        How many have none.

    Raises:
        PacaError: Naming the examples without a label.
    """
    if ORIGIN in prepared.column_names:
        origins = _lost_origins(prepared, examples) + _masked_origins(prepared)
        count = len(origins)
    elif "seq_lengths" in prepared.column_names and args.packing_strategy == "bfd":
        documents = list(_masked_documents(prepared))
        origins = [_origin_of(document, examples) for document in documents[:_NAMED]]
        count = len(documents)
    else:
        # Wrapped or split packing loses no token: a piece without a label is the rest of an example that has some.
        return 0
    if not origins:
        return 0
    if leave_out and count < len(examples.dataset):
        return count
    listed = "\n  ".join(f"{origin}: {_first_words(origin, examples)}" for origin in origins[:_NAMED])
    listed += f"\n  and {count - _NAMED:,} more" if count > _NAMED else ""
    raise PacaError(
        f"{count:,} of {len(examples.dataset):,} examples {'have' if count > 1 else 'has'} no token that counts in the "
        f"loss: cut to train.max_length = {args.max_length} tokens, nothing of the answer is left.\n  {listed}\n"
        f"Raise train.max_length, or shorten or remove {'these examples' if count > 1 else 'this example'}; "
        "data.unusable: leave_out does without."
    )


def _lost_origins(prepared: Dataset, examples: Examples) -> list[str]:
    """The examples that TRL dropped."""
    given = _column(examples.dataset, ORIGIN)
    kept = _column(prepared, ORIGIN)
    return pc.filter(given, pc.invert(pc.is_in(given, value_set=kept))).to_pylist()


def _masked_origins(prepared: Dataset) -> list[str]:
    """The examples that are there, without a label."""
    masked: list[str] = []
    for batch in prepared.with_format("arrow").iter(batch_size=1000):
        lengths = pc.list_value_length(batch["labels"]).to_numpy()
        masked.extend(pc.filter(batch[ORIGIN], pa.array(_without_label(_flat(batch["labels"]), lengths))).to_pylist())
    return masked


def _masked_documents(prepared: Dataset) -> Iterator[list[int]]:
    """The tokens of each packed document without a label."""
    for batch in prepared.with_format("arrow").iter(batch_size=1000):
        tokens = _flat(batch["input_ids"])
        lengths = _flat(batch["seq_lengths"])
        starts = np.cumsum(lengths) - lengths
        for document in np.flatnonzero(_without_label(_flat(batch["labels"]), lengths)):
            yield tokens[starts[document] : starts[document] + lengths[document]].tolist()


def _without_label(labels: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Whether each of the sequences that follow one another in `labels` has no token that counts.

    Args:
        labels: `(tokens,)`, of all sequences.
        lengths: `(sequences,)`, their lengths in tokens.
    """
    counts = (labels != IGNORED).astype(np.int64)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    counts[starts[lengths > 0]] = 0  # the first token is never predicted
    totals = np.concatenate([[0], np.cumsum(counts)])
    return totals[ends] == totals[starts]


def _flat(lists: pa.ChunkedArray) -> np.ndarray:
    """All values of a column of lists, one after the other."""
    return np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in lists.chunks])


def _column(dataset: Dataset, name: str) -> pa.ChunkedArray:
    return dataset.select_columns(name).with_format("arrow")[:][name]


def _origin_of(document: list[int], examples: Examples) -> str:
    """Which example a packed document was made from: the first that begins so."""
    rows = examples.dataset.select_columns(["input_ids", ORIGIN])
    return next(str(row[ORIGIN]) for row in rows if row["input_ids"][: len(document)] == document)


def _first_words(origin: str, examples: Examples) -> str:
    index = pc.index(_column(examples.dataset, ORIGIN), pa.scalar(origin)).as_py()
    example = examples.dataset[index]
    content = example.get("prompt") or example.get("messages") or example.get("text")
    if isinstance(content, list):
        asked = [message["content"] for message in content if message["role"] == "user"]
        content = asked[0] if asked else content[0]["content"]
    return _shortened(content)


def _shortened(text: str) -> str:
    words = " ".join(text.split())
    return repr(words if len(words) <= 60 else words[:60] + "…")
