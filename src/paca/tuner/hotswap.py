"""Hot swap: put another adapter's values in the place of a loaded one's, within the same tensors.

PEFT's own `hotswap_adapter` takes LoRA only. For PaCA a swap moves `r` columns per layer, allocates nothing of the
model's size, and lets compiled graphs go on as they are.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn

from paca.config import PacaConfig
from paca.layers import PacaLayer, layers_of
from paca.layers.peft_calls import refuse_sharded
from paca.tuner.adapter_checks import DELTA, INDICES, check_adapter_tensors
from paca.tuner.adapter_file import shapes_in
from paca.tuner.column_choice import for_layer
from paca.tuner.recorded_quantization import quantizations, warn_of_another
from paca.tuner.registration import NAME
from paca.tuner.strange_expressions import try_expressions

_FILE_PREFIX = "base_model.model."
_FROM_THE_FILE = ("r", "rank_pattern", "paca_alpha", "alpha_pattern", "random_seed", "selection", "indices")
"""The settings that belong to the values; which modules are adapted stays as it is."""


@torch.no_grad()
def hotswap_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str) -> None:
    """Replace the values of `adapter_name` by those of the adapter in `folder`, in place.

    Deltas, columns and scales are replaced, and the modules that were trained whole. What was in the weights is taken
    out first, bit for bit, so the next forward pass sees the pretrained weights with the new columns. Costs
    `O(r * out_features)` per layer; no tensor is replaced by another, so nothing is compiled again. Gradients that
    were accumulated belong to other columns and are dropped. A forward pass that another thread runs meanwhile does no
    harm, but may see some layers before and some after the swap.

    Args:
        model: A `PeftModel`, compiled or not, or a model that `peft.inject_adapter_in_model` adapted.
        folder: Of an adapter of the same layers and ranks; its columns and its `paca_alpha` may differ.
        adapter_name: A loaded adapter, active or not. Keeps its name.

    Raises:
        ValueError: If there is no such adapter, if it is merged or sharded, or if the one in `folder` is no PaCA
            adapter, is broken, or has other layers or ranks. Nothing is changed then.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    if not isinstance(configs.get(adapter_name), PacaConfig):
        raise ValueError(
            f"There is no PaCA adapter {adapter_name!r} to replace; loaded are {', '.join(configs) or 'none'}."
        )
    config = _config_of(folder, model)
    root: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    layers = layers_of(root, adapter_name)
    refuse_sharded(layers.values(), "A hot swap")
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(
            f"Adapter {adapter_name!r} is merged into the weights, so it can't be replaced. Call unmerge_adapter() "
            "first."
        )
    if any(adapter_name in layer.folded for layer in layers.values()):
        raise ValueError(
            f"Adapter {adapter_name!r} was rotated, so it has more columns than it trains, and can't be replaced in "
            "place. Save it, and load the saved one under a name of its own (load_adapter)."
        )
    tensors = _named_as_in(root, layers, adapter_name, load_peft_weights(str(folder), device="cpu"))
    _check_ranks(layers, adapter_name, tensors)
    tensors = check_adapter_tensors(root, adapter_name, tensors)
    warn_of_another(adapter_name, config, quantizations(layers.values()))
    alphas = {name: for_layer(name, config.alpha_pattern, config.paca_alpha) for name in layers}

    for name, layer in layers.items():
        delta, indices = layer.paca_delta[adapter_name], layer.paca_indices[adapter_name]
        layer.park()
        _write(delta, tensors.pop(f"{name}.{DELTA}.{adapter_name}"))
        delta.grad = None  # of other columns
        _write(indices, tensors.pop(f"{name}.{INDICES}.{adapter_name}"))
        layer.paca_alpha[adapter_name] = alphas[name]
        layer.scaling[adapter_name] = alphas[name] / layer.r[adapter_name]
        layer.base_layer.columns.changed(adapter_name)
        layer.write()
    places = dict(root.named_parameters(remove_duplicate=False)) | dict(root.named_buffers(remove_duplicate=False))
    for name, tensor in tensors.items():
        _write(places[name], tensor)
    own = {name: getattr(config, name) for name in _FROM_THE_FILE}
    configs[adapter_name] = dataclasses.replace(configs[adapter_name], **own)


def _config_of(folder: str | os.PathLike[str], root: nn.Module) -> PacaConfig:
    for names in ((CONFIG_NAME,), (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        if not any((Path(folder) / name).is_file() for name in names):
            raise ValueError(f"{folder} holds no adapter: it has no {names[0]}. Give the folder that was saved.")
    peft_type = PeftConfig._get_peft_type(str(folder))
    if peft_type != NAME:
        raise ValueError(
            f"{folder} holds a {peft_type} adapter; a {NAME} adapter can be replaced by a {NAME} adapter only."
        )
    shapes_in(Path(folder))
    config = PacaConfig.from_pretrained(str(folder))
    if config.unusual:
        try_expressions(vars(config), root, Path(folder))
    return config


def _named_as_in(
    root: nn.Module, layers: dict[str, PacaLayer], adapter_name: str, from_file: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The file's tensors by the names that they have in `root`; unknown ones keep the file's name."""
    in_model = {f"{name}.{kind}": f"{name}.{kind}.{adapter_name}" for name in layers for kind in (DELTA, INDICES)}
    for name, module in root.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for in_file, in_wrapper in module.adapter_state_dict_load_map(adapter_name).items():
                in_model[f"{name}.{in_file}"] = f"{name}.{in_wrapper}"
    tensors = {name.removeprefix(_FILE_PREFIX): tensor for name, tensor in from_file.items()}
    missing = sorted(in_model.keys() - tensors.keys())
    if missing:
        raise ValueError(
            f"The adapter in the folder has no tensor {missing[0]}, which adapter {adapter_name!r} has: it adapts "
            "other layers. Load it under a name of its own (load_adapter), and switch with set_adapter."
        )
    return {in_model.get(name, name): tensor for name, tensor in tensors.items()}


def _check_ranks(layers: dict[str, PacaLayer], adapter_name: str, tensors: dict[str, Tensor]) -> None:
    for name, layer in layers.items():
        r = tensors[f"{name}.{INDICES}.{adapter_name}"].numel()
        if r != layer.r[adapter_name]:
            raise ValueError(
                f"{name} has r={r} in the folder, but adapter {adapter_name!r} has r={layer.r[adapter_name]} there; a "
                "swap in place needs equal ranks. Load it under a name of its own (load_adapter), and switch with "
                "set_adapter."
            )


def _write(place: Tensor, values: Tensor) -> None:
    with torch.inference_mode(place.is_inference()), torch.no_grad():  # inference_mode(False) switches gradients on
        place.copy_(values)
