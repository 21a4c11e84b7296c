"""A checkpoint's settings for writing texts, where transformers reads them but refuses to save them."""

from __future__ import annotations

import logging
import re
from typing import Any

logger = logging.getLogger(__name__)


def make_savable(model: Any, name: str) -> None:
    """Take out what `generation_config.json` of the checkpoint `name` says without effect on `generate`, such as a
    temperature without `do_sample`, and say so: else transformers won't save a model with other ends of texts.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError as error:
        unused = re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE)
        for setting in unused:
            setattr(settings, setting, None)
        listed = ", ".join(unused)
        logger.warning("In generation_config.json of %r these have no effect, and are not saved: %s.", name, listed)
