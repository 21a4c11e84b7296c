"""Whether the model of a benchmark can be what it is asked to be, as far as its name and sizes tell."""

from __future__ import annotations

from pathlib import Path

from paca.bench.presets import PRESETS, TextShape
from paca.bench.settings import BenchSettings
from paca.messages.errors import PacaError
from paca.messages.nearest import nearest


def check_model_choice(settings: BenchSettings) -> None:
    """Refuse a model that can't work, before anything heavy is imported.

    Raises:
        PacaError: a mistyped preset, a size that does not go with the model, or a scope that it does not have.
    """
    preset = PRESETS.get(settings.model)
    if preset is None:
        check_not_a_mistyped_preset(settings.model)
        changed = [n for n in ("layers", "hidden", "intermediate", "vocab", "image_size") if getattr(settings, n)]
        if changed:
            raise PacaError(
                f"{changed[0]} resizes presets only ({', '.join(PRESETS)}), and {settings.model!r} is none of them."
            )
        return
    preset.resized(settings)
    if settings.scope == "blocks" and not isinstance(preset, TextShape):
        raise PacaError(f"scope 'blocks' is for language models; {settings.model} is a vision preset. Use 'model'.")


def check_not_a_mistyped_preset(name: str) -> None:
    """Refuse a name that is no preset but nearly one: looking for it on the hub would only cost time.

    Args:
        name: a model's name that is no preset.

    Raises:
        PacaError: it is not here, has not the form ``owner/name`` and is close to a preset; names the nearest.
    """
    if "/" in name or Path(name).expanduser().exists() or name.lower().endswith(".gguf"):
        return
    close = nearest(name.lower(), PRESETS, cutoff=0.6)
    if close:
        raise PacaError(
            f"There is no model {name!r} here, and no preset of that name. Did you mean {close}? The presets are "
            f"{', '.join(PRESETS)}. A model of the hub is given as owner/name."
        )
