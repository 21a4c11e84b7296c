"""The shapes known by name have the published models' sizes, and shrink by their own rules."""

from __future__ import annotations

import pytest
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from paca.messages.errors import PacaError
from paca.pretrained.published_shapes import SHAPES, check_not_a_mistyped_shape, timm_config

PARAMETERS = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama3-8b": 8_030_261_248,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_248_023_552,
    "gemma3-1b": 999_885_952,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen2.5-0.5b": 494_032_768,
    "smollm2-135m": 134_515_008,
    "vit-b16": 86_567_656,
}
POSITIONS = {
    "llama2-7b": 4096,
    "llama2-13b": 4096,
    "llama3-8b": 8192,
    "llama3.1-8b": 131072,
    "llama3.1-70b": 131072,
    "llama3.2-1b": 131072,
    "llama3.2-3b": 131072,
    "mistral-7b": 32768,
    "gemma3-1b": 32768,
    "qwen3-0.6b": 40960,
    "qwen3-4b": 40960,
    "qwen3-8b": 40960,
    "qwen3-14b": 40960,
    "qwen3-32b": 40960,
    "qwen3-30b-a3b": 40960,
    "qwen2.5-0.5b": 32768,
    "smollm2-135m": 8192,
}


def test_they_know_the_longest_sequence_that_the_published_model_was_made_for() -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if not shape.vision}
    assert {name: shape.config().max_position_embeddings for name, shape in shapes.items()} == POSITIONS
    assert shapes["llama3.1-70b"].config().rope_parameters["rope_type"] == "llama3"
    assert shapes["llama3-8b"].config().rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_published_model(name: str) -> None:
    shape = SHAPES[name]
    kind = AutoModelForImageClassification if shape.vision else AutoModelForCausalLM
    with init_empty_weights():
        model = kind.from_config(shape.config())
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert set(SHAPES) == set(PARAMETERS)


def test_the_parameters_of_a_shape_of_timm_are_the_published_ones() -> None:
    config = timm_config("efficientnetv2-l")
    config.num_labels = 1000
    with init_empty_weights():
        model = AutoModelForImageClassification.from_config(config)
    # 118.52 million with ImageNet's labels: results-imagenet.csv of timm.
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == 118.52
    assert config.pretrained_cfg["input_size"] == [3, 384, 384]


def test_a_narrower_shape_keeps_its_heads_and_their_grouping() -> None:
    shape = SHAPES["llama3-8b"]
    small = shape.resized(hidden=1024, layers=4, vocab=256)
    assert (small.num_attention_heads, small.num_key_value_heads) == (8, 2)
    assert small.hidden_size // small.num_attention_heads == 128
    assert (small.intermediate_size, small.num_hidden_layers, small.more["vocab_size"]) == (3584, 4, 256)
    assert shape.resized(hidden=1024, intermediate=512).intermediate_size == 512
    assert shape.resized() == shape
    with pytest.raises(PacaError, match="multiple of 512"):
        shape.resized(hidden=1000)
    with pytest.raises(PacaError, match="image_size does not go with a model of type llama"):
        shape.resized(image_size=32)


def test_images_shrink_too() -> None:
    small = SHAPES["vit-b16"].resized(hidden=128, layers=1, image_size=32)
    assert (small.num_attention_heads, small.intermediate_size) == (2, 512)
    assert small.config().image_size == 32
    with pytest.raises(PacaError, match="vocab does not go with a model of type vit"):
        small.resized(vocab=10)


def test_a_name_that_is_nearly_a_shape_is_not_looked_for_elsewhere() -> None:
    with pytest.raises(PacaError, match=r"Did you mean llama3-8b\?"):
        check_not_a_mistyped_shape("lama3-8b")
    check_not_a_mistyped_shape("meta-llama/llama3-8b")
