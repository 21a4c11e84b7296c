"""The config of PEFT's own PaCA (>= 0.22) as ours."""

from __future__ import annotations

import dataclasses

from peft.config import PeftConfig

from paca.config import PacaConfig


def own_config(config: PeftConfig) -> PacaConfig:
    """Read another class's PaCA config; fields of the same name mean the same."""
    known = {f.name for f in dataclasses.fields(PacaConfig) if f.init} - {"peft_type"}
    return PacaConfig(**{k: v for k, v in dataclasses.asdict(config).items() if k in known})
