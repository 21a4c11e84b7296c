"""How long the texts are that a model was made for, by the configurations that transformers has."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from paca.pretrained.context_length import context_length

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
    assert context_length(config) == positions
