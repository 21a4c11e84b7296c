"""The batch that takes the most memory, to be trained first."""

from __future__ import annotations

from collections.abc import Sequence

from paca.messages.errors import PacaError


def longest_batch(lengths: Sequence[int], batch_size: int, max_length: int | None = None) -> list[int]:
    """The examples whose batch is the largest one that training can meet.

    A batch is padded to its longest example, so the worst is made of the longest ones. If it trains, every batch does.

    Args:
        lengths: tokens of each example.
        batch_size: examples in a batch.
        max_length: where longer examples are cut; None where they are not.

    Returns:
        The numbers of `batch_size` examples (or of all, if there are fewer), longest first.

    Raises:
        PacaError: there are no examples, or `batch_size` is below 1.
    """
    if not lengths:
        raise PacaError("There are no examples, so there is no longest batch to try.")
    if batch_size < 1:
        raise PacaError(f"batch_size is {batch_size}; it must be 1 or more.")
    cut = [length if max_length is None else min(length, max_length) for length in lengths]
    return sorted(range(len(cut)), key=lambda number: (-cut[number], number))[:batch_size]
