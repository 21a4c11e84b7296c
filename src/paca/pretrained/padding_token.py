"""The token that fills up short sequences, for a tokenizer that names none."""

from __future__ import annotations

import logging

from transformers import PreTrainedTokenizerBase

from paca.messages.errors import PacaError

logger = logging.getLogger(__name__)

# Tokens that exist for padding alone in well-known vocabularies. Anything else might occur in a text.
_PAD_TOKENS = ("<|pad|>", "<pad>", "[PAD]", "<PAD>", "<|finetune_right_pad_id|>", "<|padding|>", "<unused0>")


def choose_pad_token(tokenizer: PreTrainedTokenizerBase, embeddings: int | None = None) -> None:
    """Give the tokenizer a padding token when it has none, and say which.

    A token made for padding is best. Failing that the end-of-text token: TRL masks padding by each sequence's length,
    not by token id, so that a real end-of-text token in an answer keeps its label (tested in tests/data).
    """
    if tokenizer.pad_token is not None:
        return
    vocabulary = tokenizer.get_vocab()
    for candidate in _PAD_TOKENS:
        # A vocabulary may be larger than the embedding: such a token has no row to look up.
        if candidate in vocabulary and (embeddings is None or vocabulary[candidate] < embeddings):
            tokenizer.pad_token = candidate
            logger.info("The tokenizer names no padding token; using %r, which its vocabulary has for it.", candidate)
            return
    if tokenizer.eos_token is None:
        raise PacaError(
            "The tokenizer has neither a padding nor an end-of-text token, so that batches cannot be padded. Set "
            '"pad_token" or "eos_token" in the tokenizer_config.json of the model.'
        )
    tokenizer.pad_token = tokenizer.eos_token
    logger.info(
        "The tokenizer names no padding token; padding with %r. Padding is masked by length, so this token still "
        "counts where it ends an answer.",
        tokenizer.eos_token,
    )
