"""The `train` section of a run: fields of its trainer's settings, our defaults, and those we set ourselves."""

from __future__ import annotations

import dataclasses
import math
import typing
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, get_scheduler

from paca.messages.errors import PacaError
from paca.pretrained.context_length import context_length
from paca.training.config.early_checks import OWN, OWNED
from paca.training.config.key_checks import Mistakes, Origins, check_section
from paca.training.config.learning_rate import AUTO, automatic_rate
from paca.training.reporting.tracking import check_trackers
from paca.training.trainers import TRAINERS, trainer_kind

_WITHOUT_EFFECT = ("trainer", "include_num_input_tokens_seen", "remove_unused_columns")
"""On the result, whatever our default for them."""

_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "above zero": (
        lambda value: 0 < value < math.inf,
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps num_train_epochs "
        "max_length logging_steps save_steps eval_steps factor_rank early_stopping_patience",
    ),
    "zero or more": (
        lambda value: 0 <= value < math.inf,
        "learning_rate weight_decay max_grad_norm adam_epsilon warmup_steps seed data_seed dataloader_num_workers",
    ),
    "zero or more and less than 1": (lambda value: 0 <= value < 1, "adam_beta1 adam_beta2 label_smoothing_factor"),
    "1 or more (or -1: as many as the epochs)": (lambda value: value >= 1 or value == -1, "max_steps"),
}
"""Numbers that surely are mistakes: most of it torch or transformers would refuse too, minutes later, or take without a
word."""


@cache
def train_fields(trainer: str = "sft") -> dict[str, Any]:
    """Name and type of each field of a trainer's settings (`SFTConfig` for `"sft"`)."""
    arguments = TRAINERS[trainer].arguments
    annotations = typing.get_type_hints(arguments)
    return {
        # transformers 5 takes true for fsdp as well
        option.name: bool | annotations[option.name] if option.name == "fsdp" else annotations[option.name]
        for option in dataclasses.fields(arguments)
        if option.init
    }


def keys_of_files(settings: Mapping[str, Any]) -> list[str]:
    """The keys of `train` that take a dictionary, or a file that holds one."""
    fields = train_fields(settings.get("trainer", "sft"))
    return [
        name
        for name, annotation in fields.items()
        if any(dict in (kind, typing.get_origin(kind)) for kind in typing.get_args(annotation))
    ]


def keys_of(trainer: str) -> dict[str, Any]:
    """Name and type of each key that the section may have."""
    rate = {"learning_rate": float | Literal[AUTO]}
    return train_fields(trainer) | rate | TRAINERS[trainer].own_keys | OWN


def check_train_settings(settings: Mapping[str, Any], origins: Origins) -> None:
    """Check the keys, types, choices and ranges of the section.

    Args:
        settings: What the user gave.
        origins: Where.

    Raises:
        PacaError: An unknown key, a key that has another place, a wrong type, or a value outside the choices
            or the range that can work.
    """
    check_section("train", {"trainer": settings.get("trainer", "sft")}, {"trainer": Literal[tuple(TRAINERS)]}, origins)
    kind = trainer_kind(settings)
    annotations, mistakes, own = keys_of(kind.name), Mistakes(), dict(settings)
    for name in [name for name in settings if name not in annotations]:
        takers = [other for other in TRAINERS if name in keys_of(other)]
        if takers:
            del own[name]
            with mistakes.noted():
                place = f"{origins.of(f'train.{name}')}: train.{name}"
                raise PacaError(f"{place} is a setting of train.trainer: {' or '.join(takers)}, not of {kind.name}.")
    annotations = {name: annotation for name, annotation in annotations.items() if name not in OWNED}
    choices = {option.name: option.metadata.get("choices") for option in dataclasses.fields(kind.arguments)}
    with mistakes.noted():
        check_section("train", own, annotations, origins, choices)
    counted = "include_num_input_tokens_seen"
    if own.get(counted) in (False, "no") and kind.defaults(own).get(counted) != "no":
        with mistakes.noted():
            place = origins.of(f"train.{counted}")
            raise PacaError(f"{place}: train.{counted} can't be off: a run tells its tokens in a second. Leave it out.")
    for name, value in own.items():
        for words, (holds, names) in _RANGES.items():
            if name in names.split() and isinstance(value, (int, float)) and not holds(value):
                with mistakes.noted():
                    raise PacaError(f"{origins.of(f'train.{name}')}: train.{name} must be {words}, not {value}.")
    mistakes.tell()
    with mistakes.noted():  # what follows needs values of the right types
        kind.check(settings, origins)
    with mistakes.noted():
        check_trackers(settings.get("report_to"), f"{origins.of('train.report_to')}: train.report_to")
    mistakes.tell()


def with_defaults(
    settings: Mapping[str, Any],
    model: PreTrainedModel,
    *,
    has_eval: bool,
    method: str = "paca",
    adapter: Mapping[str, Any] | None = None,
    weight_size: float | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """The section with TRL's defaults, or our own, spelled out where the user gave nothing.

    Args:
        settings: What the user gave.
        method: The run's.
        adapter: Settings of the method's section; none by default.
        weight_size: Of the model's weights, for the rate; see `automatic_rate`.
        model: With or without weights; the longest sequence that it takes, and the type of its weights, count.
        has_eval: Whether there is held-out data.
        device: `"cpu"` or `"cuda"`, for a plan; what is here by default.
    """
    kind = trainer_kind(settings)
    if settings.get("learning_rate") == AUTO:
        settings = {name: value for name, value in settings.items() if name != "learning_rate"}
    context = context_length(model)
    # Numbers that change the result are spelled out even where they are TRL's own defaults today.
    defaults: dict[str, Any] = {
        "trainer": kind.name,
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "per_device_eval_batch_size": 8,
        "max_length": min(1024, context or 1024),
        "learning_rate": automatic_rate(kind, method, adapter or {}, weight_size, settings.get("factor_rank"))[0],
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.03,  # a share of all steps
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": 42,
        **_precision(settings, method, adapter or {}, next(model.parameters()).dtype, device),
        _checkpointing_field(): False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # true would replace a NaN loss by the mean of the losses before it
        "eval_strategy": "steps" if has_eval else "no",
        "save_strategy": "steps",
        "save_steps": 0.2,  # a share of all steps, as eval_steps
        "save_total_limit": 2,
        "report_to": "none",
    }
    if settings.get("eval_strategy", defaults["eval_strategy"]) == "steps":
        defaults["eval_steps"] = 0.2
    if settings.get("early_stopping_patience") is not None:
        defaults |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    if {**defaults, **settings}.get("load_best_model_at_end"):  # which needs a checkpoint at each evaluation
        defaults["save_strategy"] = settings.get("eval_strategy", defaults["eval_strategy"])
        defaults["save_steps"] = settings.get("eval_steps", 0.2)
    if settings.get("save_strategy") == "best":  # by what, transformers wants to be told
        defaults["metric_for_best_model"] = "loss"
    if settings.get("gradient_checkpointing") is not None:  # the older name of the same field
        del defaults[_checkpointing_field()]
    if method != "full":
        defaults["autocast_adapter_dtype"] = True
    known = keys_of(kind.name)
    return {**{k: v for k, v in defaults.items() if k in known}, **kind.defaults(settings), **settings}


def own_defaults(given: Mapping[str, Any], resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What the user did not give, and the trainer would have otherwise: name and value."""
    kind = trainer_kind(resolved)
    theirs = {option.name: option.default for option in dataclasses.fields(kind.arguments)}
    # What they leave out in their fields and decide when they are made; checkpointing has two names.
    theirs |= {"report_to": "none", "eval_strategy": "no", "autocast_adapter_dtype": True}
    theirs |= dict.fromkeys(("bf16", _checkpointing_field(), "gradient_checkpointing"), kind.library == "TRL")
    return {
        name: value
        for name, value in resolved.items()
        if name not in (*given, *_WITHOUT_EFFECT) and value != theirs.get(name)
    }


def training_arguments(settings: Mapping[str, Any], checkpoints: Path) -> Any:
    """The settings of a run's trainer, as it takes them: an `SFTConfig`, or another `TrainingArguments`.

    Args:
        settings: The section with its defaults.
        checkpoints: The folder for checkpoints.

    Raises:
        PacaError: TRL or transformers refuses the combination of settings.
    """
    kind = trainer_kind(settings)
    settings = {name: value for name, value in settings.items() if name in train_fields(kind.name)}
    if not torch.accelerator.is_available():
        # Several processes on CPUs, and bf16 there, work only when the CPU is asked for.
        settings = {**settings, "use_cpu": True}
    settings = {**settings, **kind.forced}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*gradient_checkpointing.*")
            arguments = kind.arguments(output_dir=str(checkpoints), disable_tqdm=True, **settings)
    except (ValueError, TypeError) as error:
        raise PacaError(f"The section train does not work out: {error}") from error
    _check_schedule(arguments)
    if arguments.optim_args and any(one.count("=") != 1 for one in arguments.optim_args.split(",")):
        raise PacaError(f"train.optim_args is {arguments.optim_args!r}; expected NAME=VALUE,NAME=VALUE, as rank=8.")
    # With more transformers would copy the model to each in every step (nn.DataParallel): TRL's trainers refuse that.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _check_schedule(arguments: Any) -> None:
    """Refuse a schedule whose own settings lack or can't be, which transformers would only when training begins."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=arguments.learning_rate)
    given = arguments.lr_scheduler_kwargs
    kind = arguments.lr_scheduler_type
    try:
        get_scheduler(kind, optimizer, num_warmup_steps=0, num_training_steps=1, scheduler_specific_kwargs=given)
    except (ValueError, TypeError) as error:
        raise PacaError(
            f"The schedule of the rate (train.lr_scheduler_type: {getattr(kind, 'value', kind)}) can't be made: {error}"
            f". Give what it takes in train.lr_scheduler_kwargs, which is {given or 'empty'}, or choose another one."
        ) from error


def _checkpointing_field() -> str:
    return "activation_checkpointing" if "activation_checkpointing" in train_fields() else "gradient_checkpointing"


def _precision(
    settings: Mapping[str, Any], method: str, adapter: Mapping[str, Any], weights: torch.dtype, device: str | None
) -> dict[str, bool]:
    """`bf16` and, where it is on, `fp16`: autocast, and scaled losses with it.

    On a CPU autocast costs more than it saves. On a GPU float32 weights multiply in bfloat16, or in float16 where the
    GPU has no unit for that. 16-bit weights multiply in their own type already; in float16 small gradients would
    become zero unless losses are scaled, which torch does for trained weights in float32 alone.
    """
    here = torch.cuda.is_available() if device is None else device == "cuda"
    if not here or settings.get("use_cpu") or settings.get("bf16") or settings.get("fp16"):
        return {"bf16": False}
    if weights == torch.float32:
        native = device is not None or torch.cuda.is_bf16_supported(including_emulation=False)
        return {"bf16": True} if native else {"bf16": False, "fp16": True}
    in_float32 = method != "full" and settings.get("autocast_adapter_dtype") is not False
    whole = adapter.get("modules_to_save") or trainer_kind(settings).task_type == "SEQ_CLS"  # as a classifier's head
    return {"bf16": False, "fp16": True} if weights == torch.float16 and in_float32 and not whole else {"bf16": False}
