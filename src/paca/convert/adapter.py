"""A PaCA adapter outside of its model: what every conversion starts from, and what an import ends in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from peft import PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from paca.config import PacaConfig
from paca.convert.beforehand import adapter_in
from paca.convert.tensor_files import FILE_PREFIX, read_tensors
from paca.layers import PacaLayer
from paca.layers.overlaid import OverlaidLinear
from paca.messages.errors import PacaError
from paca.messages.program import program
from paca.messages.shown import printable
from paca.pretrained import Outline, load_config
from paca.pretrained.adapter_folder import (
    ADAPTER_CONFIG,
    adapter_settings,
    find_base,
    find_revision,
    weight_file,
)
from paca.pretrained.base_weights import warn_of_other_base
from paca.pretrained.location import locate
from paca.pretrained.purpose import Classifier, classifier_in
from paca.pretrained.tied_weights import untie_for
from paca.tuner.adapter_checks import DELTA, INDICES, check_finite
from paca.tuner.model import PacaModel
from paca.tuner.strange_expressions import try_expressions
from paca.tuner.trained_tokens import TOKENS

NAME = "default"  # of the adapter, where one is put into an outline

_AUTO_CLASSES = {  # of transformers, by the task of PEFT
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}


class AdaptedLayer(NamedTuple):
    """One layer's columns: its weight is `W0[:, indices] + scale * delta` there."""

    delta: Tensor  # (out_features, r)
    indices: Tensor  # (r,) int64, ascending
    scale: float
    in_features: int
    stock_class: type[nn.Module]

    @property
    def r(self) -> int:
        """How many columns it has."""
        return self.indices.numel()

    def scaled_delta(self, name: str) -> Tensor:
        """`scale * delta`, formed in float64 and rounded once to float32.

        Raises:
            PacaError: A value is not finite; `name`, of the layer, is in the message.
        """
        scaled = (self.delta.double() * self.scale).float()
        if not bool(scaled.isfinite().all()):
            raise PacaError(f"{name}: the delta holds NaN or Inf, or overflows float32. The adapter is broken.")
        return scaled


@dataclass
class Adapter:
    """A checked adapter, with what its base model's config tells about the layers."""

    config: PacaConfig
    layers: dict[str, AdaptedLayer]
    """By the module's name in the base model."""
    saved_whole: dict[str, Tensor]
    """The other tensors of the adapter's file, by their names there: modules_to_save, resized embeddings."""
    module_names: set[str]
    """Names of all modules of the base model."""
    base_config: PreTrainedConfig | None
    """The base model's; None if it is not of transformers."""
    classifier: Classifier | None = None
    """What the config beside a classifier's adapter says of its outputs."""
    untied: bool = False
    """Whether it has columns in one of two embeddings that are one weight in the base model's files."""

    @property
    def base(self) -> str:
        """Name or path of the base model."""
        return str(self.config.base_model_name_or_path)

    @property
    def ranks(self) -> list[int]:
        """Those that occur, ascending."""
        return sorted({layer.r for layer in self.layers.values()})

    @property
    def quantization(self) -> str | None:
        """How the weights were quantized that it was made for; None if they were not, or nobody recorded it."""
        kind = self.config.base_quantization
        return None if kind == "none" else kind

    def common_settings(self) -> dict[str, Any]:
        """The settings that an adapter of any method takes over."""
        names = ("modules_to_save", "trainable_token_indices", "task_type", "auto_mapping", "base_model_name_or_path")
        return {name: getattr(self.config, name) for name in (*names, "revision")} | {"inference_mode": True}


def adapter_in_model(model: Any, adapter_name: str = "default") -> Adapter:
    """An adapter of a `PeftModel` as it is now, changed scales included; ValueError if it has no such PaCA adapter."""
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, PacaModel):
        raise ValueError(f"A PeftModel with a PaCA adapter is needed, not a {type(model).__name__}.")
    if adapter_name not in model.peft_config:
        raise ValueError(f"The model has no adapter {adapter_name!r}; it has: {', '.join(model.peft_config)}.")
    config: Any = model.peft_config[adapter_name]
    return _collect(model, adapter_name, config, get_peft_model_state_dict(model, adapter_name=adapter_name))


def read_adapter(path: str | Path, base_model: str | None = None) -> Adapter:
    """Read and check an adapter on the disk. Of the base model its config is read, and no weights but for
    `warn_of_other_base`.

    Args:
        path: A run folder or an adapter folder.
        base_model: Where the base model lies, if not where the adapter says; the config then names this one.

    Raises:
        PacaError: No adapter, not one of PaCA's, a broken file, or one that does not fit the base model.
    """
    folder = adapter_in(path)
    with explaining(folder):
        return _read(folder, find_base(folder, base_model))


@contextmanager
def explaining(folder: Path) -> Iterator[None]:
    """Turn whatever fails while an adapter is read into an error that names its folder."""
    try:
        yield
    except PacaError:
        raise
    except Exception as error:
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise PacaError(f"The adapter in {folder} cannot be read: {reason}") from error


def _read(folder: Path, base: str) -> Adapter:
    tensors = read_tensors(weight_file(folder))
    kind = adapter_settings(folder).get("peft_type")
    if kind != "PACA":
        tuners: dict[Any, Any] = PEFT_TYPE_TO_TUNER_MAPPING  # those of prompts have nothing to fold in
        folds = hasattr(tuners.get(str(kind)), "merge_and_unload")
        merging = f" Folded into its model every tool loads it: {program()} merge {folder} --output MODEL" * folds
        raise PacaError(
            f"{folder} holds an adapter of {printable(str(kind), longest=99)}, which PEFT loads as it is; only PaCA's "
            f"are exported.{merging}"
        )
    if any(name.endswith(".paca_w") for name in tensors):
        raise PacaError(
            f"{folder} is a checkpoint of the original authors' PaCA. First: {program()} import {folder} ..."
        )
    config = PacaConfig.from_pretrained(str(folder))
    if base != config.base_model_name_or_path:
        base = locate(base).name_or_path  # a folder by its whole path, as it is to be found from anywhere
        config.base_model_name_or_path, config.revision = base, None
    classifier = classifier_in(folder)
    outline = base_outline(base, config.task_type, find_revision(folder, base), classifier)
    untied = untie_for(outline.model, tensors)
    if config.unusual:
        try_expressions(vars(config), outline.model, folder / ADAPTER_CONFIG)
    try:
        adapter = put_on(outline.model, config, tensors)
    except ValueError as error:
        raise PacaError(f"The adapter in {folder} does not fit the model {base}: {error}") from error
    adapter.classifier, adapter.untied = classifier, untied
    warn_of_other_base(folder, base)
    return adapter


def put_on(base_model: nn.Module, config: PacaConfig, tensors: dict[str, Tensor]) -> Adapter:
    """Check an adapter's tensors, by the names they have in its file, against a base model (which may be on meta).

    Raises:
        ValueError: As loading the adapter into the model would; the tensor or layer is named.
    """
    # Only the adapted layers matter: a new head need not have the shape that the outline guesses.
    whole, left_out = config.modules_to_save or [], config.exclude_modules or []
    if isinstance(left_out, str):
        left_out = rf"{left_out}|(.*\.)?({'|'.join(whole)})(\..*)?" if whole else left_out
    else:  # a module that is saved whole may have others in it
        names = [name for name, _ in base_model.named_modules()]
        left_out = {*left_out, *whole, *(name for name in names for one in whole if f".{one}." in f".{name}")}
    # Of weights on the meta device none can be chosen by its norm; the file says which columns they are.
    layers_only = dataclasses.replace(
        config,
        modules_to_save=None,
        trainable_token_indices=None,
        exclude_modules=left_out or None,
        selection="random",
    )
    model = PeftModel(base_model, layers_only, adapter_name=NAME)
    of_whole = {n: t for n, t in tensors.items() if any(f".{m}." in f".{n}" for m in whole)}
    if config.trainable_token_indices:
        of_whole |= {name: tensor for name, tensor in tensors.items() if name.endswith(f".{TOKENS}")}
    for name, tensor in of_whole.items():
        check_finite(name, tensor)
    others = {name: tensor for name, tensor in tensors.items() if name not in of_whole}
    named = of_whole | PacaModel._remap_adapter_state_dict_for_load(model, layers_only, NAME, others)
    return _collect(model, NAME, config, {name.removesuffix(f".{NAME}"): tensor for name, tensor in named.items()})


def _collect(model: PeftModel, adapter_name: str, config: PacaConfig, tensors: dict[str, Tensor]) -> Adapter:
    base_model: Any = model.base_model.model
    layers: dict[str, AdaptedLayer] = {}
    saved_whole = dict(tensors)
    wrappers: list[str] = []
    for name, module in base_model.named_modules():
        if isinstance(module, (PacaLayer, AuxiliaryTrainingWrapper)):
            wrappers.append(f"{name}.")
        if isinstance(module, PacaLayer) and adapter_name in module.paca_delta:
            layers[name] = AdaptedLayer(
                saved_whole.pop(f"{FILE_PREFIX}{name}.{DELTA}").detach().cpu(),
                saved_whole.pop(f"{FILE_PREFIX}{name}.{INDICES}").cpu(),
                module.scaling[adapter_name],
                module.in_features,
                stock_class(module),
            )
    names = {name for name, _ in base_model.named_modules() if not name.startswith(tuple(wrappers))}
    base_config = getattr(base_model, "config", None)
    return Adapter(
        config,
        layers,
        {name: tensor.detach().cpu().clone() for name, tensor in saved_whole.items()},  # tied ones share memory
        names - {""},
        base_config if isinstance(base_config, PreTrainedConfig) else None,
    )


def stock_class(layer: PacaLayer) -> type[nn.Module]:
    """The class of the module that `layer` adapts; of a quantized one, the class that it stands for."""
    stock: type[nn.Module] = getattr(layer.base_layer, "stock_class", type(layer.base_layer))
    if isinstance(layer, OverlaidLinear) and stock is not Conv1D:
        return nn.Linear  # which it stands for, whatever class its library quantizes it to
    return stock


def base_outline(
    base: str, task_type: str | None, revision: str | None, classifier: Classifier | None = None
) -> Outline:
    """The base model of an adapter for `task_type`, without weights; PacaError for an unknown task. PEFT has none for
    images: their `classifier`, from `classifier_in`, says it."""
    of_images = classifier is not None and classifier.of == "images"
    auto_class = classifier.auto_class if of_images else _AUTO_CLASSES.get(task_type or "CAUSAL_LM")  # type: ignore[union-attr]
    if auto_class is None:
        raise PacaError(
            f"The adapter is for the task {task_type!r}; known are {', '.join(_AUTO_CLASSES)}. Convert it from Python, "
            "with its model in memory: paca.convert.lora.save_as_lora."
        )
    return load_config(base, revision=revision, auto_class=getattr(transformers, auto_class))
