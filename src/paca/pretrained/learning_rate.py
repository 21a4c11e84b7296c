"""The rate that suits PaCA, and LoRA: it follows from their alpha and from the size of the model's weights.

The rule was fitted to measured runs. Adam moves each value by about the rate, however large it is: so a model with
small weights needs a small one. An output is a sum over the `r` trained columns, however many others there are, and
each counts `paca_alpha / r` times: so its first steps are as large as rate times `paca_alpha`, whatever `r` is. Those
of LoRA are rate times `lora_alpha / √r`, as measured: its products of B and A add up like random numbers. And its rate
falls with the root of the weights' size.
docs/notes/learning-rate.md has the measurements, and where the rule was not tried.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import nn

from paca.config import PacaConfig
from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean
from paca.pretrained.location import locate, neighbour_hint
from paca.pretrained.weight_size import finder, in_cache, size_of_loaded, weight_size

RATE_OF_WEIGHTS = 0.4
"""Rate times paca_alpha, as a part of the weights' root mean square, for language models."""
LORA_RATE_OF_WEIGHTS = 0.025
"""Of LoRA, rate times `lora_alpha / √r`, as a part of the root of the same."""
RATES_OF_WEIGHTS = {
    **dict.fromkeys(("sft", "reward", "classification"), (RATE_OF_WEIGHTS, LORA_RATE_OF_WEIGHTS)),
    **dict.fromkeys(("dpo", "grpo"), (RATE_OF_WEIGHTS / 10, LORA_RATE_OF_WEIGHTS / 10)),
    "image_classification": (1.2, 0.1),
}
"""Both by `train.trainer`."""
_USUAL_SIZE = 0.03  # assumed where it can't be read; Gemma 3 270M has 0.037, SmolLM2-135M 0.2


_SCALE = 2.0  # of factors, in units of `paca_alpha / r`: what `FactoredAdamW` and `train.factor_rank` take


def learning_rate(
    model: str | os.PathLike[str] | nn.Module,
    config: PacaConfig | LoraConfig,
    *,
    factor_rank: int | None = None,
    trainer: str | None = None,
) -> float:
    """The rate with which `paca train` trains a model where a run gives none: for AdamW, and falling to 0 in the run.

    Args:
        model: Folder, `.gguf` file or hub id (of which the files that are read are fetched), or the loaded model, with
            or without adapters. 64 rows of each weight in four blocks are read, nothing is loaded.
        config: Its `paca_alpha` counts; of plain LoRA `r`, `lora_alpha` and `use_rslora`.
        factor_rank: The `rank` of `paca.FactoredAdamW`, if that trains the columns.
        trainer: What trains it, by the names of `train.trainer`, such as `"dpo"`. None: `"image_classification"` for
            a model of images by its config, else `"sft"`, whose rate reward models and classifiers of texts have too.

    Returns:
        `0.4 × (root mean square of the weights) / paca_alpha`, to two digits, and of LoRA `0.025 × √(the same × r) /
            lora_alpha`, as of factors of that rank with twice that alpha; a tenth of it for DPO and GRPO, of images
            1.2 and 0.1 in place of 0.4 and 0.025. Where the weights can't be read (quantized ones other than GGUF),
            0.03 is taken for their size, with a warning.

    Raises:
        PacaError: There is no such model here, nor on the hub; or the hub can't be reached.
        TypeError: `model` is neither a name nor a model.
        ValueError: `config` is LoRA of a kind that was not measured, such as DoRA, or has no factors; or there is no
            such trainer.
    """
    if trainer is not None and trainer not in RATES_OF_WEIGHTS:
        hint = did_you_mean(trainer, RATES_OF_WEIGHTS)
        raise ValueError(f"There is no trainer {trainer!r}; there are {', '.join(RATES_OF_WEIGHTS)}.{hint}")
    if isinstance(model, nn.Module):
        named, size = f"the loaded {type(model).__name__}", size_of_loaded(model)
    elif isinstance(model, (str, os.PathLike)):
        named, size = repr(str(model)), _size_of_named(model)
    else:
        raise TypeError(
            f"The model is a {type(model).__name__}; expected a folder, a .gguf file or a hub id, or a loaded model "
            "(torch.nn.Module). Give the model that you train, or its name."
        )
    if size is None:
        warnings.warn(
            f"The size of the weights of {named} can't be read. {_USUAL_SIZE} is assumed, and the rate may be "
            "several times too low or too high: try others beside it.",
            stacklevel=2,
        )
    of_columns, of_lora = RATES_OF_WEIGHTS[trainer or ("image_classification" if _of_images(model) else "sft")]
    if isinstance(config, LoraConfig):
        if factor_rank is not None:
            raise ValueError("factor_rank is PaCA's, and the config is a LoraConfig, whose r says it. Leave it out.")
        if not is_plain_lora(vars(config)):
            raise ValueError(
                "This LoraConfig is not plain LoRA (use_dora, init_lora_weights other than True, or a lora_alpha "
                "of 0), for which no rate was measured. Try 3e-4 and rates beside it."
            )
        return lora_rate_and_rule(config.r, config.lora_alpha, size, of_lora, rslora=config.use_rslora)[0]
    if factor_rank is not None:
        return factors_rate_and_rule(factor_rank, config.r, config.paca_alpha, size, of_lora)[0]
    return rate_and_rule(config.paca_alpha, size, of_columns)[0]


def _of_images(model: str | os.PathLike[str] | nn.Module) -> bool:
    """Whether a model's config is that of an image classifier's body."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    if isinstance(model, nn.Module):
        kind = getattr(getattr(model, "config", None), "model_type", None)
    else:
        location = locate(str(model))
        try:
            kind = json.loads(finder(location, fetch=True)("config.json").read_text(encoding="utf-8"))["model_type"]
        except Exception:  # a .gguf file, or what its loader says more of
            return False
    return kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES


def _size_of_named(model: str | os.PathLike[str]) -> float | None:
    location = locate(str(model))
    size = weight_size(location, fetch=True)
    if size is None and location.source == "hub" and not in_cache(location.name_or_path):
        raise PacaError(
            f"There is no file or folder {str(model)!r} here (working folder: {Path.cwd()})."
            f"{neighbour_hint(str(model))} It looks like a hub id, and the hub has no weights of that name, or "
            f"can't be reached. Check the name; connect to the internet, or get it first: hf download {model}"
        )
    return size


def rate_and_rule(alpha: float, size: float | None, part: float = RATE_OF_WEIGHTS) -> tuple[float, str]:
    """The rate of PaCA for weights of that root mean square (None: not known), and the rule in words; `part` of it."""
    taken, known = _taken(size)
    return _rounded(part * taken / alpha), f"{part:g} × {taken:.2g} / paca_alpha; {known}"


def lora_rate_and_rule(
    r: int, alpha: float, size: float | None, part: float = LORA_RATE_OF_WEIGHTS, *, rslora: bool = False
) -> tuple[float, str]:
    """The same of LoRA; with `use_rslora`, which scales by `lora_alpha / √r`, the rate does not depend on r."""
    taken, known = _taken(size)
    of_rank, words = (1, "") if rslora else (r, " × r")
    rate = _rounded(part * math.sqrt(taken * of_rank) / alpha)
    return rate, f"{part:g} × √({taken:.2g}{words}) / lora_alpha; {known}"


def factors_rate_and_rule(
    rank: int, r: int, alpha: float, size: float | None, part: float = LORA_RATE_OF_WEIGHTS
) -> tuple[float, str]:
    """The same of columns whose deltas are stepped as factors of `rank`: LoRA's of that r."""
    taken, known = _taken(size)
    rate = _rounded(part * math.sqrt(taken * rank) / (_SCALE * rank) * r / alpha)
    unit = "" if alpha == r else " × r / paca_alpha"
    return rate, f"{part:g} × √({taken:.2g} × factor_rank) / ({_SCALE:g} × factor_rank){unit}; {known}"


def is_plain_lora(settings: Mapping[str, Any]) -> bool:
    """Whether these fields of a `LoraConfig` are LoRA as it was measured: no DoRA, begun with a random A and B at 0."""
    positive = min(settings.get("r", LoraConfig.r), settings.get("lora_alpha", LoraConfig.lora_alpha)) > 0
    return positive and settings.get("init_lora_weights", True) is True and not settings.get("use_dora")


def _taken(size: float | None) -> tuple[float, str]:
    """The size of the weights that a rule takes, and what it is."""
    known = "the root mean square of the weights" if size else "assumed of the weights, which were not read"
    size = size or _USUAL_SIZE
    return size, f"{size:.2g} is {known}"


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")
