"""The model that a run starts from, and what the run's method puts into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import is_cuda_available, is_xpu_available
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from torch import nn
from transformers import TrainingArguments, set_seed

from paca.columns.factored import FactoredAdamW
from paca.data import Examples
from paca.lean import make_lean
from paca.messages.errors import PacaError
from paca.messages.say import say
from paca.pretrained import Pretrained, load_pretrained
from paca.pretrained.generation_settings import find_learned_cache, make_savable
from paca.pretrained.put_adapter import put_adapter_on
from paca.pretrained.trainable_copy import unpack
from paca.training.calibration import ColumnChoice
from paca.training.config.adapter_settings import adapter_config, is_made
from paca.training.config.run_config import RunConfig
from paca.training.context_tuning import train_on_context
from paca.training.folder.run_folder import RunFolder
from paca.training.frozen_statistics import freeze_statistics
from paca.training.lora_start import LoraStart
from paca.training.memory import forget_peak_resident_set
from paca.training.named_model import set_attention
from paca.training.prompt_form import tokenizer_of_adapter
from paca.training.sharding import spare_buffers
from paca.training.trainers import trainer_kind

_FIRST = "first"
"""What a model calls the adapter that its run began with, while it is measured."""


def load_model(config: RunConfig, folder: RunFolder, console: Console, labels: list[str] | None = None) -> Pretrained:
    """The model of a run, as it came, with its lean blocks.

    Args:
        config: The resolved run.
        folder: Where the weights of a GGUF file are unpacked.
        console: Where that is said.
        labels: Of a classifier, which may get a new head for them: the same one each time.

    Raises:
        PacaError: It can't be loaded.
    """
    pretrained = _read(config, folder, console, labels)
    if config.method == "full":  # it is saved itself, with what it says of generating
        make_savable(pretrained.model, config.model.name)
    set_attention(pretrained.model, config.model)
    if config.model.lean:  # before anything wraps the blocks: an adapter, checkpointing, DDP, FSDP
        make_lean(pretrained.model, config.model.recompute)
    return pretrained


def _read(config: RunConfig, folder: RunFolder, console: Console, labels: list[str] | None) -> Pretrained:
    model = config.model
    made: dict[str, Any] = {"auto_class": trainer_kind(config.train).auto_class, "labels": labels}
    tokenizer = tokenizer_of_adapter(model) or model.tokenizer
    set_seed(config.train["seed"])
    if not model.name.lower().endswith(".gguf"):
        return load_pretrained(
            model.name,
            model.dtype,
            model.revision,
            model.trust_remote_code,
            model.quantization,
            tokenizer,
            **made,
        )
    # An adapter has to name a base that stock tooling can load, so the unpacked model is kept beside it.
    if PartialState().is_main_process and not folder.base.is_dir():
        say(console, f"Unpacking the weights of {Path(model.name).name} ...")
        unpack(model.name, folder.base, model.dtype, model.tokenizer)
        forget_peak_resident_set()  # the next run of a comparison finds it unpacked
    PartialState().wait_for_everyone()
    if model.quantization is not None and config.adapter.get("original_weights") == model.name:
        config.adapter["original_weights"] = str(folder.base)
    made["tokenizer"] = tokenizer_of_adapter(model)  # `base/` has the one of the model
    return load_pretrained(str(folder.base), model.dtype, quantization=model.quantization, **made)


def with_adapter(
    model: nn.Module,
    config: RunConfig,
    arguments: TrainingArguments,
    examples: Examples,
    folder: RunFolder,
    console: Console,
) -> tuple[Any, PeftConfig | None]:
    """A model for a trainer of TRL, and the config of the adapter that the trainer is to put into it, or None.

    TRL makes adapters as PEFT does by default, with float32 parameters on 16-bit weights. Others are in the model
    already.

    Args:
        model: As it came.
        config: The resolved run.
        arguments: Of the trainer.
        examples: The training data, for columns that are chosen by it, and for starts of LoRA.
        folder: Of the run, where these are kept.
        console: Where progress is shown.

    Raises:
        PacaError: The settings don't fit each other.
    """
    spare_buffers(arguments, model)
    if config.model.adapter is not None:
        return with_first_adapter(model, config), None
    if config.method == "paca":
        adapter: PeftConfig | None = ColumnChoice(config, examples, arguments, folder.columns, console).adapter(model)
    else:
        adapter = adapter_config(config.method, config.adapter, trainer_kind(config.train).task_type)
    if adapter is not None:
        adapter.revision = config.model.revision
    if getattr(adapter, "init_lora_weights", None) == "loftq" and not (is_cuda_available() or is_xpu_available()):
        raise PacaError("lora.init_lora_weights: loftq is computed on a GPU by PEFT, and there is none. Leave it out.")
    if isinstance(adapter, LoraConfig) and is_made(config.adapter):
        return LoraStart(config, examples, arguments, folder.start, console).adapted(model, adapter), None
    if adapter is None or config.train["autocast_adapter_dtype"]:
        return model, adapter
    set_seed(arguments.seed)  # as TRL does before it makes an adapter
    try:
        return get_peft_model(model, adapter, autocast_adapter_dtype=False), None
    except ValueError as error:
        raise PacaError(f"The section {config.method} does not fit {config.model.name}: {error}") from error


def with_first_adapter(model: Any, config: RunConfig) -> PeftModel:
    """The model with the adapter that the run trains on from (`model.adapter`).

    Raises:
        PacaError: It does not fit the model, or its file is broken.
    """
    named, cast = config.model, config.train["autocast_adapter_dtype"]
    assert named.adapter is not None
    adapted = put_adapter_on(model, Path(named.adapter), model.name_or_path, cast=cast, trainable=True)
    ours = adapted.active_peft_config
    ours.base_model_name_or_path, ours.revision = model.name_or_path, named.revision
    return adapted


@contextmanager
def as_it_began(adapted: PeftModel, config: RunConfig) -> Iterator[None]:
    """A block in which a trained model is what its run began with: without its adapter, or with the one of before.

    Args:
        adapted: The model.
        config: The resolved run.
    """
    named = config.model
    if named.adapter is None:
        with adapted.disable_adapter():  # bit for bit the model as it came
            yield
        return
    base, cast = str(adapted.get_base_model().name_or_path), config.train["autocast_adapter_dtype"]
    put_adapter_on(adapted, Path(named.adapter), base, _FIRST, cast=cast)
    try:
        yield
    finally:
        adapted.set_adapter("default")
        adapted.delete_adapter(_FIRST)


def finish_trainer(trainer: Any, config: RunConfig) -> None:
    """What is left to do once a trainer has put the adapter into its model.

    Args:
        trainer: Without its optimizer, which it makes later.
        config: The resolved run.
    """
    keep_adapter_dtype(trainer.model, config)
    follow_trainer(trainer.model)
    find_learned_cache(trainer.model)
    measure_base_first(trainer)
    measure_last_batch(trainer)
    train_on_context(trainer)
    if config.method != "full":
        freeze_statistics(trainer.model)
    use_factors(trainer, config)


def keep_adapter_dtype(model: Any, config: RunConfig) -> None:
    """Let the adapter in the trainer's model keep the dtype that the config asks for.

    Args:
        model: Of the trainer; without an adapter nothing is done.
        config: The resolved run.
    """
    if not isinstance(model, PeftModel):
        return
    tuner: Any = model.base_model
    quantized, autocast = config.model.quantization is not None, config.train["autocast_adapter_dtype"]
    if quantized and autocast and config.method == "paca":
        # TRL casts what is trained on quantized weights to bfloat16, where small updates would be lost.
        tuner._cast_adapter_dtype("default")
        if config.model.adapter is not None:  # whose values were rounded on the way
            model.load_adapter(config.model.adapter, "default", is_trainable=True)
    elif quantized or not autocast:
        # PEFT would cast to float32 what it loads from a checkpoint.
        vars(model)["load_adapter"] = partial(model.load_adapter, autocast_adapter_dtype=False)


def use_factors(trainer: Any, config: RunConfig) -> None:
    """Let the trainer's optimizer step factors of the deltas, if the config asks for it.

    Args:
        trainer: Without its optimizer, which it makes later.
        config: The resolved run.
    """
    rank, arguments = config.train.get("factor_rank"), trainer.args
    if rank is not None:
        betas = (arguments.adam_beta1, arguments.adam_beta2)
        settings = {"lr": arguments.learning_rate, "rank": rank, "betas": betas, "eps": arguments.adam_epsilon}
        trainer.optimizer_cls_and_kwargs = (FactoredAdamW, {**settings, "seed": arguments.seed})


def follow_trainer(model: Any) -> None:
    """Let Adaption Prompt call the model's forward pass as the trainer has changed it, which gives TRL its loss.

    PEFT 0.21 keeps the one of before.

    Args:
        model: Of the trainer; with another method nothing is done.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_adaption_prompt:
        model.base_model.forward = model.get_base_model().forward


def measure_base_first(trainer: Any) -> None:
    """Let the trainer measure the model as it came, before its first step, where what is learned begins at random.

    Args:
        trainer: Of a model with learned tokens, keys or values; with others, which begin as their base, nothing is
            done.
    """
    model, evaluate = trainer.model, trainer.evaluate
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return

    def evaluate_base_first(*args: Any, **options: Any) -> Any:
        with nullcontext() if trainer.state.global_step else model.disable_adapter():
            return evaluate(*args, **options)

    trainer.evaluate = evaluate_base_first


def measure_last_batch(trainer: Any) -> None:
    """Let evaluations have all held-out examples: `dataloader_drop_last` is for batches that are trained on, and
    transformers leaves out the last held-out ones as well.

    Args:
        trainer: Whose data loaders are yet to be made.
    """
    arguments, make = trainer.args, trainer.get_eval_dataloader
    if not arguments.dataloader_drop_last:
        return

    def with_last_batch(*args: Any, **options: Any) -> Any:
        arguments.dataloader_drop_last = False
        try:
            return make(*args, **options)
        finally:
            arguments.dataloader_drop_last = True

    trainer.get_eval_dataloader = with_last_batch
