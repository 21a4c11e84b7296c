"""Adapters that a run leaves as a plain LoRA on the model as it came, since PEFT would not bring them back as they are.

CorDA, LoRA-GA and PiSSA by a randomized SVD took from the weights what the adapter began with, B₀A₀, and PEFT saves the
adapter alone: such a LoRA adds BA - B₀A₀. AdaMSS adds a product too, whose rows lie in clusters that PEFT looks for
anew at each load, and in another dtype or on another device it finds others.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.adamss.layer import AdamssLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paca.messages.errors import PacaError
from paca.pretrained.changed_base import not_saved
from paca.training.config.run_config import RunConfig

_NAME = "default"
_FACTOR = re.compile(r"\.lora_[AB]\.")


def save_as_plain_lora(adapter: Path, model: Any, config: RunConfig, start: Path) -> None:
    """Put a plain LoRA in the place of an adapter that would not come back; others stay as they are.

    Args:
        adapter: The folder that PEFT saved it to.
        model: Which has it.
        config: The resolved run.
        start: What it began with.
    """
    file = adapter / "adapter_model.safetensors"
    if not_saved(config.adapter):
        tensors, plain = _without_start(model, load_file(file), load_file(start))
    elif config.adapter.get("peft_type") == "ADAMSS":
        tensors, plain = _with_clusters(model, load_file(file))
    else:
        return
    save_file(tensors, file, metadata={"format": "pt"})
    plain.inference_mode = True
    plain.save_pretrained(str(adapter))


def _without_start(
    model: Any, trained: dict[str, Tensor], began: dict[str, Tensor]
) -> tuple[dict[str, Tensor], LoraConfig]:
    """[A, A₀] and [B, -B₀]: twice the rank, at the same scales."""
    for key, tensor in began.items():
        first = ".lora_A." in key  # (r, in); the other is (out, r)
        other = tensor.to(trained[key]) if first else -tensor.to(trained[key])
        trained[key] = torch.cat([trained[key], other], dim=0 if first else 1)
    plain = copy.deepcopy(model.peft_config[_NAME])
    alpha = 2**0.5 if plain.use_rslora else 2
    plain.init_lora_weights, plain.corda_config, plain.lora_ga_config = True, None, None
    plain.r, plain.lora_alpha = 2 * plain.r, alpha * plain.lora_alpha
    plain.rank_pattern = {key: 2 * rank for key, rank in (plain.rank_pattern or {}).items()}
    plain.alpha_pattern = {key: alpha * given for key, given in (plain.alpha_pattern or {}).items()}
    return trained, plain


def _with_clusters(model: Any, trained: dict[str, Tensor]) -> tuple[dict[str, Tensor], LoraConfig]:
    """AdaMSS's projection is A, and B has its factors' products, each at its rows; the bias is one more column."""
    tensors, ranks = {key: tensor for key, tensor in trained.items() if ".adamss_" not in key}, {}
    for key, layer in _clustered(model):
        projection = layer.adamss_newB[_NAME].float()  # (rank, in), or one more
        factors = zip(layer.adamss_B[_NAME], layer.adamss_A[_NAME], strict=True)
        rows = torch.cat([(b.float() @ a.float()).detach() for b, a in factors])  # (out, rank)
        product = torch.empty_like(rows)
        product[layer.scatter_index[_NAME].to(rows.device)] = rows
        if biased := layer.get_base_layer().bias is not None:
            tensors[f"{key}.lora_B.bias"] = product @ projection[:, -1]
            projection = projection[:, :-1]
        tensors[f"{key}.lora_A.weight"] = projection
        tensors[f"{key}.lora_B.weight"] = product
        ranks[key.removeprefix("base_model.model.")] = len(projection)
    r = max(ranks.values())
    others = {key: rank for key, rank in ranks.items() if rank != r}
    asked = model.peft_config[_NAME]
    kept = ("task_type", "base_model_name_or_path", "revision", "modules_to_save")
    plain = LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=others,
        alpha_pattern=dict(others),
        lora_bias=biased,
        target_modules=list(ranks),
        **{name: getattr(asked, name) for name in kept},
    )
    return {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, plain


def bytes_besides(model: nn.Module, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Bytes that a run's adapter, and one in a checkpoint, has besides what is trained of it.

    Args:
        model: With its adapter; weights are not needed.
        settings: Of the adapter.
    """
    if not_saved(settings):
        return sum(weight.nbytes for name, weight in model.named_parameters() if _FACTOR.search(name)), 0
    layers = [layer for _, layer in _clustered(model)]
    projections = [layer.adamss_newB[_NAME] for layer in layers]  # as wide as the input: not trained, and saved
    trained = sum(weight.nbytes for layer in layers for weight in layer.parameters() if weight.requires_grad)
    products = sum(4 * len(one) * layer.out_features for one, layer in zip(projections, layers, strict=True))
    frozen = sum(projection.nbytes for projection in projections)
    return frozen + products - trained, frozen


def check_clusters(model: nn.Module) -> None:
    """Refuse AdaMSS on layers of which only some have a bias: it trains these, and in a plain LoRA all have one.

    Args:
        model: With its adapter; weights are not needed.

    Raises:
        PacaError: It is such a model.
    """
    with_bias = {layer.get_base_layer().bias is not None: key for key, layer in _clustered(model)}
    if len(with_bias) > 1:
        raise PacaError(
            f"ADAMSS trains biases, and what a run leaves of it has them in all layers or in none: {with_bias[True]} "
            f"has one, {with_bias[False]} has none. Name layers of one of these kinds with peft.target_modules."
        )


def _clustered(model: nn.Module) -> list[tuple[str, Any]]:
    return [(key, layer) for key, layer in model.named_modules() if isinstance(layer, AdamssLayer)]
