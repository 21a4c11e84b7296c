"""Weights that columns can't be in: a part of one, a piece of something larger, or one that somebody else wrote."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from paca.columns.lost import names_of
from paca.columns.state import AdapterColumns, is_sharded

TAKEN_APART = {"_fsdp_flattened", "ds_id"}  # what FSDP1 and DeepSpeed's ZeRO-3 set on parameters


def refuse_flattened(weight: Tensor) -> None:
    """Raise `RuntimeError` under ZeRO-3 and FSDP1, and if the weight was offloaded.

    What is written into a piece of FSDP1's flat parameter is lost, and it has no version counter and no memory of its
    own by which others' writes could be seen.
    """
    if isinstance(weight, torch.fx.Proxy):  # which has every attribute
        raise RuntimeError(
            "torch.fx.symbolic_trace runs a model without values, and layers that PaCA adapts look at their weights. "
            "Trace the merged model (merge_and_unload), or use torch.compile, which traces adapted ones."
        )
    if hasattr(weight, "ds_id"):
        raise RuntimeError(
            "DeepSpeed's ZeRO-3 took weights apart that PaCA keeps columns in: the model was adapted before ZeRO-3 was "
            "known. Make the Accelerator or the TrainingArguments first, then load and adapt the model (columns are "
            "added to outputs then); or use FSDP2, or ZeRO stage 1 or 2."
        )
    if weight.is_meta:
        raise RuntimeError(
            "Something took a weight away that PaCA keeps columns in, as accelerate's cpu_offload, disk_offload and "
            "dispatch_model do: what comes back later has no columns. Offload the model first and adapt it then, so "
            "that columns are added to outputs; or unload() the adapter before."
        )
    # Two attributes that are not public (torch 2.13): of the parameter, and of what it is a view of in a pass.
    flat: Any = weight if isinstance(weight, nn.Parameter) else weight._base
    if hasattr(flat, "_fsdp_flattened") or hasattr(flat, "_is_flat_param"):
        raise RuntimeError(
            "A layer that PaCA adapts is wrapped by FSDP1 (FullyShardedDataParallel), which keeps weights flattened. "
            "PaCA can't write columns there. Use FSDP2 (fully_shard, or fsdp_version: 2 for accelerate)."
        )


def refuse_part(weight: Tensor, resident: tuple[AdapterColumns, ...]) -> None:
    """Raise `RuntimeError` if a layer is about to run on a part of its weight (tensor parallelism, ZeRO-3, FSDP1), or
    on one that was quantized while columns were in it."""
    refuse_flattened(weight)
    if weight.dim() < 2:
        raise RuntimeError(
            f"A weight that PaCA trains columns of has the shape {tuple(weight.shape)}: something takes weights away "
            "between uses, or flattens them. Use FSDP2 (fully_shard), or ZeRO stage 1 or 2."
        )
    if is_sharded(weight):
        raise RuntimeError(
            "A layer that PaCA adapts runs on a sharded weight (a DTensor), as tensor parallelism does it. That is not "
            "supported: its gradients would be wrong. FSDP2 (fully_shard) is. Train with DistributedDataParallel, or "
            "leave the layer out of target_modules."
        )
    if resident and is_traceable_wrapper_subclass(weight):
        raise RuntimeError(
            f"A weight that PaCA trains columns of was replaced by a {type(weight).__name__}, as torchao's quantize_ "
            "does it. Quantize the model first and adapt it then; or merge_and_unload() the adapter before."
        )


def refuse_computed(adapters: list[str]) -> None:
    """Raise `RuntimeError`: the weight is no parameter any more, so that what is written into it is lost."""
    raise RuntimeError(
        f"The weight of a layer adapted by {', '.join(map(repr, adapters))} is computed anew at each use "
        "(torch.nn.utils.parametrize, weight_norm, prune), so PaCA can't write columns into it. Take that off "
        "(remove_parametrizations, remove_weight_norm, prune.remove), or leave the layer out of target_modules."
    )


def refuse_computed_delta(adapters: list[str]) -> None:
    """Raise `RuntimeError` if there are any: their deltas are no parameters any more, so no step of them is seen."""
    if adapters:
        raise RuntimeError(
            f"The columns of adapter {', '.join(map(repr, adapters))} are computed anew at each use "
            "(torch.nn.utils.parametrize or prune on paca_delta), so PaCA can't keep them in the weight. Take that off "
            "(remove_parametrizations, prune.remove); change columns in place after a step instead."
        )


def refuse_replaced(kind: str) -> None:
    """Raise `RuntimeError`: another library is about to replace a module whose weight holds columns."""
    raise RuntimeError(
        f"A layer that PaCA adapts can't be replaced by a {kind}, as torchao's QAT and functions that quantize a model "
        "do it. Change the model first and adapt it then; or unload() or merge_and_unload() the adapter before."
    )


def refuse_sharded_delta(adapter_name: str) -> None:
    """Raise `RuntimeError`: a delta is sharded, over a weight that is not."""
    raise RuntimeError(
        f"The deltas of adapter {adapter_name!r} are sharded, and the weight below them is not. Shard both, or none "
        "(ignored_params)."
    )


def refuse_shared(weight: Tensor, columns: tuple[AdapterColumns, ...]) -> None:
    """Raise `RuntimeError`: the columns of another module are in a weight that two of them have; unless it is marked,
    as by benchmarks, whose models may disturb each other."""
    if getattr(weight, "holds_columns_of_many", False):
        return
    raise RuntimeError(
        f"Two adapted layers, perhaps of two models, share one weight, and {names_of(columns)} of the other one is "
        "active in it. Disable or unload that one first; or copy the model (copy.deepcopy) before you adapt it; or "
        "add the second adapter to the first model (add_adapter)."
    )


def refuse_overwritten(columns: tuple[AdapterColumns, ...]) -> None:
    """Raise `RuntimeError`: what is beneath `columns` is not known any more."""
    raise RuntimeError(
        f"The weight of a layer adapted by {names_of(columns)} was written or replaced while the adapter was active, "
        "so that its pretrained columns are not known any more. Change base weights under disable_adapter(), or "
        "through load_state_dict(). (With several processes, load the same base model in all: DistributedDataParallel "
        "writes the first one's weights into the others'. torch's AveragedModel averages base weights too: average the "
        "trained parameters alone. DeepSpeed's bf16 and fp16 cast weights: load the model in that type.)"
    )


UNFIT = (
    *("bitsandbytes.", "torch.optim.Adafactor", "torch.optim.rprop.Rprop", "transformers.optimization.Adafactor"),
    "paca.columns.factored.",
)
"""Optimizers whose first step fails on DTensors, tried with torch 2.13: how their classes' full names begin."""


def refuse_unfit(optimizer: torch.optim.Optimizer) -> None:
    """Raise `TypeError` if an optimizer of these holds sharded parameters."""
    if any(is_sharded(parameter) for group in optimizer.param_groups for parameter in group["params"]):
        kind = type(optimizer)
        raise TypeError(
            f"{kind.__module__}.{kind.__name__} can't step parameters that FSDP2 shards (DTensors). Use "
            "torch.optim.AdamW, SGD or Muon; or train with DistributedDataParallel, which takes every optimizer."
        )
