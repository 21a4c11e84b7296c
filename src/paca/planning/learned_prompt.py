"""Methods that learn tokens in front of the input (prompt tuning, P-tuning), for a plan: PEFT's wrapper prepends them,
and a plan runs the model inside.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.utils import PeftType
from torch import Tensor, nn

NAME = "learned_prompt"
"""The module's name in the model; `.` follows it in its parameters' names."""
_PREPENDED = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)


class LearnedPrompt(nn.Module):
    """PEFT's prompt encoder, and the tokens that it reads."""

    def __init__(self, encoder: nn.Module, tokens: Tensor) -> None:
        super().__init__()
        self.encoder, self.enabled = encoder, True
        self.tokens: Tensor
        self.register_buffer("tokens", tokens, persistent=False)

    def enable_adapters(self, enabled: bool) -> None:
        """As layers of PEFT."""
        self.enabled = enabled

    def forward(self, batch_size: int) -> Tensor:
        """Embeddings of shape `(batch_size, prompt's tokens, width)`."""
        embeddings: Tensor = self.encoder(self.tokens.expand(batch_size, -1))
        return embeddings


def put_inside(adapted: PeftModel) -> bool:
    """Let the model in `adapted` prepend the prompt itself, in each pass. False, and nothing done, for another method
    that adds to the input.
    """
    if adapted.active_peft_config.peft_type not in _PREPENDED:
        return False
    root: Any = adapted.get_base_model()
    name = adapted.active_adapter
    root.add_module(NAME, LearnedPrompt(adapted.prompt_encoder[name], adapted.prompt_tokens[name]))
    root.register_forward_pre_hook(_prepend, with_kwargs=True)
    return True


def _prepend(model: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    prompt: LearnedPrompt = getattr(model, NAME)
    if not prompt.enabled:
        return args, given
    tokens = given.pop("input_ids")
    embeddings = model.get_input_embeddings()(tokens)
    prompts = prompt(len(tokens)).to(embeddings.dtype)
    given["inputs_embeds"] = torch.cat((prompts, embeddings), dim=1)
    for name in ("attention_mask", "labels"):
        if (beside := given.get(name)) is not None and beside.dim() == 2:  # a class is of a whole text
            given[name] = torch.cat((beside.new_zeros(prompts.shape[:2]), beside), dim=1)
    return args, given
