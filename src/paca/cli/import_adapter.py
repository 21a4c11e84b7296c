"""`paca import`: read an adapter that another tool wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paca.cli.starting import import_libraries
from paca.convert.beforehand import adapter_output, import_source
from paca.messages.say import put


def import_adapter(
    path: Annotated[str, typer.Argument(metavar="FILE_OR_FOLDER", help="The adapter's folder, or the file in it.")],
    output: Annotated[Path, typer.Option(help="The folder to write.")],
    base: Annotated[
        str | None, typer.Option(help="The base model: a folder or a hub id.", show_default="where the adapter says")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result at --output.")] = False,
) -> None:
    """Make a PaCA adapter from a checkpoint of the original authors' code, or from a LoRA that paca exported."""
    adapter_output(import_source(path), output, base, overwrite, "import")  # before torch is imported
    import_libraries()
    from paca.convert import imported

    result = imported.import_adapter(path, output, base_model=base, overwrite=overwrite)
    adapter, ranks = result.adapter, ", ".join(map(str, result.adapter.ranks))
    put(f"Read: {result.kind}, {len(adapter.layers)} layers of rank {ranks}, on {adapter.base}")
    if result.largest_move is not None:
        put(f"Their columns moved by at most {result.largest_move:.2g} of their size in any layer.")
    put(f"Written: {result.output}")
    put(f'Load it onto {adapter.base} with PeftModel.from_pretrained(model, "{result.output}"), after import paca.')
