"""Checks an adapter's name, and its tensors before any reaches the model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paca.columns.selection import column_problem
from paca.layers import PacaLayer
from paca.layers.mixed_batch import BASE
from paca.tuner.saved_modules import check_whole_tensors

DELTA, INDICES = "paca_delta", "paca_indices"


def check_name(adapter_name: str) -> None:
    """Raise `ValueError` for a name under which torch can't keep an adapter's tensors."""
    taken = adapter_name == BASE or hasattr(nn.ParameterDict(), adapter_name) or hasattr(nn.ModuleDict(), adapter_name)
    if not adapter_name or "." in adapter_name or taken:
        raise ValueError(
            f"An adapter can't be called {adapter_name!r}: the name must not be empty, hold a dot, be {BASE!r} (the "
            "model without adapters) or be an attribute of torch's modules, such as 'keys'. Choose another one."
        )


def check_adapter_tensors(
    model: nn.Module, adapter_name: str, tensors: dict[str, Tensor], *, rotating: bool = False
) -> dict[str, Tensor]:
    """Check an adapter's tensors, by their names in `model.state_dict()`, against the layers they are loaded into.
    Where the adapter's columns rotate, there may be more of them than it trains at a time.
    Gives the same tensors, each layer's columns in ascending order (other tools need not sort them). Raise
    `ValueError`, naming the tensor, for an unknown target, a missing tensor, a wrong shape or type, indices that are
    out of range or repeated, or a value that is NaN or Inf. Nothing has been loaded then."""
    checked, others = dict(tensors), dict(tensors)
    for name, layer in model.named_modules():
        if isinstance(layer, PacaLayer) and adapter_name in layer.paca_delta:
            both = []
            for kind in (f"{name}.{DELTA}", f"{name}.{INDICES}"):
                if f"{kind}.{adapter_name}" not in tensors:
                    raise ValueError(f"The adapter has no tensor {kind}, which its config promises.")
                both.append(others.pop(f"{kind}.{adapter_name}"))
            delta, indices = both
            r = layer.r[adapter_name]
            if (rotating or adapter_name in layer.folded) and indices.dim() == 1:
                r = max(r, indices.numel())
            _check_form(f"{name}.{DELTA}", delta, layer.delta_shape(r), r, layer.delta_axes)
            _check_form(f"{name}.{INDICES}", indices, (r,), r)
            if problem := column_problem(indices, layer.in_features):
                raise ValueError(f"{name}.{INDICES}: {problem}.")
            check_finite(f"{name}.{DELTA}", delta.to(layer.paca_delta[adapter_name].dtype))
            order = indices.argsort()
            if not torch.equal(indices[order], indices):  # a delta that is sharded can't be sorted here, and is ours
                in_order = delta.index_select(layer.delta_column_dim, order)
                checked[f"{name}.{DELTA}.{adapter_name}"] = in_order.contiguous()
            checked[f"{name}.{INDICES}.{adapter_name}"] = indices[order].to(torch.int64)
    if others:
        check_whole_tensors(model, adapter_name, others)
        for name, tensor in others.items():
            check_finite(name, tensor)
    return checked


def _check_form(name: str, tensor: Tensor, wanted: tuple[int, ...], r: int, axes: str = "") -> None:
    """Raise `ValueError` for a wrong shape or type of a delta, which has `axes`, or of indices."""
    if tuple(tensor.shape) != wanted:
        must = f"{wanted} {axes}".rstrip()
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; in this model, with r={r}, it must have {must}.")
    if axes and not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}; it must be a float type.")
    if not axes and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise ValueError(f"{name} is {tensor.dtype}; it must be int64.")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise `ValueError` if `tensor`, of an adapter's file, holds NaN or Inf."""
    wide = tensor if tensor.element_size() > 1 else tensor.float()
    if tensor.is_floating_point() and not bool(torch.isfinite(wide).all()):
        raise ValueError(f"{name} holds NaN or Inf: the adapter is broken.")
