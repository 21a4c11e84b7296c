"""Makes "PACA" a method that PEFT knows, whichever PEFT is installed. All dealings with PEFT's registry are here.

PEFT <= 0.21 has no PaCA: the enum member is added and the method registered. PEFT >= 0.22 has one of its own: its
entries are replaced by ours, which reads and writes the same adapters.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from peft import mapping
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.peft_types import PeftType, register_peft_method

NAME = "PACA"
PREFIX = "paca_"


def add_peft_type() -> PeftType:
    """Return `PeftType.PACA`, adding it to the enum if this PEFT lacks it."""
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_ = NAME
        member._value_ = NAME
        member.__objclass__ = PeftType  # type: ignore[attr-defined]
        member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)  # the enum's own __setattr__ refuses new members
    return PeftType(NAME)


def as_ours(config: Any, config_cls: Any) -> Any:
    """A config of PEFT's own PaCA as one of ours: fields of the same name mean the same."""
    known = {field.name for field in dataclasses.fields(config_cls) if field.init} - {"peft_type"}
    return config_cls(**{key: value for key, value in dataclasses.asdict(config).items() if key in known})


def register(config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Register ours, in place of whatever is registered as "PACA"."""
    peft_type = add_peft_type()
    for table in (
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
        mapping.PEFT_TYPE_TO_TUNER_MAPPING,
        mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
    ):
        table.pop(peft_type, None)
    register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
