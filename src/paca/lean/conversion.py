"""Make a model's blocks lean, and undo it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from paca.lean.activations import ACTIVATIONS, activation_name
from paca.lean.blocks import BLOCKS, qualified_name
from paca.lean.forwards import LeanActivation, LeanAttention, LeanForward, LeanLayerNorm, LeanMLP, LeanRMSNorm
from paca.messages.errors import PacaError

Recompute = Literal["mlp"]
Model = TypeVar("Model", bound=nn.Module)


def make_lean(model: Model, recompute: Recompute | None = None) -> Model:
    """Give the blocks of `model`, in place, forwards that keep less for the backward pass and compute the same.

    RMSNorm keeps its input in the input's dtype and one float32 per row (stock: a float32 copy), gated MLPs keep gate
    and up (stock: the activated gate as well), ReLU one bit per element, GPT-2's GELU its input, and all layers one
    attention mask under SDPA. In the forward pass, results on CPU are bitwise those of the stock modules; gradients
    agree to the rounding of their dtype.

    Works before or after PEFT wrapped the model. A second call replaces the first one's choice of `recompute`. Forward
    hooks on an MLP's activation module don't run while the block is lean. transformers' kernels (`use_kernels`, on by
    default where a model is loaded) are switched off: `train()` and `eval()` would put them over lean forwards.

    Args:
        model: A transformers model, or a PEFT model around one, whose blocks are all of known classes.
        recompute: `"mlp"` also drops gate and up and computes them again in the backward pass, from the norm's input:
            two more matrix products per block. Hooks and adapters of gate and up then run twice. OPT's blocks have
            nothing left to drop with ReLU, and are refused with another activation.

    Raises:
        PacaError: A block, a norm, an MLP or an activation is not of a known class, or a module already has a forward
            of its own (from another kernel library). The model is then unchanged.
    """
    if recompute not in (None, "mlp"):
        raise PacaError(f"recompute is {recompute!r}; it can be None or 'mlp'")
    blocks = _blocks(model)
    forwards = [forward for name, block in blocks for forward in _block_forwards(name, block, recompute)]
    covered = {id(forward.module) for forward in forwards}
    kinds = {BLOCKS[qualified_name(type(block))] for _, block in blocks}
    norms: dict[str | None, Any] = {kind.norm: kind.style for kind in kinds if kind.norm is not None}
    for module in model.modules():  # the final norm is outside the blocks
        if id(module) not in covered and (style := norms.get(qualified_name(type(module)))) is not None:
            forwards.append(LeanRMSNorm(module, style, feeds_recomputed=False))
    kernelized = _without_kernels(model)
    try:
        for forward in forwards:
            _refuse_foreign_forward(forward.module)
    except PacaError:
        for part in kernelized:
            part.set_use_kernels(True)
        raise
    undo_lean(model)
    for forward in forwards:
        _install(forward)
    return model


def undo_lean(model: Model) -> Model:
    """Give every module of `model` its stock forward back, and return it. One that isn't lean stays as it is.

    transformers' kernels stay off: `model.use_kernels = True` puts them on again.
    """
    for module in model.modules():
        instance = vars(module)
        if isinstance(instance.get("forward"), LeanForward):
            del instance["forward"]
        if isinstance(instance.get("_old_forward"), LeanForward):
            instance["_old_forward"] = type(module).forward.__get__(module)
    return model


def is_lean(model: nn.Module) -> bool:
    """Whether any module of `model` has a lean forward."""
    return any(isinstance(vars(module).get(_slot(module)), LeanForward) for module in model.modules())


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The known blocks of `model` with their names; raises if there is none, or another kind besides."""
    known = [(name, module) for name, module in model.named_modules() if qualified_name(type(module)) in BLOCKS]
    unknown = {
        qualified_name(type(module))
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and qualified_name(type(module)) not in BLOCKS
    }
    if known and not unknown:
        return known
    found = unknown or {
        qualified_name(type(child))
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        for child in module
    }
    raise PacaError(
        f"{type(model).__name__} can't be made lean: its blocks are of unknown classes: "
        f"{', '.join(sorted(found)) or 'none found'}. Known are: {', '.join(sorted(BLOCKS))}. Train it without lean "
        "blocks (don't call make_lean; model.lean: false in YAML)."
    )


def _block_forwards(name: str, block: nn.Module, recompute: Recompute | None) -> Iterator[LeanForward]:
    parts = BLOCKS[qualified_name(type(block))]
    mlps = [block] if parts.mlp is None else _of_class(block, parts.mlp)
    norms = [] if parts.norm is None else _of_class(block, parts.norm)
    if not mlps or (parts.norm is not None and not norms):
        raise PacaError(
            f"block {name!r} can't be made lean: it was expected to hold a "
            f"{' and a '.join(part for part in (parts.mlp, parts.norm) if part)}, but holds "
            f"{', '.join(sorted({qualified_name(type(child)) for child in block.modules()}))}. Undo what replaced them."
        )
    for attention in _of_class(block, parts.attention):
        yield LeanAttention(attention)
    feeding = list(getattr(block, parts.mlp_norm).modules()) if recompute and parts.mlp_norm else []
    for norm in norms:
        yield LeanRMSNorm(norm, parts.style, feeds_recomputed=any(norm is module for module in feeding))
    for module in feeding:
        if type(module) is nn.LayerNorm:
            yield LeanLayerNorm(module)
    for mlp in mlps:
        activation = getattr(mlp, parts.activation)
        kind = _activation(name, activation)
        if recompute and parts.mlp is None and kind != "relu":
            raise PacaError(
                f"block {name!r}: the MLP of {type(block).__name__} has no module of its own, so with the activation "
                f"{kind!r} it can't be recomputed. Use recompute=None."
            )
        if parts.hidden != "plain" or (recompute and parts.mlp is not None):
            yield LeanMLP(mlp, parts, kind, recompute is not None)
        elif ACTIVATIONS[kind].keeps == "more":
            yield LeanActivation(activation, kind)


def _of_class(block: nn.Module, name: str) -> list[nn.Module]:
    return [module for module in block.modules() if qualified_name(type(module)) == name]


def _activation(block: str, module: nn.Module) -> str:
    kind = activation_name(module)
    if kind is None:
        raise PacaError(
            f"block {block!r} can't be made lean: its activation is {qualified_name(type(module))}, known are "
            f"{', '.join(ACTIVATIONS)}."
        )
    return kind


def _without_kernels(model: nn.Module) -> list[PreTrainedModel]:
    """Switch transformers' kernels off in `model`, in place, and return the models that had them."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    kernelized = [module for module in models if module.use_kernels]
    for module in kernelized:
        module.use_kernels = False
    return kernelized


def _slot(module: nn.Module) -> str:
    """Where the module's forward is: accelerate's hooks take `forward` and call what they moved to `_old_forward`."""
    return "_old_forward" if hasattr(module, "_hf_hook") and "_old_forward" in vars(module) else "forward"


def _refuse_foreign_forward(module: nn.Module) -> None:
    current = vars(module).get(_slot(module))
    if (
        current is None
        or isinstance(current, LeanForward)
        or getattr(current, "__func__", None) is type(module).forward
    ):
        return
    raise PacaError(
        f"a {qualified_name(type(module))} already has a forward of its own, {current!r}, instead of its class's. Undo "
        "that (kernelize, Liger's patches and the like) before make_lean: both can't apply."
    )


def _install(forward: LeanForward) -> None:
    vars(forward.module)[_slot(forward.module)] = forward
