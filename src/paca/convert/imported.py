"""Make a PaCA adapter of what other tools wrote."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from paca.config import PacaConfig
from paca.convert.adapter import Adapter, base_outline, explaining, put_on
from paca.convert.beforehand import adapter_output, import_source
from paca.convert.files_beside import files_beside
from paca.convert.foreign import COLUMNS, ForeignAdapter, read_authors, read_one_hot_lora
from paca.convert.lora import LORA_A
from paca.convert.target_names import exact_targets
from paca.convert.tensor_files import FILE_PREFIX, column_tensors, read_tensors, recorded_quantization, write_adapter
from paca.messages.errors import PacaError
from paca.messages.shown import printable
from paca.pretrained import load_pretrained
from paca.pretrained.adapter_folder import ADAPTER_CONFIG, adapter_settings, find_revision, text_setting, weight_file
from paca.pretrained.location import locate
from paca.pretrained.purpose import classifier_in
from paca.pretrained.tied_weights import untie_for
from paca.pretrained.whole_output import whole_output
from paca.tuner.adapter_checks import DELTA
from paca.tuner.rotation.union_config import UnionLayer, union_settings
from paca.tuner.strange_expressions import try_expressions


class Imported(NamedTuple):
    """What was read and written."""

    output: Path
    adapter: Adapter
    kind: str
    """What the checkpoint was, in words."""
    largest_move: float | None
    """How far the columns of a layer moved at most, as a share of their size; a value near 1 or above tells of another
    base model than the adapter's. None where the pretrained columns were not looked at."""


def import_adapter(
    path: str | Path, output: str | Path, *, base_model: str | None = None, overwrite: bool = False
) -> Imported:
    """Write a checkpoint of the original authors' PaCA, or a LoRA adapter with a one-hot A, as a PaCA adapter.

    The folder appears only when it is complete, and checked against the base model.

    Args:
        path: The adapter's folder, or the file with its tensors (its `adapter_config.json` beside it).
        output: The folder to write.
        base_model: Hub id, folder or .gguf file of the base model; None: the one that the config names. For the
            authors' checkpoints its weights are loaded, for LoRA only its config.
        overwrite: Replace an adapter that `output` already holds.

    Raises:
        PacaError: Neither of the two kinds, a broken or incomplete one, one that does not fit the base model, or an
            output that is in use.
    """
    folder, given = import_source(path), Path(path).expanduser()
    output = adapter_output(folder, output, base_model, overwrite, "import")
    file = given if given.is_file() else weight_file(folder)
    settings, tensors = adapter_settings(folder), read_tensors(file)
    base = base_model if base_model is not None else text_setting(folder, "base_model_name_or_path")
    if not base:
        raise PacaError(f"{folder / ADAPTER_CONFIG} does not name the base model. Give it: --base NAME_OR_FOLDER")
    revision = find_revision(folder, base)
    if base_model is not None:
        settings["revision"] = revision
    base = locate(base).name_or_path  # a folder by its whole path, as it is to be found from anywhere
    with explaining(folder):
        foreign, model = _read(folder, settings, tensors, base, revision)
        adapter = _check(foreign, settings, base, model, recorded_quantization(file))
    with whole_output(output, overwrite=overwrite) as partial:
        write_adapter(partial, adapter.config.to_dict(), adapter.saved_whole | column_tensors(adapter.layers))
        for beside in files_beside(folder):
            shutil.copyfile(beside, partial / beside.name)
    return Imported(output, adapter, foreign.kind, foreign.largest_move)


def _read(
    folder: Path, settings: dict[str, Any], tensors: dict[str, Tensor], base: str, revision: str | None
) -> tuple[ForeignAdapter, nn.Module]:
    """The adapter, and its base model: with weights where they were needed."""
    endings = {name.rpartition(".")[2] for name in tensors}
    task_type = text_setting(folder, "task_type")
    if COLUMNS in endings:
        if task_type not in (None, "CAUSAL_LM"):
            raise PacaError(
                f"The checkpoint is for the task {task_type!r}; only causal language models can be imported."
            )
        model = load_pretrained(base, revision=revision).model
        return read_authors(settings, tensors, model), model
    if DELTA in endings:
        raise PacaError(f"{folder} holds a PaCA adapter already: PEFT and paca load it as it is.")
    if settings.get("peft_type") == "LORA" and any(name.endswith(f".{LORA_A}") for name in tensors):
        outline = base_outline(base, task_type, revision, classifier_in(folder)).model
        untie_for(outline, (name.replace(".lora_", ".paca_") for name in tensors))
        try_expressions(settings, outline, folder / ADAPTER_CONFIG)
        return read_one_hot_lora(settings, tensors), outline
    raise PacaError(
        f"{folder} holds a {printable(str(settings.get('peft_type')), longest=99)} adapter with tensors such as "
        f"{min(tensors, default='(none)')}. "
        f"What can be imported: checkpoints of the original authors' PaCA (tensors ...{COLUMNS}), and LoRA adapters "
        "that `paca export --to lora` wrote."
    )


def _check(
    foreign: ForeignAdapter, settings: dict[str, Any], base: str, model: nn.Module, quantization: str | None
) -> Adapter:
    """The adapter as ours, tried on the base model."""
    modules_to_save = settings.get("modules_to_save") or []
    if not isinstance(modules_to_save, list) or not all(isinstance(name, str) for name in modules_to_save):
        raise PacaError(f"modules_to_save of the checkpoint's config must be a list of names; got {modules_to_save!r}.")
    frozen = {f"{FILE_PREFIX}{name}.base_layer.weight" for name in foreign.layers}  # PEFT saves those of embeddings
    foreign = foreign._replace(others={n: tensor for n, tensor in foreign.others.items() if n not in frozen})
    for name in foreign.others:
        if not any(f".{module}." in f".{name}" for module in modules_to_save):
            raise PacaError(
                f"The checkpoint holds {name}, which is neither an adapted layer nor one of modules_to_save: it can't "
                "be imported."
            )
    sizes = {name: UnionLayer(layer.indices.numel(), layer.scale) for name, layer in foreign.layers.items()}
    config = PacaConfig(
        **union_settings(sizes),
        target_modules=exact_targets(foreign.layers, {name for name, _ in model.named_modules()}),
        modules_to_save=modules_to_save or None,
        base_model_name_or_path=base,
        task_type=settings.get("task_type"),
        auto_mapping=settings.get("auto_mapping"),
        revision=settings.get("revision"),
        inference_mode=True,
        base_quantization=quantization,
    )
    try:
        return put_on(model, config, foreign.others | column_tensors(foreign.layers))
    except ValueError as error:
        raise PacaError(f"The adapter does not fit the model {base}: {error}") from error
