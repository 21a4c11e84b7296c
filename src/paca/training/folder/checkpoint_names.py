"""The names of a whole model's weights in its checkpoints: those that the trainer finds again.

transformers saves many models under the names of their first checkpoints (a ViT's `encoder.layer.0`, experts one by
one). `from_pretrained` translates them back. Its trainer does not, when it goes on from a checkpoint or takes the best
one: it goes on with the weights that it has, and logs a warning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from peft import PeftModel

from paca.messages.errors import PacaError


@contextmanager
def own_names(model: Any) -> Iterator[None]:
    """Within this, `model` is saved under the names that it has here. With an adapter nothing changes."""
    if isinstance(model, PeftModel) or not hasattr(model, "save_pretrained"):
        yield
        return
    with patch.object(model, "save_pretrained", partial(model.save_pretrained, save_original_format=False)):
        yield


def refuse_missing_weights(trainer: Any, checkpoint: Path) -> None:
    """Have a whole model's trainer refuse a checkpoint that lacks weights under their names, instead of going on.

    Args:
        trainer: Of the run.
        checkpoint: What it goes on from.
    """
    if isinstance(trainer.model, PeftModel):
        return

    def check(loaded: Any) -> None:
        tensors = {name: tensor.data_ptr() for name, tensor in trainer.model.state_dict().items()}
        missing = set(loaded.missing_keys)
        found = {place for name, place in tensors.items() if name not in missing}  # tied ones are saved once
        if lost := sorted(name for name in missing if tensors.get(name) not in found):
            raise PacaError(
                f"{checkpoint} lacks {len(lost):,} weights of this model by their names, such as {lost[0]}: an earlier "
                "paca saved them under others. The run can't go on from there. Train anew, without --resume."
            )

    vars(trainer)["_issue_warnings_after_load"] = check
