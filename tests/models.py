"""Small models for tests: a two-layer perceptron, and tiny random configs of real architectures."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import paca


class Perceptron(nn.Module):
    """`lin1` (a Linear or Conv1D), tanh, `lin2`: odd sizes, with bias."""

    def __init__(self, kind: str = "linear", width: int = 13) -> None:
        super().__init__()
        self.lin1 = nn.Linear(7, width) if kind == "linear" else Conv1D(width, 7)
        self.lin2 = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(torch.tanh(self.lin1(x)))


def perceptron(kind: str = "linear", dtype: torch.dtype = torch.float32, seed: int = 0) -> Perceptron:
    torch.manual_seed(seed)
    model = Perceptron(kind)
    if kind != "linear":
        nn.init.normal_(model.lin1.bias)  # a Conv1D starts with zeros there
    return model.to(dtype)


def llama(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **settings}))


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    )


def tokens(batch: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def adapt(model: nn.Module, adapter_name: str = "default", **settings: Any) -> Any:
    """Put PaCA into `model`, with random deltas unless told otherwise (zero ones would hide mistakes), and columns
    drawn one by one (a small layer is a single block)."""
    config = paca.PacaConfig(**{"r": 3, "paca_alpha": 6, "init_weights": False, "selection": "random", **settings})
    return peft.get_peft_model(model, config, adapter_name=adapter_name)


def adapted_perceptron(kind: str = "linear", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    return adapt(perceptron(kind, dtype), **{"target_modules": ["lin1", "lin2"], **settings})


def base_state(model: Any) -> dict[str, Tensor]:
    """The base model's state dict as PEFT hands it out, copied."""
    from peft.utils.save_and_load import get_base_model_state_dict

    return {k: v.clone() for k, v in get_base_model_state_dict(model).items()}
