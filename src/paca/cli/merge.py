"""`paca merge`: write the adapted model as a plain checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paca.cli.starting import import_libraries
from paca.convert.beforehand import merge_output
from paca.messages.program import program
from paca.messages.say import put
from paca.pretrained.purpose import classifier_in


def merge(
    path: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="The folder of a run or of an adapter.")],
    output: Annotated[Path, typer.Option(help="The folder to write.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="Type of the weights: bfloat16, float16 or float32.", show_default="that of the base model"),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The base model: a folder or a hub id.", show_default="where the adapter says")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result at --output.")] = False,
    verify: Annotated[
        bool, typer.Option(help="Read the result back, and compare its outputs with the adapter's.")
    ] = True,
) -> None:
    """Fold an adapter into its base model: a checkpoint that loads without paca."""
    merge_output(path, output, base_model, overwrite)  # before torch is imported: a wrong path is no reason to wait
    put(f"Merging {path} ...")
    import_libraries()
    from transformers.utils import logging

    from paca.convert.merged import merge_to_folder
    from paca.pretrained.conversation import needs_system

    logging.disable_progress_bar()
    merged = merge_to_folder(path, output, dtype, base_model=base_model, overwrite=overwrite, verify=verify)
    whole = merged.adapter is None
    put(f"{path} is a whole model." if whole else f"Merged {merged.adapter} into {merged.base}.")
    if merged.difference is not None:
        logits = f"differ by at most {merged.difference:.1g} of the largest" if merged.difference else "are identical"
        put(f"Read back and compared with the {'trained' if whole else 'adapted'} model: the logits {logits}.")
    put(f"Written: {merged.output} ({str(merged.dtype).removeprefix('torch.')})")
    classifier = classifier_in(merged.output)
    if classifier is not None:
        put(f'Load it with {classifier.auto_class}.from_pretrained("{merged.output}").')
        return
    put(f'Load it with AutoModelForCausalLM.from_pretrained("{merged.output}"), or: {program()} chat {merged.output}')
    if told := needs_system(merged.adapter or Path(path) / "model"):
        put(told)
