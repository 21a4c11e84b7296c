"""Which tokens count in the loss: the settings that make it so, and a check that some do in every example."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from paca.data.assistant_turns import ASSISTANT_MASK, marks_assistant_turns
from paca.data.examples import ORIGIN, Examples, tokens_of
from paca.messages.errors import PacaError

_IGNORED = -100  # the label of a token that does not count, in transformers and TRL
_NAMED = 3  # examples that an error lists; the rest it counts


def loss_settings(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """The fields of ``SFTConfig`` by which the loss falls on the answers only, where there are any.

    Args:
        examples: after :func:`paca.data.mark_assistant_turns`.
        tokenizer: of the model to train.

    Returns:
        Values of ``completion_only_loss`` and ``assistant_only_loss``.

    Raises:
        PacaError: the tokenizer lacks what these examples need: a chat template, or an end-of-text token.
    """
    columns = examples.dataset.column_names
    if ASSISTANT_MASK in columns:
        # The mask is made; TRL applies it always, and refuses assistant_only_loss with tokenized examples.
        return {"completion_only_loss": False, "assistant_only_loss": False}
    if examples.is_conversational and tokenizer.chat_template is None:
        raise PacaError(
            f"{examples.source} holds messages, but the tokenizer has no chat template to render them with. Use an "
            "instruction-tuned model, or name a template in train.chat_template_path."
        )
    if not examples.is_conversational and tokenizer.eos_token is None:
        raise PacaError(
            "The tokenizer has no end-of-text token, so a model trained on plain text would never learn to stop. Name "
            "one in train.eos_token."
        )
    if "messages" not in columns:
        return {"completion_only_loss": "completion" in columns, "assistant_only_loss": False}
    if not marks_assistant_turns(tokenizer):
        raise PacaError(
            "The chat template does not mark assistant turns: call paca.data.mark_assistant_turns(examples, tokenizer) "
            "first, or train on whole conversations (train.assistant_only_loss: false)."
        )
    return {"completion_only_loss": False, "assistant_only_loss": True}


def check_labels(prepared: Dataset, examples: Examples, args: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that every example has a token that counts in the loss.

    TRL cuts an example to ``args.max_length`` tokens and silently drops it when no answer is left; with packing it
    keeps it without any label. Either way the run would learn from less than it was given.

    Args:
        prepared: what ``SFTTrainer`` made of the examples (its ``train_dataset`` or ``eval_dataset``): ``input_ids``
            and ``labels``, packed or not.
        examples: what it was given.
        args: the configuration it was given.
        tokenizer: of the model.

    Raises:
        PacaError: naming the examples without a label.
    """
    if ORIGIN in prepared.column_names:
        origins = _lost_origins(prepared, examples) + _masked_origins(prepared)
        masked = [f"{origin}: {_first_words(origin, examples)}" for origin in origins[:_NAMED]]
        count = len(origins)
    elif "seq_lengths" in prepared.column_names and args.packing_strategy == "bfd":
        documents = list(_masked_documents(prepared))
        masked = [_name_of(document, examples, tokenizer) for document in documents[:_NAMED]]
        count = len(documents)
    else:
        # Wrapped or split packing loses no token: a piece without a label is the rest of an example that has some.
        return
    if not masked:
        return
    listed = "\n  ".join(masked) + (f"\n  and {count - _NAMED:,} more" if count > _NAMED else "")
    raise PacaError(
        f"{count:,} of {len(examples.dataset):,} examples {'have' if count > 1 else 'has'} no token that counts in the "
        f"loss: cut to train.max_length = {args.max_length} tokens, nothing of the answer is left.\n  {listed}\n"
        f"Raise train.max_length, or shorten or remove {'these examples' if count > 1 else 'this example'}."
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
    """Whether each of the sequences that follow one another in ``labels`` has no token that counts.

    Args:
        labels: ``(tokens,)``, of all sequences.
        lengths: ``(sequences,)``, their lengths in tokens.
    """
    counts = (labels != _IGNORED).astype(np.int64)
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


def _name_of(document: list[int], examples: Examples, tokenizer: PreTrainedTokenizerBase) -> str:
    origin = _origin_of(document, examples, tokenizer)
    if origin is None:
        return f"an example that begins {_shortened(str(tokenizer.decode(document, skip_special_tokens=True)))}"
    return f"{origin}: {_first_words(origin, examples)}"


def _origin_of(document: list[int], examples: Examples, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Which example a packed document was made from: the first whose rendered start is that document."""
    for example in examples.dataset:
        if tokens_of(example, tokenizer, start_only=True)[: len(document)] == document:
            return str(example[ORIGIN])
    return None  # TRL rendered it with a template of its own


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
