"""A check that every example has a token that counts in the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from paca.data.conversion import ORIGIN
from paca.data.examples import Examples
from paca.data.formats import Example
from paca.data.tokens import IGNORED, what_stays
from paca.messages.errors import PacaError

_NAMED = 3  # examples that an error lists; the rest it counts


def check_labels(
    examples: Examples,
    train: Mapping[str, Any],
    *,
    packed: bool,
    leave_out: bool = False,
    context: int | None = None,
) -> int:
    """Make sure that every example has a token that counts in the loss.

    TRL cuts an example to `train.max_length` tokens and silently drops it when no answer is left; with packing it
    keeps it without any label. Either way the run would learn from less than it was given.

    Args:
        examples: What `SFTTrainer` will be given, tokenized.
        train: Its settings.
        packed: Whether it packs these examples.
        leave_out: Count those without one, unless all are.
        context: Positions that the model was made for, where it says so.

    Returns:
        How many have none.

    Raises:
        PacaError: Naming the examples without a label.
    """
    length = train.get("max_length")
    if packed and train.get("packing_strategy", "bfd") != "bfd":
        # Wrapped or split packing loses no token: a piece without a label is the rest of an example that has some.
        return 0
    stays = what_stays(length, keep_end=train.get("truncation_mode") == "keep_end" and not packed)
    kept = (labels[stays] for batch in _batches(examples) for labels in batch["labels"])
    # The first token is never predicted.
    lost = [number for number, labels in enumerate(kept) if (labels[1:] == IGNORED).all()]
    count = len(lost)
    if not lost or (leave_out and count < len(examples.dataset)):
        return count
    listed = "\n  ".join(_named(examples.dataset[number]) for number in lost[:_NAMED])
    listed += f"\n  and {count - _NAMED:,} more" if count > _NAMED else ""
    longest = max(len(labels) for batch in _batches(examples) for labels in batch["labels"])
    raise PacaError(
        f"{count:,} of {len(examples.dataset):,} examples {'have' if count > 1 else 'has'} no token that counts in the "
        f"loss: cut to train.max_length = {length} tokens, nothing of the answer is left.\n  {listed}\n"
        f"{raise_or_shorten(length or longest, longest, context)} or remove "
        f"{'these examples' if count > 1 else 'this example'}; data.unusable: leave_out does without."
    )


def raise_or_shorten(limit: int, longest: int, context: int | None) -> str:
    """How an advice for examples that are cut too early begins: no length beyond the model's context.

    Args:
        limit: `train.max_length`.
        longest: Tokens of the longest example.
        context: Positions that the model was made for, where it says so.
    """
    if context is None or longest <= context:
        return f"Raise train.max_length (the longest example has {longest:,} tokens), or shorten"
    if limit < context:
        return f"Raise train.max_length, up to the {context:,} positions that the model was made for, or shorten"
    return f"The model was made for {context:,} positions: shorten"


def _batches(examples: Examples) -> Iterator[dict[str, Any]]:
    return examples.dataset.select_columns("labels").with_format("numpy").iter(batch_size=1000)


def _named(example: Example) -> str:
    """Where an example is from, and its first words."""
    content = example.get("prompt") or example.get("messages") or example.get("text")
    if isinstance(content, list):
        asked = [message["content"] for message in content if message["role"] == "user"]
        content = asked[0] if asked else content[0]["content"]
    words = " ".join(str(content).split())
    shown = words if len(words) <= 60 else words[:60] + "…"
    return f"{example[ORIGIN]}: {shown!r}"
