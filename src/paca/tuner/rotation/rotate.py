"""Rotation: fold the trained columns into the weight, pick others, carry on.

What was trained stays in the weight, so folding writes nothing there. The adapter is the union of all columns that
were ever trained; what it does not train at the moment lies on the CPU (`Folded`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from paca.columns.folded import Folded, split, union_of
from paca.columns.scores import explicit_columns
from paca.columns.state import AdapterColumns
from paca.config import PacaConfig
from paca.layers import PacaLayer, layers_of, paca_layers
from paca.tuner.rotation.pickers import Picker, RotatingLayer, picker_of
from paca.tuner.same_on_all_ranks import same_on_all_ranks


@torch.no_grad()
def rotate(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    number: int,
    *,
    pick: str | Picker | None = None,
    adapter_name: str | None = None,
) -> None:
    """Fold the columns that an adapter trains and let it train others from now on, in every layer.

    Call it between an optimizer step and the next forward pass. The model computes the same before and after, bit for
    bit. The new columns start from zero deltas, those that were trained before from their deltas of then. Gradients of
    the adapter are dropped; a graph that was built before raises in its backward pass. The optimizer starts anew for
    the adapter's parameters, which stay the same tensors (so do its parameter groups, rates and schedule).

    Args:
        model: A `PeftModel`, compiled or in DistributedDataParallel or not, or what it wraps.
        optimizer: The one that trains the adapter; None to leave its state to the caller.
        number: Which rotation of the run this is, counted from 1; random picks are drawn from it.
        pick: `"random"`, `"random_blocks"`, `"weight_norm"`, or a function from a `RotatingLayer` to `(r,)` column
            numbers. Default: `rotate_by` of the adapter's config. With several processes, those of the first one hold
            for all.
        adapter_name: Default: the active one.

    Raises:
        ValueError: The adapter can't be rotated (names the layer and the reason), the optimizer does not hold its
            parameters, or `pick` gives columns that a layer has not, or not `r` of them. Nothing is changed then.
    """
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"number must say which rotation this is, counted from 1; got {number!r}.")
    name, config, layers = rotating_adapter(model, adapter_name)
    parameters = [layer.paca_delta[name] for layer in layers.values()]
    state = {} if optimizer is None else _state_of(optimizer, parameters, name)
    picker = picker_of(config.rotate_by if pick is None else pick)
    chosen = {
        key: _checked(picker(RotatingLayer(key, layer, name, number, config.random_seed)), key, layer, name)
        for key, layer in layers.items()
    }
    for key, indices in same_on_all_ranks(chosen).items():
        _train_columns(layers[key], name, indices)
    for parameter in parameters:
        state.pop(parameter, None)


def trained_columns(model: nn.Module, adapter_name: str | None = None) -> dict[str, list[int]]:
    """The columns that an adapter trains now, by layer: what a checkpoint needs besides the adapter (and fits JSON)."""
    name, _, layers = rotating_adapter(model, adapter_name)
    return {key: layer.paca_indices[name].tolist() for key, layer in layers.items()}


@torch.no_grad()
def set_trained_columns(
    model: nn.Module, columns: Mapping[str, Sequence[int]], adapter_name: str | None = None
) -> None:
    """Let an adapter train the given columns from now on, as a checkpoint recorded them (`trained_columns`).

    The model computes the same, and an optimizer's state is left as it is: load it before or after.

    Raises:
        ValueError: The layers are not those of the adapter, or columns do not fit.
    """
    name, _, layers = rotating_adapter(model, adapter_name)
    if not isinstance(columns, Mapping):
        raise ValueError(
            f"columns must map layers to column numbers, as paca.trained_columns gives them; got {columns!r}."
        )
    different = sorted(layers.keys() ^ columns.keys())
    if different:
        raise ValueError(
            f"The columns are of other layers than those of adapter {name!r}: {different[0]} is in only one of them. "
            "Give what paca.trained_columns gave for a model like this."
        )
    chosen = {key: _checked(columns[key], key, layer, name) for key, layer in layers.items()}
    for key, layer in layers.items():
        _train_columns(layer, name, chosen[key])


def rotating_adapter(model: nn.Module, adapter_name: str | None = None) -> tuple[str, PacaConfig, dict[str, PacaLayer]]:
    """The adapter to rotate: its name, its config and its layers by their names in the base model. Raise `ValueError`
    if there is none, or it can't be rotated; names the layer and the reason."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = getattr(model.module, "_orig_mod", model.module)
    name = adapter_name
    if name is None:
        names: list[str] = next((layer.active_adapters for layer in paca_layers(model)), [])
        if len(names) != 1:
            found = ", ".join(names) or "none"
            raise ValueError(f"adapter_name must say which adapter is rotated: active are {found}.")
        name = names[0]
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    config = configs.get(name)
    if not isinstance(config, PacaConfig):
        raise ValueError(f"There is no PaCA adapter {name!r} to rotate; loaded are {', '.join(configs) or 'none'}.")
    root: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if distributed.is_available():
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        for key, module in root.named_modules():
            if isinstance(module, (FSDPModule, FullyShardedDataParallel)):
                raise sharded(f"{key or 'the model'} is sharded by FSDP")
    layers = layers_of(root, name)
    for key, layer in layers.items():
        if layer.mode != "resident":
            raise ValueError(
                f"{key} can't be rotated: its weight is quantized or offloaded, so trained columns can't be folded "
                "into it. Leave rotate_every out, or train on plain weights."
            )
        if layer.merged_adapters:
            merged = ", ".join(map(repr, layer.merged_adapters))
            raise ValueError(f"{key} can't be rotated while {merged} is merged into it. Call unmerge_adapter() first.")
        if type(layer.paca_delta[name].data) is not Tensor or hasattr(layer.paca_delta[name], "ds_id"):
            raise sharded(f"{key} has a delta of type {type(layer.paca_delta[name].data).__name__}")
    return name, config, layers


def sharded(what: str) -> ValueError:
    """The error where weights are not whole."""
    return ValueError(
        f"Rotation needs whole weights in every process, but {what}. Train with DistributedDataParallel, or leave "
        "rotate_every out."
    )


def _state_of(optimizer: Any, parameters: list[nn.Parameter], name: str) -> Any:
    """The mapping from parameters to their state."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = sum(id(p) not in held for p in parameters)
    inner = getattr(optimizer, "optim", None)
    if isinstance(inner, torch.optim.Optimizer) and inner.state is not optimizer.state:
        raise ValueError(
            f"A {type(optimizer).__name__} keeps the state of its parameters in an optimizer of its own (ZeRO), which "
            "rotation can't clear. Train with a plain optimizer, or leave rotate_every out."
        )
    if missing:
        raise ValueError(
            f"The optimizer does not hold the deltas of adapter {name!r} ({missing} are missing), so their state can't "
            "be cleared. Give the optimizer that trains them; one that keeps copies of its own (ZeRO) can't be used "
            "with rotation."
        )
    return optimizer.state


def _checked(columns: Any, key: str, layer: PacaLayer, name: str) -> Tensor:
    indices = explicit_columns(columns, layer.in_features, key)
    if indices.numel() != layer.r[name]:
        raise ValueError(
            f"{key}: {indices.numel()} columns were picked, but adapter {name!r} trains r={layer.r[name]} at a time."
        )
    return indices


def _train_columns(layer: PacaLayer, name: str, indices: Tensor) -> None:
    parameter, places, base = layer.paca_delta[name], layer.paca_indices[name], layer.base_layer

    def fold() -> tuple[AdapterColumns, ...]:
        before = places.clone(), parameter.clone(), layer.folded.get(name)
        try:
            return fold_into(
                *split(union_of(*before, layer.delta_column_dim), indices, layer.delta_column_dim), indices
            )
        except BaseException:  # Ctrl-C, too
            fold_into(before[1], before[2], before[0])
            raise

    def fold_into(delta: Tensor, folded: Folded | None, trained: Tensor) -> tuple[AdapterColumns, ...]:
        parameter.copy_(delta)
        parameter.grad = None  # of other columns
        places.copy_(trained)
        layer.folded.pop(name, None)
        if folded is not None:
            layer.folded[name] = folded
        base.columns.changed(name)
        return layer.wanted()

    layer.write(compare=True)
    base.columns.rotate(base.weight, name, fold)
