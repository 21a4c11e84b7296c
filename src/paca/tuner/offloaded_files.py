"""What PEFT does to the files of a base model that is partly on the disk, when an adapter is loaded onto it."""

from __future__ import annotations

import os
from typing import Any

from torch import nn


def refuse_overwriting(model: Any) -> None:
    """Raise `ValueError` where PEFT is about to write over the base model's own files.

    `PeftModel.from_pretrained` takes accelerate's hooks off, and writes the files that hold layers of the disk anew,
    under names of the adapted model (0.21: `_update_offload`): in the hub's cache beside them, else to the file's path
    without a leading slash. A relative path stays what it is, and in the working folder `/` so does a whole one.
    """
    folder = str(getattr(model, "name_or_path", ""))
    written = folder.lstrip(os.sep)
    if not os.path.isdir(folder) or "--" in folder or not os.path.isdir(written):
        return
    if os.path.samefile(folder, written) and any(map(_lies_elsewhere, model.modules())):
        raise ValueError(
            f"The base model was loaded from {folder}, and is partly on the disk: PEFT would write the adapted model "
            "over its files. Load it by its whole path (os.path.abspath), in another working folder than /, then the "
            "adapter."
        )


def _lies_elsewhere(module: nn.Module) -> bool:
    mine = (parameter for parameter in module._parameters.values() if parameter is not None)
    return not hasattr(module, "_hf_hook") and any(parameter.is_meta for parameter in mine)
