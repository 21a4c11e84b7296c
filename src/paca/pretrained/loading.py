"""Load a model and its tokenizer (or image processor), trainable, whatever they are stored as."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from paca.messages.errors import PacaError
from paca.pretrained import gguf, quantizing
from paca.pretrained.adapter_folder import DTYPE_NAMES
from paca.pretrained.explaining import explaining
from paca.pretrained.hub import check_holds_no_adapter
from paca.pretrained.location import Location, Source, locate, tokenizer_files
from paca.pretrained.loss_in_pieces import answer_for_loss
from paca.pretrained.missing_weights import check_nothing_missing, made_anew
from paca.pretrained.output_head import multiply_once
from paca.pretrained.padding_token import choose_pad_token
from paca.pretrained.purpose import CLASSIFIERS
from paca.pretrained.quiet import without_load_report, without_progress_bars

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


@dataclass(frozen=True)
class Pretrained:
    """A model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: Any
    """A `PreTrainedTokenizerBase`; for images, their processor."""

    source: Source
    """Where it came from: `"hub"`, `"folder"` or `"gguf"`."""
    name_or_path: str
    """The hub id, or the absolute path of the folder or file."""


class Outline(NamedTuple):
    """A model without weights."""

    config: PreTrainedConfig
    model: PreTrainedModel
    """On the meta device: every parameter has its name, shape and dtype, and no storage."""


def load_pretrained(
    name: str,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    auto_class: Any = AutoModelForCausalLM,
    labels: Sequence[str] | None = None,
) -> Pretrained:
    """Load a model and its tokenizer, ready to be trained.

    Args:
        name: A hub id, a local folder with a `config.json`, or a `.gguf` file. A GGUF file is dequantized.
        dtype: `"bfloat16"`, `"float16"`, `"float32"`, or `"auto"`: what the checkpoint was saved in
            (float32 for a quantized GGUF file, which has no such dtype).
        revision: Branch, tag or commit, for a hub id only.
        trust_remote_code: Run the model code that the checkpoint brings along.
        quantization: Quantize the linear layers as they are loaded, by bitsandbytes: `"nf4"`, `"fp4"` or
            `"int8"`. The rest keeps `dtype`, and nothing is cast to float32.
        tokenizer: In place of the model's own: as `name`, any folder that holds one, or a loaded one.
        auto_class: The `AutoModel...` of transformers that makes the model.
        labels: For a classifier, what its outputs stand for. A checkpoint without a head for as many gets a new one.

    The tokenizer always has a padding token afterwards; one that had to be chosen is logged. transformers' kernels from
    the hub stay off: with them results would depend on what can be fetched, and `make_lean` replaces them.

    Raises:
        PacaError: The name stands for no model, the checkpoint cannot be read or lacks weights, or the hub cannot be
            reached.
    """
    location, options = _open(name, revision, trust_remote_code)
    check_holds_no_adapter(location, revision)
    torch_dtype = _torch_dtype(dtype)
    named = tokenizer if isinstance(tokenizer, str) else None
    if tokenizer is None and auto_class is AutoModelForImageClassification:
        tokenizer = _image_processor_at(location, options)
    elif tokenizer is None:
        tokenizer = _tokenizer_at(location, options)
    elif isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
    if location.source == "gguf":
        if quantization is not None:
            raise PacaError(
                f"A GGUF file can't be quantized to {quantization} as it is read. Save it as a plain folder first "
                "(save_trainable_copy), and load that."
            )
        # Otherwise the model counts as quantized, and can be neither saved nor trained.
        options["quantization_config"] = GgufConfig(dequantize=True)
    elif quantization is not None:
        with explaining(location, revision):
            config = AutoConfig.from_pretrained(**options)
        quantizing.check_not_quantized(config, f" {location.name_or_path!r}", quantization)
        compute = torch_dtype if isinstance(torch_dtype, torch.dtype) else getattr(config, "dtype", None)
        options["quantization_config"] = quantizing.quantization_config(quantization, compute or torch.float32)
        options["device_map"] = quantizing.device_map()
    elif torch.accelerator.is_available():
        with explaining(location, revision):
            if quantizing.method_of(AutoConfig.from_pretrained(**options)) is not None:
                options["device_map"] = quantizing.device_map()  # else GPTQ's kernels are chosen for a CPU
    quietly = nullcontext() if labels is None else without_load_report()
    reading = gguf.reading() if location.source == "gguf" else nullcontext()
    with explaining(location, revision), without_progress_bars(), reading, quietly:
        if labels is not None:
            config = AutoConfig.from_pretrained(**options, **_label_settings(labels))
            options |= {"config": config, "ignore_mismatched_sizes": True}
        model, found = auto_class.from_pretrained(
            dtype=torch_dtype, output_loading_info=True, use_kernels=False, **options
        )
    if auto_class is AutoModelForCausalLM:
        check_nothing_missing(model, found["missing_keys"], location.name_or_path)
        multiply_once(model)
        answer_for_loss(model)
    elif labels is not None:
        made_anew(model, found, location.name_or_path)
    quantizing.keep_trainable(model)
    if quantization is not None:
        quantizing.unmap(model)
    if location.source == "gguf":
        gguf.check_is_plain(model, location.name_or_path)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return Pretrained(model, tokenizer, location.source, location.name_or_path)
    embeddings = sys.maxsize  # CANINE's are of characters, whatever their number
    with suppress(NotImplementedError):
        embeddings = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if named is not None and len(tokenizer) > embeddings:
        raise PacaError(
            f"The tokenizer of {named!r} has {len(tokenizer)} tokens, but the model {location.name_or_path!r} embeds "
            f"{embeddings}. Give the tokenizer that belongs to this model."
        )
    choose_pad_token(tokenizer, embeddings)
    if getattr(model.config.get_text_config(), "pad_token_id", None) is None:  # RWKV's has no such field
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return Pretrained(model, tokenizer, location.source, location.name_or_path)


def load_image_processor(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load a vision model's image processor alone (arguments and errors as of `load_pretrained`)."""
    return _image_processor_at(*_open(name, revision, trust_remote_code))


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer alone, of a model or from any folder that holds one (arguments as in `load_pretrained`)."""
    here = bool(name.strip()) and tokenizer_files(Path(name).expanduser()) != []
    location, options = _open(name, revision, trust_remote_code, any_folder=here)
    tokenizer = _tokenizer_at(location, options)
    choose_pad_token(tokenizer)
    return tokenizer


def load_config(
    name: str,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    auto_class: Any = AutoModelForCausalLM,
    labels: Sequence[str] | None = None,
) -> Outline:
    """What a model looks like without its weights (arguments and errors as in `load_pretrained`).

    `auto_class` is the `AutoModel...` of transformers that makes it. With `dtype="auto"` its dtype is the one that the
    configuration names, else float32.
    `labels` are those of a classifier, which gets an output for each.
    """
    location, options = _open(name, revision, trust_remote_code)
    torch_dtype = _torch_dtype(dtype)
    with explaining(location, revision), without_progress_bars():
        if location.source == "gguf":
            options = gguf.outline_options(location.name_or_path)
        config = AutoConfig.from_pretrained(**options, **({} if labels is None else _label_settings(labels)))
        if torch_dtype == "auto":
            torch_dtype = getattr(config, "dtype", None) or torch.float32
        with torch.device("meta"):
            model = auto_class.from_config(config, dtype=torch_dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return Outline(config, model)


def check_folder_is_whole(name: str, trust_remote_code: bool = False) -> None:
    """Raise `PacaError` where a language model's folder lacks weights; nothing is read but names in safetensors."""
    location, options = _open(name, None, trust_remote_code)
    if location.source != "folder" or not any(Path(location.name_or_path).glob("*.safetensors")):
        return
    with explaining(location, None), without_progress_bars(), without_load_report():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            device_map="meta", output_loading_info=True, use_kernels=False, **options
        )
    check_nothing_missing(loaded[0], loaded[1]["missing_keys"], location.name_or_path)


def labels_of(name: str, revision: str | None = None, trust_remote_code: bool = False) -> list[str] | None:
    """What the outputs of a classifier stand for, by its checkpoint's configuration; None of another kind of model.

    Raises:
        PacaError: As `load_pretrained`.
    """
    location, options = _open(name, revision, trust_remote_code)
    if location.source == "gguf":
        return None
    with explaining(location, revision), without_progress_bars():
        config = AutoConfig.from_pretrained(**options)
    if not any(str(kind).endswith(CLASSIFIERS) for kind in config.architectures or ()):
        return None
    return [str(config.id2label[number]) for number in sorted(config.id2label)]


def modules_made_anew(
    name: str, revision: str | None, trust_remote_code: bool, auto_class: Any, labels: Sequence[str], *, fetch: bool
) -> list[str]:
    """The modules that a classifier's checkpoint need not have, beside its head, and has not: `made_anew`.

    Nothing is read but names in files of weights; those of a hub id only with `fetch`, or where they are fetched.
    The other arguments are those of `load_pretrained`.

    Raises:
        PacaError: The checkpoint can't be read, or lacks other weights.
    """
    location, options = _open(name, revision, trust_remote_code)
    if location.source == "gguf":
        return []
    of_hub = location.source == "hub"
    with explaining(location, revision), without_progress_bars(), without_load_report():
        config = AutoConfig.from_pretrained(**options, **_label_settings(labels))
        if getattr(config, "quantization_config", None) is not None:  # not made on meta; `load_pretrained` looks
            return []
        options |= {"config": config, "ignore_mismatched_sizes": True, "local_files_only": of_hub and not fetch}
        try:
            model, found = auto_class.from_pretrained(
                device_map="meta", output_loading_info=True, use_kernels=False, **options
            )
        except OSError:  # its weights are not here
            if not fetch:
                return []
            raise
    return made_anew(model, found, location.name_or_path)


def _label_settings(labels: Sequence[str]) -> dict[str, Any]:
    numbers = {label: number for number, label in enumerate(labels)}
    # Most configurations count the names themselves, and have no list of them; timm's keeps its own unless it is told.
    told = {"num_labels": len(labels), "label_names": [*labels]}
    return {"id2label": dict(enumerate(labels)), "label2id": numbers, **told}


def _open(
    name: str, revision: str | None, trust_remote_code: bool, any_folder: bool = False
) -> tuple[Location, dict[str, Any]]:
    """Where `name` lies, and the arguments by which `from_pretrained` reads it; `any_folder` need be no model."""
    location = Location("folder", str(Path(name).expanduser().resolve())) if any_folder else locate(name)
    if revision is not None and location.source != "hub":
        raise PacaError(f"A revision ({revision!r}) goes with a hub id only, but {name!r} is local. Leave it out.")
    if location.source == "gguf":
        return location, gguf.file_options(location.name_or_path)
    options = {"pretrained_model_name_or_path": location.name_or_path, "trust_remote_code": trust_remote_code}
    return location, options if revision is None else options | {"revision": revision}


def _torch_dtype(dtype: str) -> torch.dtype | str:
    if dtype != "auto" and dtype not in DTYPES:
        raise PacaError(f"Unknown dtype {dtype!r}. Give one of: auto, {', '.join(DTYPES)}.")
    return DTYPES.get(dtype, dtype)


def _tokenizer_at(location: Location, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    with explaining(location, options.get("revision"), what="tokenizer"), without_progress_bars():
        if location.source == "gguf":
            options = gguf.outline_options(location.name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(**options)
    if "gguf_file" in options:
        gguf.restore_pre_tokenizer(tokenizer, location.name_or_path)
    return tokenizer


def _image_processor_at(location: Location, options: dict[str, Any]) -> Any:
    what = "image processor"  # timm's is said to lack one of two ways to work, which nobody misses
    with explaining(location, options.get("revision"), what=what), without_progress_bars(), without_load_report():
        return AutoImageProcessor.from_pretrained(**options)
