"""How long the texts are that a model was made for, by the configurations that transformers has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    BartConfig,
    BertConfig,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MPNetConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    RobertaConfig,
    XLMRobertaConfig,
)

from paca.pretrained.context_length import context_length, position_table

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama(**settings: Any) -> PreTrainedConfig:
    return LlamaConfig(max_position_embeddings=2048, **settings)


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (llama(), 2048),
        (GPT2Config(), 1024),
        (Gemma3TextConfig(), 131072),  # rotary settings by kind of layer
        (llama(rope_scaling={"rope_type": "linear", "factor": 2.0}), 4096),
        (llama(rope_scaling={"rope_type": "dynamic", "factor": 3.0}), 6144),
        (Qwen2Config(max_position_embeddings=32768, rope_scaling=YARN), 131072),
        (LlamaConfig(max_position_embeddings=131072, rope_scaling=LLAMA_3_1), 131072),
        (FalconConfig(alibi=True), None),
        (BloomConfig(), None),
        (MambaConfig(), None),
    ],
)
def test_what_a_model_was_made_for(config: PreTrainedConfig, positions: int | None) -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert context_length(model) == positions
    assert position_table(model) == (1024 if isinstance(config, GPT2Config) else None)


SMALL: dict[str, Any] = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
BESIDE: dict[str, Any] = {"intermediate_size": 8, "max_position_embeddings": 34, "pad_token_id": 1}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (BertConfig(**SMALL, **BESIDE), 34),
        (RobertaConfig(**SMALL, **BESIDE), 32),
        (XLMRobertaConfig(**SMALL, **BESIDE), 32),
        (MPNetConfig(**SMALL, **BESIDE), 32),
        (GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=34), 34),
        (OPTConfig(**SMALL, ffn_dim=8, word_embed_proj_dim=8, max_position_embeddings=34), 34),
        (BartConfig(vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, max_position_embeddings=34), 34),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_a_model_reads_as_many_positions_as_its_table_has_and_no_more(config: PreTrainedConfig, positions: int) -> None:
    model = AutoModel.from_config(config).eval()
    assert context_length(model) == position_table(model) == positions
    with torch.no_grad():
        model(input_ids=torch.full((1, positions), 3))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, positions + 1), 3))
