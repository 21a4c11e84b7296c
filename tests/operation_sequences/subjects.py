"""The models that sequences run on: tiny, in float64, of every kind of layer that holds columns in its weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expert_models import STACKS, gpt_oss, mixtral
from models import llama

VOCABULARY = 29
SAMPLES = 3


class Words(nn.Module):
    """An embedding, two convolutions (one grouped), and a linear layer: logits `(samples, length, vocabulary)`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6, padding_idx=0)
        self.first = nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular")
        self.second = nn.Conv1d(8, 6, 3, padding="same", groups=2)
        self.out = nn.Linear(6, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens).mT
        return self.out(torch.tanh(self.second(torch.tanh(self.first(hidden)))).mT)


@dataclass(frozen=True)
class Subject:
    """A kind of model. What it makes is the same each time."""

    name: str
    stock: Callable[[], Any]
    """The model before it is adapted, in float64."""
    targets: dict[str, Any]
    """The settings of a `PacaConfig` that select its layers."""
    column_dim: int = 1
    """The dimension of a weight that runs over its columns."""
    delta_dim: int = 1
    """The dimension of a delta that runs over them."""
    is_transformer: bool = True
    """Whether it generates, and checkpoints its blocks by itself."""
    low_precision: bool = False
    """Whether it may be cast to bfloat16 and compared still (a router's choices may not: they jump)."""


def _llama() -> Any:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 12, "intermediate_size": 16, "num_attention_heads": 2}
    return llama(**sizes, num_key_value_heads=1, use_cache=False).double()


def _words() -> nn.Module:
    torch.manual_seed(0)
    return Words().double()


def _experts(family: Callable[..., Any], implementation: str) -> Callable[[], Any]:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6, "use_cache": False}
    return lambda: family(implementation, **sizes, **heads).double()


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject("llama", _llama, {"target_modules": ["q_proj", "v_proj", "down_proj"]}, low_precision=True),
        Subject(
            "words",
            _words,
            {"target_modules": ["embed", "first", "second", "out"]},
            is_transformer=False,
            low_precision=True,
        ),
        Subject(
            "mixtral",
            _experts(mixtral, "eager"),
            {"target_parameters": STACKS},
            column_dim=2,
            delta_dim=2,
        ),
        Subject(
            "gpt-oss",
            _experts(gpt_oss, "batched_mm"),
            {"target_parameters": STACKS},
            column_dim=1,
            delta_dim=2,
        ),
    )
}
"""By name. Of the two kinds of experts, one stores `(experts, out, in)` and loops, the other `(experts, in, out)` and
multiplies a batch of matrices (the grouped kernel has no float64)."""


def tokens(seed: int) -> Tensor:
    """A batch `(samples, length)`."""
    return torch.randint(1, VOCABULARY, (SAMPLES, 4), generator=torch.Generator().manual_seed(seed))


def logits_of(output: Any) -> Tensor:
    return getattr(output, "logits", output)
