"""Starts of LoRA that follow from the training data, or from random numbers: made once, kept in the run folder, and put
in from there, in the run that goes on as in the one that began.

CorDA, LoRA-GA and PiSSA by a randomized SVD take out of the weights what the adapter begins with, and PEFT saves the
adapter alone. So what a run leaves is a plain LoRA: see `paca.training.plain_lora`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import LoraConfig, PeftConfig, PeftModel, get_eva_state_dict, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainingArguments, set_seed
from transformers.pytorch_utils import Conv1D

from paca.data import Examples
from paca.messages.errors import PacaError, about
from paca.messages.say import say
from paca.pretrained.whole_output import whole_output
from paca.training.calibration import calibration_batches, place
from paca.training.config.adapter_settings import FROM_DATA, adapter_config
from paca.training.config.run_config import RunConfig
from paca.training.prompt_form import tokenizer_of

_NAME = "default"
_PASSES = 200
"""Of EVA over its batches, which goes on until its directions stay: on small data they may never."""


def check_directions(config: RunConfig, adapted: nn.Module) -> None:
    """Refuse an `r` for which EVA would look for more directions than a layer's input has, and other layers than its.

    Args:
        config: Of the run; with another start nothing is done.
        adapted: Its model, which may lack weights, with its adapter.

    Raises:
        PacaError: With the numbers.
    """
    if config.adapter.get("init_lora_weights") != "eva":
        return
    wanted = _directions(adapter_config(config.method, config.adapter))
    with about("lora.init_lora_weights: eva can't be made"):
        features = min(layer.in_features for _, layer in _layers(adapted))
        if wanted > features:
            raise PacaError(f"r × eva_config.rho is {wanted}, and a layer has {features} features. Lower one.")


@dataclass(frozen=True)
class LoraStart:
    """Puts an adapter with such a start into the model of a run.

    Args:
        config: The resolved run.
        examples: The training data, tokenized.
        arguments: Of the trainer that will train.
        file: Where the start is kept.
        console: Where it is told.
    """

    config: RunConfig
    examples: Examples
    arguments: TrainingArguments
    file: Path
    console: Console

    def adapted(self, model: nn.Module, asked: LoraConfig) -> PeftModel:
        """`model` with the adapter that `asked` describes, at its start.

        The first process makes it; the others read it.

        Raises:
            PacaError: It can't be made.
        """
        name = asked.init_lora_weights
        place(model, self.arguments)
        failed: list[str | None] = [None]
        if PartialState().is_main_process and not self.file.is_file():
            try:
                start = self._made(model, copy.deepcopy(asked))
                with whole_output(self.file) as beside:
                    save_file(start, beside)
            except (PacaError, ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
                failed = [f"lora.init_lora_weights: {name} can't be made: {error}"]
                if isinstance(error, torch.OutOfMemoryError):
                    raise
        broadcast_object_list(failed)
        if failed[0] is not None:
            raise PacaError(failed[0])
        start = load_file(self.file)
        adapted = self._with_adapter(model, _plain(asked))
        adapted.peft_config[_NAME].init_lora_weights = name  # which also says whether the model beneath is another one
        if name == "eva":
            initialize_lora_eva_weights(adapted, eva_state_dict=start)
            # Layers whose rank changed are new ones, in the type of the weights.
            adapted.base_model._cast_adapter_dtype(_NAME, self._autocast)
            return adapted
        with torch.no_grad():
            for key, layer in _layers(adapted):
                layer.lora_A[_NAME].weight.copy_(start[f"{key}.lora_A.weight"])
                layer.lora_B[_NAME].weight.copy_(start[f"{key}.lora_B.weight"])
                weight = layer.get_base_layer().weight
                weight.data = (weight.float() - layer.get_delta_weight(_NAME).float()).to(weight.dtype)
        return adapted

    @property
    def _autocast(self) -> bool:
        return bool(self.config.train["autocast_adapter_dtype"])

    def _with_adapter(self, model: Any, config: LoraConfig) -> Any:
        set_seed(self.arguments.seed)  # as TRL does before it makes an adapter
        return get_peft_model(model, config, autocast_adapter_dtype=self._autocast)

    def _made(self, model: Any, asked: LoraConfig) -> dict[str, Tensor]:
        """The start, by names of layers; `model` stays as it is."""
        name = asked.init_lora_weights
        batches = self._batches(asked) if name in FROM_DATA else []
        asked.modules_to_save = asked.trainable_token_indices = None
        found = self._with_adapter(model, _plain(asked))
        if name == "eva":
            state: dict[str, Tensor] = get_eva_state_dict(
                found, batches, forward_fn=_Passes(len(batches)), gather_distributed_inputs=False,
                show_progress_bar=False,
            )  # fmt: skip
            found.unload()
            return {key: tensor.contiguous() for key, tensor in state.items()}
        weights = {key: layer.get_base_layer().weight.data for key, layer in _layers(found)}
        asked.target_modules = found.peft_config[_NAME].target_modules  # with names in place of PEFT's choice
        found.unload()

        def forward() -> None:
            for batch in batches:
                for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                    model(input_ids=ids[mask.bool()][None].to(model.device))  # PEFT's hook takes one at a time

        def forward_and_backward() -> None:
            warnings.filterwarnings("ignore", "Full backward hook")  # PEFT counts backward passes by them
            for batch in batches:
                model(**{key: tensor.to(model.device) for key, tensor in batch.items()}).loss.backward()

        set_seed(self.arguments.seed)
        if name == "corda":
            preprocess_corda(model, asked, forward)
        elif name == "lora_ga":
            with warnings.catch_warnings():
                preprocess_loraga(model, asked, forward_and_backward)
        found = self._with_adapter(model, asked)
        start = {}
        for key, layer in _layers(found):
            for part in ("lora_A", "lora_B"):
                start[f"{key}.{part}.weight"] = getattr(layer, part)[_NAME].weight.data.contiguous()
            layer.get_base_layer().weight.data = weights[key]  # PEFT made new ones
        found.unload()
        return start

    def _batches(self, asked: LoraConfig) -> list[dict[str, Tensor]]:
        name, section = asked.init_lora_weights, self.config.calibration
        batches = calibration_batches(
            self.examples, tokenizer_of(self.config), self.arguments, section, with_labels=name != "corda"
        )
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        say(self.console, f"Starting LoRA by {name}, from {tokens:,} tokens of the training data ...")
        if name != "eva":
            return batches
        settings, needed = asked.eva_config, _directions(asked)
        assert settings is not None
        counting, left_out = ("labels", settings.label_mask_value) if settings.use_label_mask else ("attention_mask", 0)
        counted = [int((batch[counting] != left_out).sum()) for batch in batches]
        batches = [batch for batch, count in zip(batches, counted, strict=True) if count >= needed]
        if not batches:
            raise PacaError(
                f"each batch needs {needed} tokens that count (r × eva_config.rho), and they have {max(counted)} at "
                "most. Raise calibration.batch_size or max_length, or lower r or eva_config.rho."
            )
        return batches


class _Passes:
    """Runs a model, and not without end."""

    def __init__(self, batches: int) -> None:
        self.left = _PASSES * batches

    def __call__(self, model: nn.Module, inputs: dict[str, Tensor]) -> Any:
        if not self.left:
            raise PacaError(
                f"its directions did not settle in {_PASSES} passes over the batches. Raise calibration.sequences, or "
                "lower r, eva_config.rho or eva_config.tau."
            )
        self.left -= 1
        return model(**inputs)


def _directions(asked: PeftConfig | None) -> int:
    """How many EVA looks for in a layer's input."""
    assert isinstance(asked, LoraConfig)
    assert asked.eva_config is not None
    return round(max([asked.r, *(asked.rank_pattern or {}).values()]) * asked.eva_config.rho)


def _plain(asked: LoraConfig) -> LoraConfig:
    """The same adapter with LoRA's usual start."""
    plain = copy.deepcopy(asked)
    plain.init_lora_weights = True
    return plain


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            if not isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
                raise PacaError(
                    f"it is for linear layers, and {key} is {type(layer.get_base_layer()).__name__}. Name others with "
                    "lora.target_modules."
                )
            yield key, layer
