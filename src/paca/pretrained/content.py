"""What a model is, whatever it is called: a hash of its settings, its weights and its tokenizer."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

_VALUES_COMPARED = 1024
"""Of each tensor, with their places. Of all others the sum counts."""
_AT_A_TIME = 1 << 20
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def model_content(model: Any, tokenizer: Any = None) -> str:
    """A hash of a model as it is in memory, and of its tokenizer.

    Every value counts, some of them with their places. Of tensors of special classes, such as weights quantized by
    torchao or bitsandbytes, only names and shapes do, and the scales that lie beside them.

    Args:
        model: Before an adapter is put in.
        tokenizer: None, or one of transformers; of others, such as a processor of images, the settings count.
    """
    digest = hashlib.sha256()
    settings = model.config.to_diff_dict() if hasattr(model, "config") else {}
    about = {name: value for name, value in settings.items() if name not in ("transformers_version", "_name_or_path")}
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{_values(tensor)}".encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        digest.update(f"{backend.to_str()}{tokenizer.special_tokens_map}{tokenizer.chat_template}".encode())
    elif hasattr(tokenizer, "get_vocab"):  # one that is written in Python
        tokens = sorted(tokenizer.get_vocab().items())
        digest.update(f"{tokens}{tokenizer.special_tokens_map}{tokenizer.chat_template}".encode())
    elif hasattr(tokenizer, "to_json_string"):
        digest.update(tokenizer.to_json_string().encode())
    return digest.hexdigest()


def _values(tensor: Tensor) -> list[int]:
    """The sum of a tensor's words, and some of them."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or not tensor.numel():
        return []
    if tensor.dtype not in _WORDS.values():
        tensor = tensor.detach().reshape(-1).view(_WORDS[min(8, tensor.element_size())])
    words = tensor.reshape(-1)
    total = sum(int(part.sum(dtype=torch.int64)) for part in words.split(_AT_A_TIME))
    # A stride that shares a factor with the width would look at some columns only.
    places = torch.arange(_VALUES_COMPARED, dtype=torch.int64) * 2654435761 % words.numel()
    return [total, *words[places.to(words.device)].tolist()]
