"""What a model has and its checkpoint lacks: refused, or, of a classifier, made anew to be trained whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, cast

from torch import nn

from paca.messages.errors import PacaError


def check_nothing_missing(model: nn.Module, missing: Iterable[str], name: str) -> None:
    """Refuse the language model `name` where `missing` are weights that transformers would make at random.

    Raises:
        PacaError: Names some of them.
    """
    if lacking := _parameters_of(model, missing):
        raise PacaError(
            f"The checkpoint {name!r} lacks weights of {type(model).__name__}, which would be made at random: "
            f"{_listed(lacking)}. Is it of another kind, such as a classifier? Give a language model's checkpoint."
        )


def trunk_of(model: nn.Module) -> str:
    """The name of the part of a classifier that is not its heads: the largest, where its class names none that is there
    (CLIP's and SigLIP's name the whole of texts and images)."""
    named, parts = getattr(model, "base_model_prefix", None), dict(model.named_children())
    if named in parts:
        return str(named)
    return max(parts, key=lambda name: sum(p.numel() for p in parts[name].parameters()), default=".")


def heads_of(model: nn.Module) -> list[str]:
    """The modules of a classifier that a pretrained model need not have, with weights: those beside its trunk, or what
    a model of timm, which transformers wraps whole, calls its classifier."""
    wrapped = getattr(model, "timm_model", None)
    if wrapped is None:
        trunk = trunk_of(model)
        heads = [module for name, module in model.named_children() if name != trunk]
    else:
        found = wrapped.get_classifier()
        heads = [*found] if isinstance(found, tuple | list) else [found]
    heads = [head for head in heads if any(True for _ in head.parameters())]
    return [name for name, module in model.named_modules() if any(module is head for head in heads)]


def made_anew(model: nn.Module, found: Mapping[str, Any], name: str) -> list[str]:
    """The modules of a classifier's trunk of which its checkpoint `name` has nothing and need have nothing: a pooler,
    which language models lack.

    Args:
        model: The classifier.
        found: What transformers says of loading it (`output_loading_info`).
        name: Of the checkpoint.

    Raises:
        PacaError: The trunk lacks others: blocks, embeddings, or parts of a module; or it has some of other shapes.
    """
    trunk, heads = trunk_of(model), tuple(f"{head}." for head in heads_of(model))
    other = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
    if odd := sorted(weight for weight in other if not weight.startswith(heads)):
        raise PacaError(
            f"The checkpoint {name!r} has weights of other shapes than its config.json asks for: {_listed(odd)}. Give "
            "the config that it was saved with."
        )
    missing = found["missing_keys"]
    lacking = [weight for weight in _parameters_of(model, missing) if weight.startswith(f"{trunk}.")]
    lacking = [weight for weight in lacking if not weight.startswith(heads)]
    if not lacking:
        return []
    embeddings = None
    with suppress(NotImplementedError):  # of images, some say
        embeddings = cast(Any, model).get_input_embeddings()
    new = [
        f"{trunk}.{child}"
        for child, module in model.get_submodule(trunk).named_children()
        if all(f"{trunk}.{child}.{weight}" in lacking for weight, _ in module.named_parameters())
        and not any(isinstance(part, nn.ModuleList) or part is embeddings for part in module.modules())
    ]
    if lost := [weight for weight in lacking if not weight.startswith(tuple(f"{child}." for child in new))]:
        raise PacaError(
            f"The checkpoint {name!r} lacks weights of {type(model).__name__}, which would be made at random: "
            f"{_listed(lost)}. Is it whole? Copy it again, or give another one."
        )
    return [child for child in new if any(weight.startswith(f"{child}.") for weight in lacking)]


def _parameters_of(model: nn.Module, missing: Iterable[str]) -> list[str]:
    return sorted({name for name, _ in model.named_parameters()}.intersection(missing))


def _listed(weights: list[str]) -> str:
    return ", ".join(weights[:4]) + (f" and {len(weights) - 4:,} more" if len(weights) > 4 else "")
