"""Whether the names in `target_modules` are those of modules that a model has, and what to say if they are not."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from paca.messages.nearest import did_you_mean
from paca.messages.shown import shown

_LISTED = 20
_WRAPPED = re.compile(r"\b(original_module|modules_to_save\.[^.]+)\.")
"""Within a module that is trained whole."""
_NOTHING = ("not found in the base model", "No modules were targeted", "All modules were excluded")
"""What PEFT says where there is no layer to adapt."""


def warn_of_names(targets: Any, model: nn.Module) -> None:
    """Warn of names in a list that no module has. PEFT leaves them out without a word where another one fits, which
    lists for several architectures need, and misspelt ones do not."""
    if (problem := problem_of(targets, model, "target_modules")) is not None:
        warnings.warn(f"{type(model).__name__} is adapted without some names: {problem}", stacklevel=6)


def problem_of(targets: Any, model: nn.Module, setting: str) -> str | None:
    """What is wrong with `target_modules`, for the end of a message: names without a module, or a name without a list.
    None of another text, which is "all-linear" or a pattern.

    Args:
        targets: As the config has them.
        model: Whose modules are adapted.
        setting: What the message calls them.
    """
    single = targets if isinstance(targets, str) else None
    names = [_WRAPPED.sub("", name) for name, _ in model.named_modules()]
    if single is not None:
        if not re.fullmatch(r"\w+(, ?\w+)*", single) or single in names:
            return None
        targets = re.split(", ?", single)
    elif not isinstance(targets, list | tuple | set):
        return None
    ends = {end for name in names for end in _ends_of(name)}
    unknown = sorted(map(str, (target for target in targets if target not in ends)))
    if unknown:
        listed = ", ".join(unknown[:_LISTED]) + (", ..." if len(unknown) > _LISTED else "")
        hint = did_you_mean(unknown[0][:99], _layers_with_weights(model), "{}")
        return f"it has no module named {listed} ({setting}).{hint} {told_of_layers(model)}"
    if single is not None:
        return (
            f"{setting} is the text {shown(single)}, a pattern that matches no whole name. Give a list of the ends of "
            f"names: [{single}]."
        )
    return None


def _ends_of(name: str) -> Iterator[str]:
    """`a.b.c`, `b.c` and `c`."""
    while name:
        yield name
        name = name.partition(".")[2]


def tell_of_layers(error: BaseException, model: nn.Module, targets: Any) -> None:
    """Where PEFT's error says that there is nothing to adapt, raise one that also says why, or names what there is."""
    if isinstance(error, ValueError) and any(words in str(error) for words in _NOTHING):
        if (problem := problem_of(targets, model, "target_modules")) is not None:
            raise ValueError(f"The config does not fit {type(model).__name__}: {problem}") from error
        raise type(error)(f"{error} {told_of_layers(model)}") from error


def told_of_layers(model: nn.Module) -> str:
    """The names that `target_modules` may have, for people."""
    kinds = _layers_with_weights(model)
    return f"Its layers with weights are {', '.join(kinds[:_LISTED])}{', ...' if len(kinds) > _LISTED else ''}."


def _layers_with_weights(model: nn.Module) -> list[str]:
    """Those that hold weights in their last dimension(s); norms and activations are none that can be adapted."""
    adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    found = dict.fromkeys(
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if f"{name}." in adapted or any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        if f"{name}." in adapted or not name.startswith(adapted)
    )
    return [*found]
