"""Examples that are longer than a model was made for: a run warns of them, and refuses what is sure to fail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paca.data.sample import Sample
from paca.messages.errors import PacaError


def context_warning(sample: Sample | None, settings: Mapping[str, Any], context: int | None) -> str | None:
    """What to tell the user if examples are longer than the model was made for; None otherwise.

    Args:
        sample: Of the training data, where one was taken.
        settings: The section `train`, resolved.
        context: Positions that the model was made for, where it says so.
    """
    if sample is None or context is None:
        return None
    limit = settings.get("max_length", 0)  # GRPO has none: its prompts are whole
    others = sample.sampled < sample.examples and (limit is None or limit > context)
    if _longest(sample, settings) <= context and not others:
        return None
    why, advice = _told(sample, settings, context)
    return f"{why} fails there, or reads what it never learned to read. {advice}"


def check_positions(sample: Sample | None, settings: Mapping[str, Any], positions: int | None) -> None:
    """Refuse examples that a model is sure to fail at.

    Args:
        sample: As for `context_warning`.
        settings: As there.
        positions: Those in the model's table, see `paca.pretrained.context_length.position_table`.

    Raises:
        PacaError: One is longer.
    """
    if sample is not None and positions is not None and _longest(sample, settings) > positions:
        why, advice = _told(sample, settings, positions)
        raise PacaError(f"{why} fails there. {advice}")


def _longest(sample: Sample, settings: Mapping[str, Any]) -> int:
    """Of what the model reads: the longest example, or with GRPO prompt, with the longest answer that is allowed."""
    if "max_length" not in settings:
        return sample.longest + (settings.get("max_completion_length") or 0)
    limit = settings["max_length"]
    return sample.longest if limit is None else min(sample.longest, limit)


def _told(sample: Sample, settings: Mapping[str, Any], context: int) -> tuple[str, str]:
    """What is wrong, up to the model's name, and what to do."""
    made_for = f"The model was made for {context:,} positions"
    if "max_length" not in settings:
        answers = f"train.max_completion_length = {settings.get('max_completion_length') or 0:,}"
        return (
            f"{made_for}, the longest prompt has {sample.longest:,} tokens, and {answers} lets an answer go on beyond: "
            "the model",
            "Lower train.max_completion_length, or shorten or remove long prompts.",
        )
    limit = settings["max_length"]
    given = "null" if limit is None else f"{limit:,}"
    return (
        f"{made_for}, and train.max_length = {given} lets examples be longer (the longest has {sample.longest:,} "
        "tokens): it",
        f"Set train.max_length={context}, or shorten or remove long examples.",
    )
