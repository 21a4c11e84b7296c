"""Adapters of other tools, read: the original authors' PaCA, and LoRA whose A picks single inputs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from paca.columns.selection import column_problem
from paca.convert.lora import LORA_A, LORA_B
from paca.convert.tensor_files import FILE_PREFIX
from paca.messages.errors import PacaError
from paca.tuner.adapter_checks import INDICES

COLUMNS = "paca_w"


class ForeignLayer(NamedTuple):
    """The adapted weight is `W0[:, indices] + scale * delta` there."""

    delta: Tensor  # (out_features, r)
    indices: Tensor  # (r,)
    scale: float


class ForeignAdapter(NamedTuple):
    """An adapter of another tool, not yet checked against its base model."""

    kind: str
    """What it is, in words."""
    layers: dict[str, ForeignLayer]
    """By the module's name in the base model."""
    others: dict[str, Tensor]
    """The tensors of its file that belong to no adapted layer, by their names there."""
    largest_move: float | None = None
    """How far the columns of a layer moved at most, as a share of their size; None where they were not looked at."""


def read_authors(config: dict[str, Any], tensors: dict[str, Tensor], base_model: nn.Module) -> ForeignAdapter:
    """Read a checkpoint of the authors (github.com/WooSunghyeon/paca, read at commit 20570b3), and its config.

    Their trainable `paca_w (out_features, r)` is the columns themselves over the scale: the adapted weight is `W[:,
    paca_indices] = s * paca_w` with `s = paca_alpha / r` (`paca_update` in their layer.py), where ours keeps the
    difference to the columns of `base_model`, which has its weights, in the dtype they were stored in. `delta = (s *
    paca_w - W0[:, paca_indices]) / s` is formed in float64 and rounded once to float32.

    Raises:
        PacaError: A tensor that is missing, or does not fit the model; it is named.
    """
    # Theirs has fewer columns than r where a layer has fewer inputs, and scales by r all the same.
    scale = _positive_number(config, "paca_alpha") / _positive_number(config, "r")
    pairs, others = _take_pairs(tensors, COLUMNS, INDICES)
    layers: dict[str, ForeignLayer] = {}
    largest = 0.0
    for name, (columns, indices) in pairs.items():
        pretrained = _authors_weight(base_model, name, columns, indices)[:, indices].double()
        trained = columns.double() * scale
        largest = max(largest, float((trained - pretrained).norm() / pretrained.norm().clamp_min(1e-30)))
        layers[name] = ForeignLayer(((trained - pretrained) / scale).float(), indices, scale)
    return ForeignAdapter("the original authors' PaCA", layers, others, largest)


def _positive_number(config: dict[str, Any], key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise PacaError(f"The checkpoint's config must give {key} as a positive number; it gives {value!r}.")
    return value


def _authors_weight(base_model: nn.Module, name: str, columns: Tensor, indices: Tensor) -> Tensor:
    """The weight beneath; refuses what would be read past it, or get another shape by broadcasting."""
    try:
        module = base_model.get_submodule(name)
    except AttributeError as error:
        raise PacaError(f"The checkpoint adapts {name}, but the base model has no such module.") from error
    if not isinstance(module, nn.Linear):
        raise PacaError(f"The checkpoint adapts {name}, which is a {type(module).__name__}; Linear was expected.")
    if indices.dim() != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise PacaError(f"{FILE_PREFIX}{name}.{INDICES} must be a list of whole numbers, (r,).")
    problem = column_problem(indices, module.in_features)
    if problem:
        raise PacaError(f"{FILE_PREFIX}{name}.{INDICES}: {problem}.")
    expected = (module.out_features, indices.numel())
    if tuple(columns.shape) != expected:
        raise PacaError(
            f"{FILE_PREFIX}{name}.{COLUMNS} has shape {tuple(columns.shape)}; for this base model it must have "
            f"{expected} (out_features, r)."
        )
    return module.weight.detach()


def read_one_hot_lora(settings: dict[str, Any], tensors: dict[str, Tensor]) -> ForeignAdapter:
    """Read LoRA such as `paca export --to lora` writes: `B` as the delta, unchanged, and LoRA's scale as ours.

    Raises:
        PacaError: Settings that PEFT refuses, a variant that is more than `B A`, or an A that is not one-hot.
    """
    try:
        config: Any = LoraConfig.from_peft_type(**settings)
    except (TypeError, ValueError) as error:
        raise PacaError(f"The adapter_config.json of this LoRA adapter is refused by PEFT: {error}") from error
    for option in ("use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens", "layer_replication"):
        if getattr(config, option, None):
            raise PacaError(f"This LoRA adapter has {option} set, which PaCA can't express.")
    pairs, others = _take_pairs(tensors, LORA_A, LORA_B)
    layers = {
        name: ForeignLayer(b, _picked_inputs(name, a), _lora_scale(config, name, a.shape[0]))
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


def _lora_scale(config: Any, name: str, rank: int) -> float:
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    r = ranks.get(get_pattern_key(list(ranks), name), config.r)
    if r != rank:
        raise PacaError(f"{FILE_PREFIX}{name}.{LORA_A} has {rank} rows, but the adapter's config says r={r} there.")
    alpha: float = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    return alpha / (math.sqrt(r) if config.use_rslora else r)


def _take_pairs(
    tensors: dict[str, Tensor], first: str, second: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """The pairs of tensors `<layer>.<first>` and `<layer>.<second>` by layer, and all other tensors."""
    paired = [name for name in tensors if name.endswith((f".{first}", f".{second}"))]
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name in paired:
        layer = name.removesuffix(f".{first}").removesuffix(f".{second}")
        for missing in {f"{layer}.{first}", f"{layer}.{second}"} - tensors.keys():
            raise PacaError(f"The checkpoint has no {missing}: it is incomplete.")
        pairs[layer.removeprefix(FILE_PREFIX)] = (tensors[f"{layer}.{first}"], tensors[f"{layer}.{second}"])
    return pairs, {name: tensor for name, tensor in tensors.items() if name not in paired}
