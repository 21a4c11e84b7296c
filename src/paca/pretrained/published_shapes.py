"""The published shapes that are known by name, to be planned for without a hub or filled with random weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from paca.messages.errors import PacaError
from paca.messages.install import how_to_install
from paca.messages.nearest import nearest


@dataclass(frozen=True)
class Shape:
    """A transformer, as in the config.json of its checkpoint."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    more: dict[str, Any] = field(default_factory=dict)
    """Further entries of the config, such as `vocab_size`, or `image_size` and `num_labels`."""

    @property
    def vision(self) -> bool:
        """Whether it classifies images; else it is a causal language model."""
        return "image_size" in self.more

    def resized(
        self,
        *,
        layers: int | None = None,
        hidden: int | None = None,
        intermediate: int | None = None,
        vocab: int | None = None,
        image_size: int | None = None,
    ) -> Shape:
        """With other sizes. The MLP follows the width; heads keep their size and their grouping.

        Raises:
            PacaError: The width is no whole number of groups of heads, or the model has no such size.
        """
        width = hidden or self.hidden_size
        head_size = self.hidden_size // self.num_attention_heads
        group = self.num_attention_heads // self.num_key_value_heads
        if width % (head_size * group) and width != self.hidden_size:
            raise PacaError(
                f"hidden is {width}; this shape has heads of {head_size} in groups of {group}, so it must be a "
                f"multiple of {head_size * group}."
            )
        changes = {key: size for key, size in (("vocab_size", vocab), ("image_size", image_size)) if size is not None}
        if strange := changes.keys() - self.more.keys():
            name = min(strange).replace("vocab_size", "vocab")
            raise PacaError(f"{name} does not go with a model of type {self.model_type}, which has none.")
        heads = width // head_size
        return replace(
            self,
            hidden_size=width,
            intermediate_size=intermediate or round(self.intermediate_size * width / self.hidden_size),
            num_hidden_layers=layers or self.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // group,
            more=self.more | changes,
        )

    def config(self) -> Any:
        """The transformers config."""
        from transformers import AutoConfig

        sizes = {name: value for name, value in vars(self).items() if name != "more"} | self.more
        if self.vision:
            del sizes["num_key_value_heads"]
        else:  # the published ids lie outside a shrunk vocabulary, and nothing is generated
            sizes |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        return AutoConfig.for_model(**sizes)


def _text(
    model_type: str, sizes: tuple[int, int, int, int, int], vocab_size: int, longest: int, theta: float, **more: Any
) -> Shape:
    rope = {"rope_type": "default", "rope_theta": theta, **more.pop("rope", {})}
    text = {"vocab_size": vocab_size, "max_position_embeddings": longest, "rope_parameters": rope}
    return Shape(model_type, *sizes, more=text | more)


_LLAMA_31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA_32_ROPE = {**_LLAMA_31_ROPE, "factor": 32.0}
_GEMMA_3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
}

SHAPES: dict[str, Shape] = {
    "llama2-7b": _text("llama", (4096, 11008, 32, 32, 32), 32000, 4096, 1e4),
    "llama2-13b": _text("llama", (5120, 13824, 40, 40, 40), 32000, 4096, 1e4),
    "llama3-8b": _text("llama", (4096, 14336, 32, 32, 8), 128256, 8192, 5e5),
    "llama3.1-8b": _text("llama", (4096, 14336, 32, 32, 8), 128256, 131072, 5e5, rope=_LLAMA_31_ROPE),
    "llama3.1-70b": _text("llama", (8192, 28672, 80, 64, 8), 128256, 131072, 5e5, rope=_LLAMA_31_ROPE),
    "llama3.2-1b": _text(
        "llama", (2048, 8192, 16, 32, 8), 128256, 131072, 5e5, rope=_LLAMA_32_ROPE, tie_word_embeddings=True
    ),
    "llama3.2-3b": _text(
        "llama", (3072, 8192, 28, 24, 8), 128256, 131072, 5e5, rope=_LLAMA_32_ROPE, tie_word_embeddings=True
    ),
    "mistral-7b": _text("mistral", (4096, 14336, 32, 32, 8), 32768, 32768, 1e6, sliding_window=None),
    "gemma3-1b": Shape(
        "gemma3_text",
        1152,
        6912,
        26,
        4,
        1,
        {
            "vocab_size": 262144,
            "max_position_embeddings": 32768,
            "head_dim": 256,
            "sliding_window": 512,
            "rope_parameters": _GEMMA_3_ROPE,
        },
    ),
    "qwen3-0.6b": _text("qwen3", (1024, 3072, 28, 16, 8), 151936, 40960, 1e6, head_dim=128, tie_word_embeddings=True),
    "qwen3-4b": _text("qwen3", (2560, 9728, 36, 32, 8), 151936, 40960, 1e6, head_dim=128, tie_word_embeddings=True),
    "qwen3-8b": _text("qwen3", (4096, 12288, 36, 32, 8), 151936, 40960, 1e6, head_dim=128),
    "qwen3-14b": _text("qwen3", (5120, 17408, 40, 40, 8), 151936, 40960, 1e6, head_dim=128),
    "qwen3-32b": _text("qwen3", (5120, 25600, 64, 64, 8), 151936, 40960, 1e6, head_dim=128),
    "qwen3-30b-a3b": _text(
        "qwen3_moe",
        (2048, 6144, 48, 32, 4),
        151936,
        40960,
        1e6,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    ),
    "qwen2.5-0.5b": _text("qwen2", (896, 4864, 24, 14, 2), 151936, 32768, 1e6, tie_word_embeddings=True),
    "smollm2-135m": _text("llama", (576, 1536, 30, 9, 3), 49152, 8192, 1e5, tie_word_embeddings=True),
    "vit-b16": Shape("vit", 768, 3072, 12, 12, 12, {"image_size": 224, "num_labels": 1000}),
}

TIMM = {"efficientnetv2-l": "tf_efficientnetv2_l.in21k"}
"""Image models whose shapes the package timm knows by its own name for them; they are only planned for."""


def timm_config(name: str) -> Any:
    """The transformers config of a model of `TIMM`, as its checkpoint on the hub has it.

    Raises:
        PacaError: The package timm is not installed.
    """
    try:
        from timm.models import get_pretrained_cfg
    except ImportError as error:
        raise PacaError(f"The shape of {name} is timm's. {how_to_install('vision', 'timm')}") from error
    from transformers import AutoConfig

    published = get_pretrained_cfg(TIMM[name])
    assert published is not None
    return AutoConfig.for_model(
        "timm_wrapper", architecture=published.architecture, pretrained_cfg={"input_size": list(published.input_size)}
    )


def check_not_a_mistyped_shape(name: str) -> None:
    """Raise PacaError for a name that is no shape but nearly one: looking for it on the hub would only cost time."""
    if "/" in name or Path(name).expanduser().exists() or name.lower().endswith(".gguf"):
        return
    close = nearest(name.lower(), SHAPES, cutoff=0.6)
    if close:
        raise PacaError(
            f"There is no model {name!r} here, and no preset of that name. Did you mean {close}? The presets are "
            f"{', '.join(SHAPES)}. A model of the hub is given as owner/name."
        )
