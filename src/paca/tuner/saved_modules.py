"""What an adapter holds besides columns: modules trained whole, checked before any of it reaches the model."""

from __future__ import annotations

import warnings
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from paca.config import PacaConfig
from paca.layers import PacaLayer
from paca.messages.nearest import did_you_mean
from paca.messages.shown import printable
from paca.tuner.trained_tokens import TOKENS, check_tokens

_CLASSIFIERS = frozenset({"classifier", "score"})
HEADS = {"SEQ_CLS": _CLASSIFIERS, "TOKEN_CLS": _CLASSIFIERS, "QUESTION_ANS": frozenset({"qa_outputs"})}
"""What PEFT adds to `modules_to_save`, by task: all of these names, whichever of them the model has."""


def check_saved_modules(model: nn.Module, config: PacaConfig, *, tell: bool = False) -> None:
    """Check what PEFT is going to train or load whole, while the model can still be given back as it was. Raise
    `ValueError` for a module that has to do with adapted layers, or that the adapter's file lacks, as a whole or a
    tensor of it, and where a new adapter's names are those of no module. With `tell`, warn of single such names."""
    shapes = config.shapes if config.reading else None
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {
        wanted: any(f"base_model.model.{n}".endswith(wanted) for n in modules)
        for wanted in config.modules_to_save or ()
    }
    for wanted in names if shapes is not None else ():
        heads = _heads(config)
        either = heads if wanted in heads else {wanted}
        if names[wanted] and not any(f".{one}." in f".{name}" for one in either for name in shapes or ()):
            raise ValueError(
                f"The adapter in {config.reading} holds no tensor of {wanted}, which its modules_to_save promises."
            )
    check_tokens(model, config)
    if shapes is None and not config.inference_mode and names:
        _look_for(names, model, config, tell=tell)
    adapted = [name for name, module in modules.items() if isinstance(module, PacaLayer)]
    for name, module in modules.items():
        if not any(f"base_model.model.{name}".endswith(ending) for ending in names):  # as PEFT
            continue
        for layer in adapted:
            if f"{layer}.".startswith(f"{name}.") or name.startswith(f"{layer}."):
                raise ValueError(
                    f"modules_to_save names {name}, and columns of {layer} are trained. A module is trained whole or "
                    "by its columns: leave it out of modules_to_save or of target_modules."
                )
        if shapes is None or getattr(model, "_checkpoint_conversion_mapping", None):
            continue
        whole = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
        for tensor in whole.state_dict():
            if f"base_model.model.{name}.{tensor}" not in shapes:
                raise ValueError(
                    f"The adapter has no tensor base_model.model.{name}.{tensor}, which its modules_to_save promises."
                )


def _heads(config: PacaConfig) -> frozenset[str]:
    return HEADS.get(config.task_type or "", frozenset())


def _look_for(names: dict[str, bool], model: nn.Module, config: PacaConfig, *, tell: bool) -> None:
    """Refuse the names of a new adapter if no module has any of them; a head under another name stays as it is."""
    heads = _heads(config) & names.keys()
    found = any(names[head] for head in heads)
    unknown = [name for name, there in names.items() if not there and not (name in heads and found)]
    if not unknown:
        return
    own = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    text = (
        f"{type(model).__name__} has no module named {', '.join(unknown)} (modules_to_save), which would be trained "
        f"whole.{did_you_mean(unknown[0][:99], own, '{}')} Its own modules are {', '.join(own)}."
    )
    if heads.issuperset(unknown):  # which PEFT added
        text += f" For task_type {config.task_type} PEFT adds names of heads: name this one's, or it stays frozen."
    elif not any(names.values()):
        raise ValueError(text)
    if tell:
        warnings.warn(text, stacklevel=6)


def check_whole_tensors(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> None:
    """Raise `ValueError` if one of an adapter's tensors that are no columns belongs to nothing in the model, or has
    another shape."""
    # Not from a state dict: taking one would park every weight.
    saved_whole = _saved_whole(model, adapter_name)
    places = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    unknown = sorted(name for name in tensors if name not in places or not name.startswith(saved_whole))
    for name in tensors.keys() - set(unknown):
        if tensors[name].shape != places[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensors[name].shape)}; this model's has {tuple(places[name].shape)}."
            )
    if unknown:
        first = printable(unknown[0], longest=300)
        others = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(
            f"The adapter holds {first}{others}, but the model has no such layer among the adapter's targets and "
            "modules_to_save: it was trained on another model, its config was changed, or its file was."
        )


def _saved_whole(model: nn.Module, adapter_name: str) -> tuple[str, ...]:
    """How the names begin of what an adapter may hold besides columns: modules_to_save, and embeddings (PEFT saves them
    whole when the vocabulary grew). Nothing else of the base model may be loaded over."""
    base: Any = getattr(model, "get_base_model", lambda: model)()
    embeddings = [module for kind in ("input", "output") if (module := _embeddings(base, kind)) is not None]
    beginnings = []
    for name, module in model.named_modules():
        if isinstance(module, TrainableTokensWrapper):
            beginnings.append(f"{name}.{TOKENS}.{adapter_name}")
        elif isinstance(module, AuxiliaryTrainingWrapper):
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
