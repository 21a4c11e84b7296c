"""Keywords that `PacaConfig` has not, as LoRA's are: what to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peft import LoraConfig

from paca.messages.nearest import did_you_mean
from paca.messages.shown import shown

_OTHER_WORDS = {"rank": "r", "alpha": "paca_alpha", "lora_alpha": "paca_alpha"}
_ADVICE = {
    "lora_dropout": "PaCA has no dropout. Leave it out.",
    "bias": "biases stay frozen, as with bias='none'. Leave it out; modules_to_save trains a module whole.",
    "use_rslora": "the columns move by paca_alpha / r. Leave it out, and set paca_alpha instead.",
    "init_lora_weights": "the change starts at zero anyway. Leave it out; which columns are trained says 'selection'.",
    "fan_in_fan_out": "PaCA knows transformers' Conv1D by itself. Leave it out.",
    "ensure_weight_tying": "tied layers are untied first: paca.untie_embeddings(model). Leave it out.",
    "loftq_config": "for quantized weights 'original_weights' starts columns at the 16-bit values. Leave this out.",
}
_LISTED = 20


def told_of_unknown(settings: Mapping[str, Any], known: Iterable[str]) -> str:
    """What to say of the keywords in `settings` that are not `known`: all of them at once, each with what to do.

    PEFT looks for "got an unexpected keyword argument" as it reads files of later versions.
    """
    known = list(known)
    unknown = [name for name in settings if name not in known]
    said = f"PacaConfig got an unexpected keyword argument, {shown(unknown[0])}"
    if len(unknown) == 1:
        hint = _hint(unknown[0], known)
        return f"{said}{'.' if hint[:1] in (' ', '') else ': '}{hint}"
    lines = [f"  {shown(name)}: {_hint(name, known).strip() or 'there is no such setting.'}" for name in unknown]
    more = [f"  and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    listed = "\n".join([*lines[:_LISTED], *more])
    return f"{said}, and {len(unknown) - 1} more:\n{listed}"


def _hint(name: str, known: list[str]) -> str:
    if name in _ADVICE:
        return _ADVICE[name]
    if name in LoraConfig.__dataclass_fields__ and name not in _OTHER_WORDS:
        return "it is LoRA's alone. Leave it out."
    return did_you_mean(_OTHER_WORDS.get(name, name[:99]), known)
