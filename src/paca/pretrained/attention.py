"""By which of transformers' implementations a model computes attention."""

from __future__ import annotations

from transformers import PreTrainedModel

from paca.messages.errors import PacaError


def set_attention(model: PreTrainedModel, implementation: str | None) -> None:
    """Let a model compute attention by `implementation`, transformers' word for it; None changes nothing.

    Raises:
        PacaError: There is none of the name, the model has no choice, or a package for it is missing.
    """
    if implementation is None:
        return
    try:
        model.set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        raise PacaError(str(error).strip()) from error
    if model.config._attn_implementation != implementation:
        raise PacaError(
            f"{type(model).__name__} always computes attention by {model.config._attn_implementation!r}. Leave it out."
        )
