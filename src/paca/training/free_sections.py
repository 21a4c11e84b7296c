"""The sections ``paca`` and ``train``, checked as far as the sources of the two dataclasses behind them tell.

That is nearly all of it, and takes a tenth of a second where importing the classes takes seconds. The check against the
classes themselves comes after it, and is the one that counts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from paca.messages.errors import PacaError
from paca.training.dataclass_source import SourceField, SourceUnreadable, read_fields
from paca.training.key_checks import Origins, check_choice, check_keys, check_type
from paca.training.value_ranges import check_ranges

logger = logging.getLogger(__name__)

OWNED = {
    "output_dir": "the run folder is output.dir",
    "resume_from_checkpoint": "continue a run with `paca train CONFIG --resume`",
    "do_train": "this command always trains",
    "do_eval": "held-out data is given by data.eval",
    "do_predict": "this command does not predict",
    "eval_on_start": "the loss before training is eval.before",
    "disable_tqdm": "the progress line is chosen by whether the output is a terminal",
    "model_init_kwargs": "the model is described by the section model",
    "trust_remote_code": "it is model.trust_remote_code",
    "hub_token": "a secret has no place in a config file; set the environment variable HF_TOKEN",
    "parallelism_config": "it is an object; use accelerate's own config (`accelerate launch`)",
    "local_rank": "the launcher (torchrun) sets it",
}
"""Fields of SFTConfig that have another place, and which."""


def check_free_sections(sections: Mapping[str, Mapping[str, Any]], origins: Origins) -> None:
    """Check keys, types, choices and ranges of the sections ``paca`` and ``train``, without importing anything heavy.

    Raises:
        PacaError: An unknown key, a key that has another place, a wrong type, or a value outside the choices
            or the range that can work.
    """
    try:
        adapter, train = adapter_source_fields(), train_source_fields()
    except SourceUnreadable as error:
        logger.info("The keys of paca and train are checked only once their classes are imported: %s", error)
        return
    check_keys("paca", sections["paca"], adapter, origins)
    check_train_keys(sections["train"], train, origins)
    for section, fields in (("paca", adapter), ("train", train)):
        for name, value in sections[section].items():
            check_type(f"{section}.{name}", value, fields[name].annotation, origins)
            check_choice(f"{section}.{name}", value, fields[name].choices, origins)
        check_ranges(section, sections[section], origins)


def check_train_keys(settings: Iterable[str], fields: Iterable[str], origins: Origins) -> None:
    """Check the keys of the section ``train``.

    Raises:
        PacaError: An unknown key, or one that has another place.
    """
    for name in settings:
        if name in OWNED:
            raise PacaError(f"{origins.of(f'train.{name}')}: train.{name} can't be set here: {OWNED[name]}.")
    check_keys("train", settings, set(fields) - set(OWNED), origins)


def train_annotation(name: str, annotation: Any) -> Any:
    """The type of a field of ``SFTConfig`` as it really is."""
    return bool | annotation if name == "fsdp" else annotation  # transformers 5 takes true there as well


def train_source_fields() -> dict[str, SourceField]:
    """The fields of ``SFTConfig``.

    Raises:
        SourceUnreadable: TRL's or transformers' source says them in a way that is not known.
    """
    fields = read_fields("trl", "SFTConfig")
    return {name: SourceField(train_annotation(name, f.annotation), f.choices) for name, f in fields.items()}


def adapter_source_fields() -> dict[str, SourceField]:
    """The fields of ``PacaConfig`` that are not bookkeeping.

    Raises:
        SourceUnreadable: PEFT's source says them in a way that is not known.
    """
    bookkeeping = read_fields("peft.config", "PeftConfig").keys() | {"base_quantization"}
    return {name: field for name, field in read_fields("paca.config", "PacaConfig").items() if name not in bookkeeping}
