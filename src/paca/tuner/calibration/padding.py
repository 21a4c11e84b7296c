"""Which rows of a layer's input are tokens, and which are padding."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Padding:
    """What a batch's ``attention_mask`` says; nothing is padding where there is none, or where it is full.

    Args:
        mask: ``(samples, tokens)``, nonzero for tokens; None for a batch without one.
        number: of the batch, from 1, for messages.
    """

    def __init__(self, mask: Any, number: int) -> None:
        self.real: Tensor | None = None
        if not isinstance(mask, Tensor):
            return
        if mask.numel() and not bool(mask.any()):
            raise ValueError(f"Batch {number} gives no tokens: its attention_mask is 0 everywhere.")
        if bool(mask.all()):
            return
        if mask.dim() != 2:
            raise ValueError(
                f"Batch {number}: its attention_mask has shape {tuple(mask.shape)}, which does not say which tokens "
                "are padding. Give one of (samples, tokens), or batches without padding and without a mask."
            )
        self.real = mask != 0

    def without(self, values: Tensor, key: str) -> Tensor:
        """``values (..., channels)`` as rows ``(n, channels)``, those of padding left out.

        Raises:
            ValueError: if the batch has padding and the rows are not its tokens.
        """
        leading = values.shape[:-1]
        rows = values.reshape(-1, values.shape[-1])
        if self.real is None or leading == self.real.shape[:1]:  # one row a sample, as in a classifier's head
            return rows
        real = self.real.to(values.device)
        if leading in (real.shape, (real.numel(),)):
            return rows[real.flatten()]
        raise ValueError(
            f"{key}: its input has shape {tuple(values.shape)}, which does not fit the attention_mask "
            f"{tuple(real.shape)} of its batch, so that padding can't be told from tokens. Give batches without "
            "padding (one sequence each, or all of one length), or leave the layer out of target_modules."
        )
