"""``paca export``: write the adapter in a form that other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paca.convert.beforehand import adapter_in, gguf_output, lora_output
from paca.messages.errors import PacaError
from paca_command import import_package

FORMS = ("lora", "merged", "gguf")


def export(
    path: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="The folder of a run or of an adapter.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="|".join(FORMS),
            help="lora: an adapter for PEFT, vLLM and others. merged: a plain checkpoint. gguf: llama.cpp.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="The folder to write; for gguf, the file.")],
    base_model: Annotated[str | None, typer.Option(help="The base model, if not where the adapter says.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output holds.")] = False,
) -> None:
    """Write an adapter as LoRA, as a merged model or for llama.cpp."""
    if to not in FORMS:
        raise PacaError(f"--to is {to!r}; it can be {', '.join(FORMS)}.")
    adapter_in(path)  # before what it takes to convert one: a wrong path is no reason to wait
    if to == "merged":
        from paca.cli.merge import merge

        merge(path, output, base_model=base_model, overwrite=overwrite)
    elif to == "lora":
        lora_output(path, output, base_model, overwrite)
        import_package()
        from paca.convert.lora import export_lora

        lora = export_lora(path, output, base_model=base_model, overwrite=overwrite)
        ranks = ", ".join(map(str, lora.ranks))
        print(f"Written: {lora.output} (LoRA, exact: {lora.layers} layers of rank {ranks}, each at scale 1)")
        if lora.saved_whole:
            print(f"Carried over: {', '.join(lora.saved_whole)}")
        _say_quantization(lora.base_quantization)
        print(f'Load it onto {lora.base} with PeftModel.from_pretrained(model, "{lora.output}"); paca is not needed.')
    else:
        gguf_output(path, output, overwrite)
        import_package()
        from paca.convert.gguf_adapter import export_gguf

        gguf = export_gguf(path, output, base_model=base_model, overwrite=overwrite)
        print(f"Written: {gguf.output} (LoRA, {gguf.layers} layers, for {gguf.architecture!r} models of llama.cpp)")
        _say_quantization(gguf.base_quantization)
        print(f"Use it with the GGUF file of {gguf.base}: llama-cli -m MODEL.gguf --lora {gguf.output}")


def _say_quantization(kind: str | None) -> None:
    if kind is not None:
        print(
            f"It was made for weights quantized as {kind}, and is exact on those alone. On others, the 16-bit "
            "originals too, results differ a little; --to merged writes a model that is exact by itself."
        )
