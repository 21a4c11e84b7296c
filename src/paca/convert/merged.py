"""Fold an adapter into its base model and write the result as a plain checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from transformers import AutoModelForCausalLM

from paca.convert.beforehand import merge_output
from paca.messages.errors import PacaError
from paca.pretrained.adapter_folder import adapter_settings, find_adapter
from paca.pretrained.generation import LoadedModel, load_saved, on_accelerator
from paca.pretrained.generation_settings import make_savable, sampling_settings
from paca.pretrained.image_shape import image_shape
from paca.pretrained.loading import DTYPES
from paca.pretrained.purpose import classifier_in
from paca.pretrained.quantizing import is_quantized
from paca.pretrained.tied_weights import untie_adapted
from paca.pretrained.whole_output import whole_output

# Largest difference of a logit, as a share of the largest logit, that rounding explains: the values pass through tens
# of layers, each of which rounds a few times (measured in tests/convert/test_merged.py on random models).
TOLERANCE_IN_EPS = 32
# In float32, where the share stays small however many there are. EfficientNet-Lite0 with LoRA was at 37.
TOLERANCE_IN_EPS_FLOAT32 = 256
PROBE_SHAPE = (2, 16)


@dataclass
class Merged:
    """What was written."""

    output: Path
    adapter: Path | None
    """None for a run that trained the whole model, which is written as it is."""
    base: str
    dtype: torch.dtype
    difference: float | None
    """Largest difference of a logit between the adapted model and the checkpoint as read back from the disk, as a
    share of the largest logit; None when it was not checked."""


def merge_to_folder(
    path: str | Path,
    output: str | Path,
    dtype: str | None = None,
    *,
    base_model: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> Merged:
    """Write the model with its adapter folded in, and its tokenizer, as a checkpoint that needs neither paca nor PEFT.

    The folder appears only when it is complete and checked.

    Args:
        path: A run folder or an adapter folder.
        output: The folder to write.
        dtype: "bfloat16", "float16" or "float32"; None keeps the base model's. The sum of weight and update is formed
            in float32 when another one than the base model's is asked for, and rounded once.
        base_model: Where the base model lies, if not where the adapter says.
        overwrite: Replace a model that `output` already holds.
        verify: Read the checkpoint back and compare its logits with the adapted model's.

    Raises:
        PacaError: An adapter or base model that cannot be loaded, an output that is in use, or a checkpoint whose
            logits differ by more than rounding explains.
    """
    if dtype is not None and dtype not in DTYPES:
        raise PacaError(f"Unknown dtype {dtype!r}. Give one of: {', '.join(DTYPES)}.")
    output = merge_output(path, output, base_model, overwrite)
    adapter = find_adapter(path)
    # Only PaCA's layers know how to give a quantized weight back its bits as they merge.
    foreign = adapter is not None and adapter_settings(adapter).get("peft_type") != "PACA"
    load = partial(load_saved, path, base_model=base_model, dequantize=foreign)
    loaded = load()
    wanted = DTYPES[dtype] if dtype is not None else loaded.model.dtype
    if wanted != loaded.model.dtype:
        del loaded
        loaded = load(dtype="float32")
    expected = _probe_logits(loaded.model) if verify else None
    if foreign and isinstance(loaded.model, PeftModel):
        untie_adapted(loaded.model)
    base = loaded.base
    with whole_output(output, _bytes_of(loaded.model, wanted), overwrite=overwrite) as unfinished:
        _write(loaded, wanted, unfinished)
        del loaded
        difference = None if expected is None else _difference_from(expected, unfinished)
    return Merged(output, adapter, base, wanted, difference)


def _bytes_of(model: torch.nn.Module, dtype: torch.dtype) -> int:
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def _write(loaded: LoadedModel, dtype: torch.dtype, folder: Path) -> None:
    merged = loaded.model
    if loaded.adapter is not None:
        if not hasattr(merged, "merge_and_unload"):
            raise PacaError(
                f"The adapter in {loaded.adapter} cannot be merged: its method adds to what the model reads, not to "
                "its weights. `paca chat` takes it as it is."
            )
        dequantize = {"dequantize": True} if is_quantized(merged.get_base_model()) else {}
        try:
            _put_in_place(merged)
            merged = merged.merge_and_unload(safe_merge=True, **dequantize)
        except Exception as error:  # what the methods of PEFT raise differs
            raise PacaError(f"The adapter in {loaded.adapter} cannot be merged: {error}") from error
        left = next((name for name, module in merged.named_modules() if isinstance(module, BaseTunerLayer)), None)
        if left is not None:  # of trained tokens beside LoRA in an output layer that is tied to the embedding
            raise PacaError(
                f"The adapter in {loaded.adapter} cannot be merged: PEFT leaves a part of it in {left}. `paca chat` "
                "takes it as it is."
            )
    # The token that ends an answer in the adapter's template may be none that ended a text of the base model.
    if getattr(merged, "generation_config", None) is not None:
        merged.generation_config.eos_token_id = sampling_settings(merged, loaded.tokenizer, 0).get("eos_token_id")
    make_savable(merged, loaded.base)
    merged.to(dtype=dtype).save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def _put_in_place(model: PeftModel) -> None:
    """Let the modules that were trained whole, such as a head, take the place of the base model's.

    Not every method of PEFT does so as it merges: LN_TUNING leaves them, others fail at one that has no weight itself,
    such as a pooler.
    """
    wrapped = [(name, module) for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    for name, module in wrapped:
        trained = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        model.set_submodule(name, trained)


def _probe_logits(model: Any) -> torch.Tensor:
    """Logits in float32 on the CPU, for token ids or images that are always the same.

    Those of a language model are `(2, 16, vocabulary)`, a classifier's `(2, labels)`.
    """
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        images = torch.randn(2, *image_shape(model.config), generator=generator)
        with torch.no_grad():
            return model(pixel_values=images.to(model.device, model.dtype)).logits.float().cpu()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, PROBE_SHAPE, generator=generator)
    with torch.no_grad():
        return model(input_ids=tokens.to(model.device)).logits.float().cpu()


def _difference_from(expected: torch.Tensor, folder: Path) -> float:
    """Of a logit of the checkpoint as read back, as a share of the largest; PacaError if rounding can't explain it."""
    classifier = classifier_in(folder)
    auto_class = AutoModelForCausalLM if classifier is None else getattr(transformers, classifier.auto_class)
    model = auto_class.from_pretrained(folder, dtype="auto", trust_remote_code=False, use_kernels=False).eval()
    found = _probe_logits(on_accelerator(model))
    if torch.equal(found, expected):  # all of them may be 0
        return 0.0
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    eps = TOLERANCE_IN_EPS_FLOAT32 if model.dtype == torch.float32 else TOLERANCE_IN_EPS
    tolerance = eps * torch.finfo(model.dtype).eps
    if not difference <= tolerance:  # written so that NaN fails too
        wider = "" if model.dtype == torch.float32 else " A wider --dtype rounds less."
        raise PacaError(
            f"The merged checkpoint does not answer as the adapted model does: logits differ by {difference:.2g} of "
            f"the largest, and rounding to {model.dtype} explains at most {tolerance:.2g}. Nothing was written.{wider}"
        )
    return difference
