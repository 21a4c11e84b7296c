"""What PEFT's wrapper puts before the input, for a plan, which runs the model inside: tokens (prompt tuning, P-tuning,
CPT), or keys and values of each layer (prefix tuning, Cartridge).
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.utils import PeftType
from torch import Tensor, nn
from transformers import DynamicCache

from paca.pretrained.generation_settings import LEARNED_CACHES

NAME = "learned_prompt"
"""The module's name in the model; `.` follows it in its parameters' names."""
_PREPENDED = (PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.CPT)


class LearnedPrompt(nn.Module):
    """PEFT's prompt encoder, and the tokens that it reads.

    Attributes:
        states: Layers and heads of the keys and values that it gives; None where it gives embeddings.
    """

    def __init__(self, encoder: nn.Module, tokens: Tensor, states: tuple[int, int] | None) -> None:
        super().__init__()
        self.encoder, self.states, self.enabled = encoder, states, True
        self.tokens: Tensor
        self.register_buffer("tokens", tokens, persistent=False)

    def enable_adapters(self, enabled: bool) -> None:
        """As layers of PEFT."""
        self.enabled = enabled

    def forward(self, batch_size: int) -> Tensor:
        """Of shape `(batch_size, prompt's tokens, width)`; keys and values of all layers are side by side."""
        learned: Tensor = self.encoder(self.tokens.expand(batch_size, -1))
        return learned

    def fill(self, cache: Any, batch_size: int, model: Any) -> None:
        """Put the keys and values into a cache that holds none, for the layers that a model has, of those it had."""
        layers, heads = self.states or (0, 0)
        learned = self(batch_size).to(model.dtype).unflatten(-1, (layers, 2, heads, -1)).permute(2, 3, 0, 4, 1, 5)
        for number, (keys, values) in enumerate(learned[: model.config.get_text_config().num_hidden_layers]):
            cache.update(keys, values, number)


def cached_tokens(model: nn.Module) -> int | None:
    """How many tokens' keys and values a model learns; None where it learns the tokens themselves, so that nothing is
    kept from one answered token to the next.
    """
    prompt = getattr(model, NAME, None)
    if prompt is None:
        return 0
    return None if prompt.states is None else prompt.tokens.shape[-1]


def put_inside(adapted: PeftModel) -> bool:
    """Let the model in `adapted` prepend the prompt itself, in each pass. False, and nothing done, for another method
    that adds to the input.
    """
    config: Any = adapted.active_peft_config
    if config.peft_type not in (*_PREPENDED, *LEARNED_CACHES):
        return False
    root: Any = adapted.get_base_model()
    name = adapted.active_adapter
    states = (config.num_layers, config.num_attention_heads) if config.peft_type in LEARNED_CACHES else None
    root.add_module(NAME, LearnedPrompt(adapted.prompt_encoder[name], adapted.prompt_tokens[name], states))
    root.register_forward_pre_hook(_prepend if states is None else _fill, with_kwargs=True)
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


def _fill(model: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    prompt: LearnedPrompt = getattr(model, NAME)
    if not prompt.enabled:
        return args, given
    rows = len(given["input_ids"])
    cache = given.setdefault("past_key_values", DynamicCache())
    if not cache.get_seq_length():
        prompt.fill(cache, rows, model)
    if (mask := given.get("attention_mask")) is not None:
        given["attention_mask"] = torch.cat((mask.new_ones(rows, prompt.tokens.shape[-1]), mask), dim=1)
    return args, given
