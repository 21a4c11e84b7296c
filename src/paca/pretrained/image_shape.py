"""The images that a model takes."""

from __future__ import annotations

from typing import Any

_SIZE = 224  # of a model whose config names none


def image_shape(config: Any) -> tuple[int, int, int]:
    """Channels, height and width that the model's own processor makes of any image."""
    if config.model_type == "timm_wrapper":
        return tuple(config.pretrained_cfg["input_size"])
    size = getattr(config, "image_size", None) or _SIZE
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(config, "num_channels", 3), height, width
