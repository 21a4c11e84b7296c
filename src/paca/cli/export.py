"""`paca export`: write the adapter in a form that other programs read."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from paca.cli.starting import import_libraries
from paca.convert.beforehand import adapter_in, adapter_output, gguf_output
from paca.messages.errors import PacaError
from paca.messages.nearest import did_you_mean
from paca.messages.say import put
from paca.messages.units import format_bytes
from paca.pretrained.adapter_folder import ADAPTER_WEIGHTS, system_of_training

FORMS = ("lora", "merged", "gguf", "peft")


def export(
    path: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="The folder of a run or of an adapter.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="|".join(FORMS),
            help="The form: lora (PEFT, vLLM and others), merged (a plain checkpoint), gguf (llama.cpp), or peft (the "
            "PaCA of PEFT >= 0.22).",
        ),
    ],
    output: Annotated[Path, typer.Option(help="The folder to write; for gguf the file.")],
    base_model: Annotated[
        str | None, typer.Option(help="The base model: a folder or a hub id.", show_default="where the adapter says")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result at --output.")] = False,
) -> None:
    """Write an adapter for other programs: LoRA, a merged model, llama.cpp, or PEFT's own PaCA."""
    if to not in FORMS:
        raise PacaError(f"--to is {to!r}; it can be {', '.join(FORMS)}.{did_you_mean(to, FORMS, '{}')}")
    if to == "merged":
        from paca.cli.merge import merge

        merge(path, output, base_model=base_model, overwrite=overwrite)
        return
    adapter_in(path)  # before what it takes to convert one: a wrong path is no reason to wait
    if to == "gguf":
        gguf_output(path, output, base_model, overwrite)
    else:
        adapter_output(path, output, base_model, overwrite)
    put(f"Reading {path} ...")
    import_libraries()
    import peft

    from paca.convert.exported import export_adapter
    from paca.convert.gguf_adapter import architecture_of
    from paca.pretrained.conversation import needs_system
    from paca.pretrained.purpose import loading_code

    form: Any = to  # one of FORMS
    output, adapter = export_adapter(path, output, form, base_model=base_model, overwrite=overwrite)
    layers, ranks = f"{len(adapter.layers)} layers", ", ".join(map(str, adapter.ranks))
    if to == "gguf":
        put(f"Written: {output} (LoRA, {layers}, for {architecture_of(adapter).name!r} models of llama.cpp)")
    elif to == "lora":
        put(f"Written: {output} (LoRA, exact but for rounding: {layers} of rank {ranks}, each at scale 1)")
        put("On 16-bit weights outputs differ by their rounding; --to merged writes the very same weights.")
        before, after = map(_bytes_of_weights, (adapter_in(path), output))
        put(f"It has {after}, the adapter {before}: LoRA's A, which picks the columns, is written out.")
    else:
        form_of = f"PaCA for PEFT >= 0.22, here is {peft.__version__}"
        put(f"Written: {output} ({form_of}: {layers} of rank {adapter.ranks[-1]}, each at scale 1)")
    if adapter.saved_whole:
        put(f"Carried over: {', '.join(sorted(adapter.saved_whole))}")
    _say_quantization(adapter.quantization)
    if to == "gguf":
        from paca.pretrained.trainable_copy import copied_from

        file, form = copied_from(adapter.base), _prompts_form(adapter_in(path), Path(adapter.base))
        where = (
            f", with the file that {adapter.base} was unpacked from"
            if file
            else f" with {adapter.base} as a GGUF file, which llama.cpp's convert_hf_to_gguf.py makes of its folder"
        )
        given = shlex.quote(file) if file else "MODEL.gguf"
        put(f"Use it{where}: llama-cli -m {given} --lora {shlex.quote(str(output))}{form}")
    elif adapter.classifier is not None:
        code = loading_code(adapter.classifier, str(output), adapter.base, adapter.config.revision)
        put(f"Load it with its labels, in Python; paca is not needed:\n\n{code}")
    else:
        needs = "paca is not needed" if to == "lora" else "PEFT >= 0.22 needs no paca"
        put(f'Load it onto {adapter.base} with PeftModel.from_pretrained(model, "{output}"); {needs}.')
    if told := needs_system(adapter_in(path)):
        put(told)


def _bytes_of_weights(folder: Path) -> str:
    files = (folder / name for name in ADAPTER_WEIGHTS)
    return format_bytes(sum(file.stat().st_size for file in files if file.is_file()))


def _prompts_form(adapter: Path, base: Path) -> str:
    """Options of llama-cli for prompts in the adapter's form; none where the model's file has the same one."""
    template, own = adapter / "chat_template.jinja", base / "chat_template.jinja"
    if template.is_file():
        same = own.is_file() and own.read_bytes() == template.read_bytes()
        system = system_of_training(adapter)
        said = "" if system is None else f" --system-prompt {shlex.quote(system)}"
        return said if same else f" --jinja --chat-template-file {shlex.quote(str(template))}{said}"
    # Trained on texts as they stand: not in the form that the GGUF file has.
    return " -no-cnv" if (adapter / "tokenizer_config.json").is_file() else ""


def _say_quantization(kind: str | None) -> None:
    if kind is not None:
        put(
            f"It was made for weights quantized as {kind}, and is exact on those alone. On others, the 16-bit "
            "originals too, results differ a little; --to merged writes a model that is exact by itself."
        )
