"""Target modules that are no plain ones: adapted in another way (quantized, offloaded), or refused with the reason."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft.tuners import tuners_utils
from torch import nn

from paca.columns.state import is_sharded
from paca.layers import PACA_CLASSES, RESIDENT_CLASSES, PacaLayer, resident_class
from paca.layers.modes import OVERLAID, is_offloaded, is_partitioned, known_quantizations, mode_of
from paca.layers.overlaid import OverlaidLinear
from paca.layers.resident_weight import ResidentWeight
from paca.tuner.column_choice import for_layer
from paca.tuner.saved_modules import HEADS

_SMALL = 8
"""How many times as many inputs the widest layer has as one that may be left out."""


def all_linear(config: Any, model: nn.Module) -> set[str] | str:
    """What PEFT is to take "all-linear" for.

    The names, without heads that PEFT trains whole (of some it says so when the adapter is in), without layers that do
    something of their own, such as routers, and without small ones that have fewer inputs than columns are trained.
    Where only some blocks are adapted, endings of names, as PEFT filters blocks only then. `"all-linear"` itself where
    it comes to the same.
    """
    some_blocks, heads = config.layers_to_transform is not None, HEADS.get(config.task_type, ())
    own = {name for name, module in model.named_modules() if _is_of_its_own(module)} | _too_small(config, model)
    if not (some_blocks or heads or own):
        return "all-linear"
    chosen: Any = tuners_utils._maybe_include_all_linear_layers(copy.copy(config), model)
    names = {name for name in chosen.target_modules if name not in own and name.rpartition(".")[2] not in heads}
    return {name.rpartition(".")[2] for name in names} if some_blocks else names


def _too_small(config: Any, model: nn.Module) -> set[str]:
    """Linear layers with fewer inputs than the columns that `config` wants of them, and at most an eighth of the inputs
    that the widest has: such as four in each block of Gemma 3n."""
    inputs = {name: module.in_features for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    least = max(inputs.values(), default=0) // _SMALL
    listed, check = config.indices or {}, tuners_utils.check_target_module_exists
    wanted = {n: 0 if for_layer(n, listed, None) else for_layer(n, config.rank_pattern, config.r) for n in inputs}
    small = {name for name, count in inputs.items() if count <= least and count < wanted[name]}
    small = {name for name in small if not isinstance(check(config, name), tuners_utils._ExcludedModule)}
    if small:
        kinds = dict.fromkeys(".".join(name.split(".")[-2:]) for name in sorted(small))
        told = f"all-linear leaves out {len(small)} layers with fewer inputs than r: {', '.join(kinds)}."
        warnings.warn(f"{told} To train them too, give them a rank in rank_pattern.", stacklevel=2)
    return small


def _is_of_its_own(module: nn.Module) -> bool:
    """Whether a linear layer does something else than a product, as some of transformers' models', or is not called at
    all, as the last one of `nn.MultiheadAttention`."""
    kind = type(module)
    own = isinstance(module, nn.Linear) and kind.__module__.startswith(("transformers.models.", "torch.nn.modules."))
    return own and resident_class(kind) is None


def adapted_after_all(target: Any, key: str, model: nn.Module) -> PacaLayer:
    """Make a layer of a module that `model` calls `key` and that needs a closer look. If it can't be adapted, raise
    `ValueError` with the reason, and leave it as it is."""
    check_module(target, key, model)
    mode = mode_of(target, key, model)
    if mode != "resident":
        return OverlaidLinear(OVERLAID[mode].adopt(target))
    resident = resident_class_of(target, key, model)
    _count_writes_apart(target)
    return PACA_CLASSES[type(target)](resident.adopt(target))


def _count_writes_apart(module: Any) -> None:
    """Give a weight that is a slice of one tensor with others, as transformers loads some, a version counter of its
    own: what is written into one of them would seem to be written into all."""
    weight = module.weight
    if type(weight) is nn.Parameter and weight.untyped_storage().nbytes() > weight.nbytes:
        apart = nn.Parameter(weight.data, weight.requires_grad)
        vars(apart).update(vars(weight))
        try:
            torch.utils.swap_tensors(weight, apart)  # so that it stays the same object
        except RuntimeError:  # somebody refers to what is in it
            module.weight = apart


def check_module(target: nn.Module, key: str, model: nn.Module) -> None:
    """Raise `ValueError` for a module that is shared, or runs something else than its class says."""
    if isinstance(target, tuners_utils.BaseTunerLayer):
        raise ValueError(f"{key} is already adapted by another method ({type(target).__name__}); unload that first.")
    names = [name for name, m in model.named_modules(remove_duplicate=False) if m is target]
    if len(names) > 1:
        raise ValueError(
            f"{key} is one module under {len(names)} names ({', '.join(names)}), which would all be trained. Leave "
            "it out of target_modules."
        )
    own = vars(target).get("forward")
    if own is not None and own == type(target).forward.__get__(target):
        del target.forward  # accelerate leaves the class's own on the instance when it takes a hook off
    if "forward" in vars(target) and is_sharded(target._parameters.get("weight")):
        raise ValueError(
            f"{key} is split over processes by a tensor-parallel plan, which PaCA can't adapt. Load the model without "
            "tp_plan, and train with DistributedDataParallel or FSDP2 (fully_shard); or leave the layer out of "
            "target_modules."
        )
    if "forward" in vars(target) and "_old_forward" not in vars(target):
        raise ValueError(
            f"{key} has a forward of its own ({vars(target)['forward']!r}) in place of its class's, which would "
            "bypass PaCA. Undo that, or leave the layer out of target_modules."
        )


def resident_class_of(target: Any, key: str, model: nn.Module) -> type[ResidentWeight]:
    """The class that a module gets while columns are resident in its weight; `ValueError`, with the reason, if they
    can't be."""
    resident = resident_class(type(target))
    if resident is None:
        known = [kind for kind in RESIDENT_CLASSES if not kind.__module__.startswith("transformers.models.")]
        above = next((c.__name__ for c in known if isinstance(target, c)), None)
        reason = f" (a subclass of {above}, which may use the weight in a way of its own)" if above else ""
        raise ValueError(
            f"{key} is a {type(target).__module__}.{type(target).__qualname__}{reason}, which PaCA can't adapt "
            f"yet; it adapts {', '.join(c.__name__ for c in known)} and {known_quantizations()}. Leave "
            "it out through target_modules or exclude_modules."
        )
    problem = resident.problem(target)
    if problem:
        raise ValueError(f"{key} {problem}")
    if is_partitioned(target):
        raise ValueError(
            f"{key} is a {type(target).__name__}, and under DeepSpeed's ZeRO-3 only linear layers can be adapted. "
            "Leave it out of target_modules, or use FSDP2 or ZeRO stage 1 or 2."
        )
    if is_offloaded(target, model):
        raise ValueError(
            f"{key} is offloaded by accelerate, and of the layers that PaCA adapts only linear ones can be. Load "
            "the model with a device_map that keeps this layer on one device, or leave it out of target_modules."
        )
    weight: Any = target.weight
    if not type(weight).__module__.startswith("torch."):
        raise ValueError(
            f"{key} has a weight of type {type(weight).__module__}.{type(weight).__qualname__}, which PaCA can't "
            f"write columns into; it adapts plain weights and {known_quantizations()}."
        )
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ValueError(f"{key} has a weight of type {weight.dtype}; PaCA needs a float of 16 bits or more.")
    if any(stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape, strict=True)):
        raise ValueError(
            f"{key} has a weight in which several values are the same memory (an expanded tensor), so that a column "
            "can't be written. Give it memory of its own first: layer.weight = nn.Parameter(layer.weight.clone())."
        )
    others: list[Any] = [p for m in model.modules() for p in m._parameters.values() if p is not None]
    plain = (b for b in model.buffers() if type(b) is torch.Tensor and b.layout == torch.strided)
    others += [b for b in plain if b.dtype == weight.dtype]
    if sum(p is weight for p in others) > 1 or any(_overlap(weight, p) for p in others if p is not weight):
        raise ValueError(
            f"{key} shares its weight with another module (tied weights), which would silently be trained along. "
            "Leave it out of target_modules, or, if they are a language model's input embedding and output layer, "
            "give each its own weight first: paca.untie_embeddings(model)."
        )
    return resident


def _overlap(weight: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two parameters (or buffers) have memory in common; views of one tensor need not."""
    if weight.untyped_storage()._cdata != other.untyped_storage()._cdata:
        return False
    (first, end), (other_first, other_end) = map(_range_of, (weight, other))
    if end <= other_first or other_end <= first or weight.dtype != other.dtype:
        return weight.dtype != other.dtype
    start = min(first, other_first)
    taken = torch.zeros(max(end, other_end) - start, dtype=torch.bool, device="cpu")
    taken.as_strided(weight.shape, weight.stride(), first - start).fill_(True)
    return bool(taken.as_strided(other.shape, other.stride(), other_first - start).any())


def _range_of(parameter: torch.Tensor) -> tuple[int, int]:
    """The first value's place in its memory, and the place after the last one's."""
    first = int(parameter.storage_offset())
    return first, first + 1 + sum(int(n - 1) * int(s) for n, s in zip(parameter.shape, parameter.stride(), strict=True))
