"""What fails once a run is on its way, and what the user can change."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError

from paca.messages.disk import DiskError, disk_error
from paca.messages.errors import PacaError, first_line, within_peft
from paca.messages.program import program, resume_command
from paca.pretrained.out_of_memory import is_out_of_memory
from paca.training.config.adapter_settings import method_name
from paca.training.config.run_config import RunConfig
from paca.training.folder.run_folder import RunFolder


def remedies(config: RunConfig) -> str:
    """What makes this run smaller, cheapest in time first, leaving out what it does already."""
    train, model = config.train, config.model
    tries = []
    if not model.lean:
        tries.append("model.lean=true (blocks that keep less)")
    tries.append(
        f"a smaller train.per_device_train_batch_size (now {train['per_device_train_batch_size']}, with more "
        "train.gradient_accumulation_steps)"
    )
    if model.recompute is None:
        tries.append("model.recompute=mlp (with model.lean=true)")
    if not (train.get("gradient_checkpointing") or train.get("activation_checkpointing")):
        tries.append("train.gradient_checkpointing=true")
    for name in ("max_length", "max_completion_length"):
        if name in train:
            tries.append(f"a smaller train.{name} (now {train[name]})")
    if model.dtype != "bfloat16":
        tries.append("model.dtype=bfloat16")
    return f"In this order, try: {', '.join(tries)}. `paca plan` finds settings that fit."


@contextmanager
def explained(config: RunConfig) -> Iterator[None]:
    """Turn a lack of memory, of an optional package, or of a form of a method for quantized weights or for a model's
    layers, into messages for the user: `PacaError`."""
    try:
        yield
    except PacaError:
        raise
    except SafetensorError as error:
        if disk_error(error) is not None:
            raise
        raise PacaError(
            f"A weights file of the run can't be read: {error}. Remove that checkpoint and resume."
        ) from error
    except ImportError as error:  # of a tracker, an optimizer, a kernel that the settings name
        raise PacaError(f"A setting needs a package that is not installed: {error}") from error
    except (RuntimeError, MemoryError, TypeError, AttributeError) as error:
        if is_out_of_memory(error):
            raise PacaError(f"Memory ran out. {remedies(config)}") from error
        if isinstance(error, AttributeError) and isinstance(error.obj, BaseTunerLayer):
            raise PacaError(
                f"PEFT's {method_name(config.method, config.adapter)} does not fit {config.model.name}, whose own code "
                f"reads {error.name!r} of a layer that it stands for and has no such thing. Name other layers "
                f"({config.method}.target_modules), or train paca."
            ) from error
        kind = config.model.quantization
        if kind is None or config.method not in ("lora", "peft") or not within_peft(error):
            raise
        method = method_name(config.method, config.adapter)
        raise PacaError(
            f"PEFT's {method} failed on {kind} weights: {first_line(error).rstrip('.')}. Many of its methods have no "
            "form for them. Autocast (train.bf16=true) helps some; else leave out model.quantization, or train paca or "
            "plain lora. PACA_DEBUG=1 shows where it failed."
        ) from error


@contextmanager
def told_how_to_go_on(folder: RunFolder) -> Iterator[None]:
    """A block that writes into a run folder: what can't be written becomes one message, with what is left to resume.

    Raises:
        DiskError: A file could not be written.
    """
    try:
        yield
    except Exception as error:
        told = error if isinstance(error, DiskError) else None
        if not isinstance(error, PacaError):
            told = disk_error(error, _fullest(folder))
        if told is None:
            raise
        if folder.is_gone():
            raise DiskError(
                f"{told} Its checkpoints went with it. If it was moved to NEW, go on from there: {program()} train "
                "NEW/config.yaml --resume --set output.dir=NEW"
            ) from error
        newest = folder.newest_checkpoint()
        if newest is None:
            raise DiskError(f"{told} No checkpoint had been saved.") from error
        command = resume_command(folder.config)
        raise DiskError(f"{told} When that is mended, go on from {newest.name}: {command}") from error


def _fullest(folder: RunFolder) -> Path:
    """Of the folders that a run writes to, the one with the least room: most likely what a nameless error is about."""
    places = [folder.path, Path(datasets.config.HF_DATASETS_CACHE), Path(tempfile.gettempdir())]
    there = [place for place in places if place.is_dir()]
    return min(there, key=lambda place: shutil.disk_usage(place).free, default=folder.path)
