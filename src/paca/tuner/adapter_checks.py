"""Checks an adapter's name, the layers its columns are named for, and its tensors before any reaches the model."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from paca.columns.selection import column_problem
from paca.config import PacaConfig
from paca.layers import PacaLayer
from paca.layers.mixed_batch import BASE
from paca.tuner.expert_targets import unused_patterns

DELTA, INDICES = "paca_delta", "paca_indices"


def check_name(adapter_name: str) -> None:
    """Raise `ValueError` for a name under which torch can't keep an adapter's tensors."""
    taken = adapter_name == BASE or hasattr(nn.ParameterDict(), adapter_name) or hasattr(nn.ModuleDict(), adapter_name)
    if not adapter_name or "." in adapter_name or taken:
        raise ValueError(
            f"An adapter can't be called {adapter_name!r}: the name must not be empty, hold a dot, be {BASE!r} (the "
            "model without adapters) or be an attribute of torch's modules, such as 'keys'. Choose another one."
        )


def check_indices_used(model: nn.Module, adapter_name: str, config: PacaConfig) -> None:
    """Raise `ValueError` if columns were named for a layer that the adapter does not have."""
    if config.loading or not config.indices:
        return
    unused = unused_patterns(model, adapter_name, config.indices)
    if unused:
        names = [n for n, m in model.named_modules() if isinstance(m, PacaLayer) and adapter_name in m.paca_delta]
        others = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"indices names columns for {unused[0]!r}, but the adapter has no such layer; it has {', '.join(names[:3])}"
            f"{others}. Correct the name, or add the layer to target_modules or target_parameters."
        )


def check_saved_modules(model: nn.Module, adapter_name: str, config: PacaConfig) -> None:
    """Check what PEFT is going to train or load whole, while the model can still be given back as it was.

    Args:
        model: the base model, with the adapter's layers in it.
        adapter_name: of the adapter that was just put in.
        config: of it.

    Raises:
        ValueError: for a module in `modules_to_save` that has to do with adapted layers, or that the adapter's file
            lacks a tensor of.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    adapted = [name for name, module in modules.items() if isinstance(module, PacaLayer)]
    for name, module in modules.items():
        if not any(f"base_model.model.{name}".endswith(ending) for ending in config.modules_to_save or ()):  # as PEFT
            continue
        for layer in adapted:
            if f"{layer}.".startswith(f"{name}.") or name.startswith(f"{layer}."):
                raise ValueError(
                    f"modules_to_save names {name}, and columns of {layer} are trained. A module is trained whole or "
                    "by its columns: leave it out of modules_to_save or of target_modules."
                )
        if not config.loading or config.shapes is None or getattr(model, "_checkpoint_conversion_mapping", None):
            continue
        whole = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
        for tensor in whole.state_dict():
            if f"base_model.model.{name}.{tensor}" not in config.shapes:
                raise ValueError(
                    f"The adapter has no tensor base_model.model.{name}.{tensor}, which its modules_to_save promises."
                )


def check_adapter_tensors(
    model: nn.Module, adapter_name: str, tensors: dict[str, Tensor], *, rotating: bool = False
) -> dict[str, Tensor]:
    """Check the tensors of an adapter against the layers they are to be loaded into, and sort the columns.

    Args:
        model: Holds the layers, with `adapter_name` already in them.
        adapter_name: Which adapter is loaded.
        tensors: By the names they have in `model.state_dict()`; those that belong to no layer keep the file's name.
        rotating: The adapter's columns rotate, so there may be more of them than it trains at a time.

    Returns:
        The same tensors, each adapter's columns in ascending order (other tools need not sort them).

    Raises:
        ValueError: For an unknown target, a missing tensor, a wrong shape or type, indices that are out of range or
            repeated, or a value that is NaN or Inf; names the tensor. Nothing has been loaded then.
    """
    checked = dict(tensors)
    expected: set[str] = set()
    for name, layer in model.named_modules():
        if isinstance(layer, PacaLayer) and adapter_name in layer.paca_delta:
            delta_name = f"{name}.{DELTA}.{adapter_name}"
            indices_name = f"{name}.{INDICES}.{adapter_name}"
            expected |= {delta_name, indices_name}
            for wanted in (delta_name, indices_name):
                if wanted not in tensors:
                    raise ValueError(
                        f"The adapter has no tensor {file_name(wanted, adapter_name)}, which its config promises."
                    )
            delta, indices = tensors[delta_name], tensors[indices_name]
            r = layer.r[adapter_name]
            if (rotating or adapter_name in layer.folded) and indices.dim() == 1:
                r = max(r, indices.numel())
            _check_shapes(layer, adapter_name, r, delta_name, delta, indices_name, indices)
            problem = column_problem(indices, layer.in_features)
            if problem:
                raise ValueError(f"{file_name(indices_name, adapter_name)}: {problem}.")
            check_finite(file_name(delta_name, adapter_name), delta.to(layer.paca_delta[adapter_name].dtype))
            order = indices.argsort()
            if not torch.equal(indices[order], indices):  # a delta that is sharded can't be sorted here, and is ours
                checked[delta_name] = delta.index_select(layer.delta_column_dim, order).contiguous()
            checked[indices_name] = indices[order].to(torch.int64)
    # Not from a state dict: taking one would park every weight.
    saved_whole = _saved_whole(model, adapter_name)
    places = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    places = {name: place for name, place in places.items() if name.startswith(saved_whole)}
    for name in tensors.keys() & places.keys() - expected:
        tensor, place = tensors[name], places[name]
        if tensor.shape != place.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; this model's has {tuple(place.shape)}.")
        check_finite(name, tensor)
    unknown = sorted(tensors.keys() - places.keys() - expected)
    if unknown:
        others = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(
            f"The adapter holds {unknown[0]}{others}, but the model has no such layer among the adapter's targets and "
            "modules_to_save: it was trained on another model, its config was changed, or its file was."
        )
    return checked


def _saved_whole(model: nn.Module, adapter_name: str) -> tuple[str, ...]:
    """How the names begin of what an adapter may hold besides columns: modules_to_save, and embeddings (PEFT saves them
    whole when the vocabulary grew). Nothing else of the base model may be loaded over."""
    base: Any = getattr(model, "get_base_model", lambda: model)()
    embeddings = [module for kind in ("input", "output") if (module := _embeddings(base, kind)) is not None]
    beginnings = []
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            beginnings.append(f"{name}.modules_to_save.{adapter_name}.")
        elif any(module is embedding for embedding in embeddings):
            beginnings.append(f"{name}.")
    return tuple(beginnings)


def _embeddings(base: Any, kind: str) -> Any:
    getter = getattr(base, f"get_{kind}_embeddings", None)
    try:
        return None if getter is None else getter()
    except NotImplementedError:  # transformers' models of images have the method, but nothing to give
        return None


def _check_shapes(
    layer: PacaLayer, adapter_name: str, r: int, delta_name: str, delta: Tensor, indices_name: str, indices: Tensor
) -> None:
    wanted = layer.delta_shape(r)
    if tuple(delta.shape) != wanted:
        axes = layer.delta_axes
        raise ValueError(
            f"{file_name(delta_name, adapter_name)} has shape {tuple(delta.shape)}; in this model, with r={r}, it must "
            f"have {wanted} {axes}."
        )
    if tuple(indices.shape) != (r,):
        raise ValueError(
            f"{file_name(indices_name, adapter_name)} has shape {tuple(indices.shape)}; r={r} needs {(r,)}."
        )
    if not delta.is_floating_point():
        raise ValueError(f"{file_name(delta_name, adapter_name)} is {delta.dtype}; it must be a float type.")
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"{file_name(indices_name, adapter_name)} is {indices.dtype}; it must be int64.")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise `ValueError` if `tensor`, of an adapter's file, holds NaN or Inf."""
    if tensor.is_floating_point() and not bool(
        torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float()).all()
    ):
        raise ValueError(f"{name} holds NaN or Inf: the adapter is broken.")


def file_name(name: str, adapter_name: str) -> str:
    """The tensor's name in the adapter file: without the adapter's own name."""
    return name.removesuffix(f".{adapter_name}")
