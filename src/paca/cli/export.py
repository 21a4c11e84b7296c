"""`paca export`: write the adapter in a form that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paca.cli.quiet import hide_library_notes
from paca.convert.beforehand import adapter_in, adapter_output, gguf_output
from paca.messages.errors import PacaError

FORMS = ("lora", "merged", "gguf", "peft")


def export(
    path: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="The folder of a run or of an adapter.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="|".join(FORMS),
            help="lora: an adapter for PEFT, vLLM and others. merged: a plain checkpoint. gguf: llama.cpp. peft: an "
            "adapter for the PaCA of PEFT >= 0.22.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="The folder to write; for gguf, the file.")],
    base_model: Annotated[str | None, typer.Option(help="The base model, if not where the adapter says.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output holds.")] = False,
) -> None:
    """Write an adapter as LoRA, as a merged model, for llama.cpp or for PEFT's own PaCA."""
    hide_library_notes()
    if to not in FORMS:
        raise PacaError(f"--to is {to!r}; it can be {', '.join(FORMS)}.")
    adapter_in(path)  # before what it takes to convert one: a wrong path is no reason to wait
    if to == "merged":
        from paca.cli.merge import merge

        merge(path, output, base_model=base_model, overwrite=overwrite)
    elif to == "gguf":
        gguf_output(path, output, overwrite)
        from paca.convert.gguf_adapter import export_gguf

        gguf = export_gguf(path, output, base_model=base_model, overwrite=overwrite)
        layers = f"{len(gguf.adapter.layers)} layers"
        print(f"Written: {gguf.output} (LoRA, {layers}, for {gguf.architecture!r} models of llama.cpp)")
        _say_quantization(gguf.adapter.quantization)
        print(f"Use it with the GGUF file of {gguf.adapter.base}: llama-cli -m MODEL.gguf --lora {gguf.output}")
    else:
        adapter_output(path, output, base_model, overwrite)
        from paca.convert.lora import export_lora
        from paca.convert.pefts_paca import export_to_peft

        convert = export_lora if to == "lora" else export_to_peft
        output, adapter = convert(path, output, base_model=base_model, overwrite=overwrite)
        layers = f"{len(adapter.layers)} layers of rank"
        if to == "lora":
            print(f"Written: {output} (LoRA, exact: {layers} {', '.join(map(str, adapter.ranks))}, each at scale 1)")
        else:
            print(f"Written: {output} (PaCA for PEFT >= 0.22: {layers} {adapter.ranks[-1]}, each at scale 1)")
        if adapter.saved_whole:
            print(f"Carried over: {', '.join(sorted(adapter.saved_whole))}")
        _say_quantization(adapter.quantization)
        print(f'Load it onto {adapter.base} with PeftModel.from_pretrained(model, "{output}"); paca is not needed.')


def _say_quantization(kind: str | None) -> None:
    if kind is not None:
        print(
            f"It was made for weights quantized as {kind}, and is exact on those alone. On others, the 16-bit "
            "originals too, results differ a little; --to merged writes a model that is exact by itself."
        )
