"""The presets have the published models' sizes, and shrink by their own rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import init_empty_weights

from paca.bench.base_model import build_base_model, outline_of
from paca.bench.presets import PRESETS, ImageShape, TextShape
from paca.bench.settings import BenchSettings
from paca.messages.errors import PacaError

PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama3-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "qwen2.5-0.5b": 494_032_768,
    "smollm2-135m": 134_515_008,
    "vit-b16": 86_567_656,
    "efficientnet-v2-l": 118_515_272,
}


POSITIONS = {
    "llama2-7b": 4096,
    "llama2-13b": 4096,
    "llama3-8b": 8192,
    "llama3.1-70b": 131072,
    "qwen2.5-0.5b": 32768,
    "smollm2-135m": 8192,
}


def test_they_know_the_longest_sequence_that_the_published_model_was_made_for() -> None:
    shapes = {name: shape for name, shape in PRESETS.items() if isinstance(shape, TextShape)}
    assert {name: shape.config().max_position_embeddings for name, shape in shapes.items()} == POSITIONS


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_model(name: str) -> None:
    shape = PRESETS[name]
    if isinstance(shape, TextShape):
        model: Any = outline_of(shape, BenchSettings(model=name))
    else:
        with init_empty_weights():
            model = shape.make()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    assert set(PRESETS) == set(PUBLISHED)


def test_a_narrower_shape_keeps_its_heads_and_their_grouping() -> None:
    shape = PRESETS["llama3-8b"]
    assert isinstance(shape, TextShape)
    small = shape.resized(BenchSettings(hidden=1024, layers=4, vocab=256))
    assert (small.num_attention_heads, small.num_key_value_heads) == (8, 2)
    assert small.hidden_size // small.num_attention_heads == 128
    assert (small.intermediate_size, small.num_hidden_layers, small.vocab_size) == (3584, 4, 256)
    assert shape.resized(BenchSettings(hidden=1024, intermediate=512)).intermediate_size == 512
    with pytest.raises(PacaError, match="multiple of 512"):
        shape.resized(BenchSettings(hidden=1000))


def test_images_shrink_too_but_efficientnet_has_a_fixed_table() -> None:
    vit, efficientnet = PRESETS["vit-b16"], PRESETS["efficientnet-v2-l"]
    assert isinstance(vit, ImageShape)
    assert isinstance(efficientnet, ImageShape)
    small = vit.resized(BenchSettings(model="vit-b16", hidden=128, layers=1, image_size=32))
    assert (small.num_attention_heads, small.intermediate_size) == (2, 512)
    with pytest.raises(PacaError, match="fixed table"):
        efficientnet.resized(BenchSettings(layers=2))


def test_efficientnet_halves_its_image_five_times() -> None:
    model = PRESETS["efficientnet-v2-l"].make()  # type: ignore[union-attr]
    features = model.head(model.blocks(model.stem(torch.zeros(1, 3, 64, 96))))
    assert features.shape == (1, 1280, 2, 3)
    assert model.eval()(torch.zeros(1, 3, 64, 96)).shape == (1, 1000)


def test_settings_that_do_not_go_with_the_model_are_refused() -> None:
    with pytest.raises(PacaError, match="resizes presets only"):
        build_base_model(BenchSettings(model="some/folder", layers=2))
    with pytest.raises(PacaError, match="for language models"):
        build_base_model(BenchSettings(model="vit-b16", scope="blocks", device="cpu"))
