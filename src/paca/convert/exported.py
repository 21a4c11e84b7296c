"""Write an adapter in a form that other programs read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal, NamedTuple

from paca.convert.adapter import Adapter, read_adapter
from paca.convert.beforehand import adapter_in, adapter_output, gguf_output
from paca.convert.files_beside import files_beside
from paca.convert.gguf_adapter import write_gguf
from paca.convert.lora import write_lora
from paca.convert.pefts_paca import write_pefts_paca
from paca.pretrained.whole_output import whole_output

_WRITERS = {"lora": write_lora, "gguf": write_gguf, "peft": write_pefts_paca}


class Exported(NamedTuple):
    """What was written, and from what."""

    output: Path
    adapter: Adapter


def export_adapter(
    path: str | Path,
    output: str | Path,
    to: Literal["lora", "gguf", "peft"],
    *,
    base_model: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a run's or a folder's PaCA adapter in another form; as a folder, with the tokenizer and labels that it has.

    Reads the base model's config, and of its weights some rows (`warn_of_other_base`). The output appears only when it
    is complete.

    Args:
        path: A run folder or an adapter folder.
        output: The folder to write; for `"gguf"` the `.gguf` file.
        to: `"lora"` for PEFT and other programs, `"gguf"` for llama.cpp, `"peft"` for the PaCA of PEFT >= 0.22.
        base_model: Where the base model lies, if not where the adapter says.
        overwrite: Replace what `output` already holds of the kind.

    Raises:
        PacaError: An adapter that can't be read, or that has no such form, or an output that is in use.
    """
    if to == "gguf":
        output = gguf_output(path, output, base_model, overwrite)
    else:
        output = adapter_output(path, output, base_model, overwrite)
    adapter = read_adapter(path, base_model)
    beside = [] if to == "gguf" else files_beside(adapter_in(path))
    needs = sum(layer.delta.nbytes for layer in adapter.layers.values()) + sum(file.stat().st_size for file in beside)
    with whole_output(output, needs, overwrite=overwrite) as partial:
        _WRITERS[to](adapter, partial)
        for file in beside:
            shutil.copyfile(file, partial / file.name)
    return Exported(output, adapter)
