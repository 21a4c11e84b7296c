"""LoRA adapters whose A picks single inputs, such as `paca export --to lora` writes, read back as PaCA."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from paca.convert.adapter import FILE_PREFIX
from paca.convert.foreign import ForeignAdapter, ForeignLayer, take_pairs
from paca.convert.lora import LORA_A, LORA_B
from paca.messages.errors import PacaError


def read_one_hot_lora(config: LoraConfig, tensors: dict[str, Tensor]) -> ForeignAdapter:
    """Read `B` as the delta, unchanged, and LoRA's scale as ours.

    Raises:
        PacaError: A variant of LoRA that is more than `B A`, or an A that is not one-hot; the layer is named.
    """
    for option in ("use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", "layer_replication"):
        if getattr(config, option, None):
            raise PacaError(f"This LoRA adapter has {option} set, which PaCA can't express.")
    pairs, others = take_pairs(tensors, LORA_A, LORA_B)
    layers = {
        name: ForeignLayer(b, _picked_inputs(name, a), _scale(config, name, a.shape[0]))
        for name, (a, b) in pairs.items()
    }
    return ForeignAdapter("LoRA with a one-hot A", layers, others)


def _picked_inputs(name: str, a: Tensor) -> Tensor:
    """The inputs that `a (r, in_features)` picks, `(r,)` int64."""
    if a.dim() == 2 and bool(((a != 0).sum(dim=1) == 1).all()) and bool((a.sum(dim=1) == 1).all()):
        picked = a.float().argmax(dim=1)
        if picked.unique().numel() == picked.numel():
            return picked.to(torch.int64)
    raise PacaError(
        f"{FILE_PREFIX}{name}.{LORA_A} does not pick single inputs (one 1 in each row, in different columns): this is "
        "a LoRA adapter that PaCA can't express. Only those that `paca export --to lora` wrote can be imported."
    )


def _scale(config: LoraConfig, name: str, rank: int) -> float:
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    r = ranks.get(get_pattern_key(list(ranks), name), config.r)
    if r != rank:
        raise PacaError(f"{FILE_PREFIX}{name}.{LORA_A} has {rank} rows, but the adapter's config says r={r} there.")
    alpha: float = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    return alpha / (math.sqrt(r) if config.use_rslora else r)


def lora_config(settings: dict[str, Any]) -> LoraConfig:
    """The settings of an `adapter_config.json` as PEFT reads them.

    Raises:
        PacaError: PEFT refuses them.
    """
    try:
        return LoraConfig.from_peft_type(**settings)
    except (TypeError, ValueError) as error:
        raise PacaError(f"The adapter_config.json of this LoRA adapter is refused by PEFT: {error}") from error
