"""The published shapes that `paca bench` knows by name, to be filled with random weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from paca.bench.settings import BenchSettings
from paca.messages.errors import PacaError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class TextShape:
    """A decoder of transformers, as in the config.json of its checkpoint."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rope_parameters: dict[str, Any]
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    def resized(self, settings: BenchSettings) -> TextShape:
        """With fewer blocks, a smaller vocabulary or another width; heads keep their size and their grouping.

        Raises:
            PacaError: the width is not a whole number of groups of heads.
        """
        shape = replace(
            self,
            num_hidden_layers=settings.layers or self.num_hidden_layers,
            vocab_size=settings.vocab or self.vocab_size,
        )
        hidden = settings.hidden or self.hidden_size
        head_size = self.hidden_size // self.num_attention_heads
        group = self.num_attention_heads // self.num_key_value_heads
        if hidden % (head_size * group) and hidden != self.hidden_size:
            raise PacaError(
                f"hidden is {hidden}; this shape has heads of {head_size} in groups of {group}, so it must be a "
                f"multiple of {head_size * group}."
            )
        heads = hidden // head_size
        return replace(
            shape,
            hidden_size=hidden,
            intermediate_size=settings.intermediate or round(self.intermediate_size * hidden / self.hidden_size),
            num_attention_heads=heads,
            num_key_value_heads=heads // group,
        )

    def config(self) -> Any:
        """The transformers config."""
        from transformers import AutoConfig

        return AutoConfig.for_model(
            self.model_type,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            rope_parameters=self.rope_parameters,
            max_position_embeddings=self.max_position_embeddings,
            tie_word_embeddings=self.tie_word_embeddings,
            bos_token_id=None,  # the published ids lie outside a shrunk vocabulary, and nothing here generates
            eos_token_id=None,
            pad_token_id=None,
            **self.more,
        )


@dataclass(frozen=True)
class ImageShape:
    """An image classifier: ViT-B/16, or EfficientNetV2-L when `hidden_size` is None."""

    image_size: int
    num_labels: int = 1000
    hidden_size: int | None = None
    intermediate_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0

    def resized(self, settings: BenchSettings) -> ImageShape:
        """With fewer blocks or another width or image.

        Raises:
            PacaError: EfficientNetV2-L was asked to shrink, or the width is no whole number of heads.
        """
        image_size = settings.image_size or self.image_size
        if self.hidden_size is None:
            if settings.layers or settings.hidden or settings.intermediate:
                raise PacaError("efficientnet-v2-l has a fixed table of blocks; only image_size can change.")
            return replace(self, image_size=image_size)
        hidden = settings.hidden or self.hidden_size
        head_size = self.hidden_size // self.num_attention_heads
        if hidden % head_size:
            raise PacaError(f"hidden is {hidden}; this shape has heads of {head_size}, so it must be a multiple of it.")
        return replace(
            self,
            image_size=image_size,
            hidden_size=hidden,
            intermediate_size=settings.intermediate or round(self.intermediate_size * hidden / self.hidden_size),
            num_hidden_layers=settings.layers or self.num_hidden_layers,
            num_attention_heads=hidden // head_size,
        )

    def make(self) -> nn.Module:
        """The model, on the current default device."""
        if self.hidden_size is None:
            from paca.bench.efficientnet_v2 import EfficientNetV2L

            return EfficientNetV2L(self.num_labels)
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            image_size=self.image_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
        )
        config.num_labels = self.num_labels
        return ViTForImageClassification(config)


def _rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


_LLAMA_31_ROPE = _rope(
    500000.0,
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)

PRESETS: dict[str, TextShape | ImageShape] = {
    "llama2-7b": TextShape("llama", 32000, 4096, 11008, 32, 32, 32, _rope(10000.0), 4096),
    "llama2-13b": TextShape("llama", 32000, 5120, 13824, 40, 40, 40, _rope(10000.0), 4096),
    "llama3-8b": TextShape("llama", 128256, 4096, 14336, 32, 32, 8, _rope(500000.0), 8192),
    "llama3.1-70b": TextShape("llama", 128256, 8192, 28672, 80, 64, 8, _LLAMA_31_ROPE, 131072),
    "qwen2.5-0.5b": TextShape("qwen2", 151936, 896, 4864, 24, 14, 2, _rope(1000000.0), 32768, tie_word_embeddings=True),
    "smollm2-135m": TextShape("llama", 49152, 576, 1536, 30, 9, 3, _rope(100000.0), 8192, tie_word_embeddings=True),
    "vit-b16": ImageShape(224, 1000, 768, 3072, 12, 12),
    "efficientnet-v2-l": ImageShape(384),
}
