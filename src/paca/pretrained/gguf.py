"""What transformers leaves undone when it reads a GGUF file: a trainable model, and the right pre-tokenizer."""

from __future__ import annotations

import functools
import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import transformers
import xxhash
from huggingface_hub import constants
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)

from paca.messages.errors import PacaError, first_line
from paca.messages.install import how_to_install

logger = logging.getLogger(__name__)

# Names of pre-tokenizers in llama.cpp (`tokenizer.ggml.pre`). The first group splits off every digit before the
# pattern of GPT-2 applies; transformers 5.24 knows none of them and keeps the pattern of GPT-2 alone.
_DIGITS_THEN_GPT2 = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4")
VERSION = 1  # of what is kept of a file; a change of these rules makes a new one


def require_gguf(job: str = "Reading") -> Any:
    """The package `gguf`; PacaError without it, which says for what `job` it is needed."""
    try:
        import gguf
    except ImportError as error:
        raise PacaError(f"{job} a GGUF file needs the package gguf. {how_to_install('gguf')}") from error
    return gguf


def file_options(path: str) -> dict[str, Any]:
    """The arguments by which `from_pretrained` finds a GGUF file (errors as of `require_gguf`)."""
    require_gguf()
    file = Path(path)
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, "trust_remote_code": False}


def outline_options(path: str) -> dict[str, Any]:
    """The arguments by which `from_pretrained` finds the config and the tokenizer of a GGUF file.

    transformers reads a file's vocabulary string by string, which takes seconds each time. So both are kept in a folder
    below Hugging Face's cache, once for each state of the file; its pre-tokenizer is restored there. Where that does
    not work, the arguments are those of the file itself.

    Raises:
        PacaError: The package that reads such files is missing.
    """
    options = file_options(path)
    folder = kept_of(path)
    if not folder.is_dir() and not _keep(folder, options, path):
        return options
    return {"pretrained_model_name_or_path": str(folder), "trust_remote_code": False}


def kept_of(path: str) -> Path:
    """The folder for what is kept of a GGUF file in its present state."""
    file = Path(path).resolve()
    state = file.stat()
    key = f"{file}|{state.st_size}|{state.st_mtime_ns}|{transformers.__version__}|{VERSION}"
    return Path(constants.HF_HOME) / "paca" / "gguf" / xxhash.xxh128_hexdigest(key.encode())


def _keep(folder: Path, options: dict[str, Any], path: str) -> bool:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with reading(), tempfile.TemporaryDirectory(dir=folder.parent) as place:
            beside = Path(place) / "whole"
            AutoConfig.from_pretrained(**options).save_pretrained(beside)
            tokenizer = AutoTokenizer.from_pretrained(**options)
            restore_pre_tokenizer(tokenizer, path)
            tokenizer.save_pretrained(beside)
            # A class may build a part of its tokenizer anew when it is read.
            read = AutoTokenizer.from_pretrained(beside, trust_remote_code=False)
            if read.backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str():
                return False
            beside.replace(folder)
    except OSError as error:
        logger.info("What is read of %s cannot be kept: %s", path, error)
        return folder.is_dir()  # another process was faster
    return True


def check_file(path: str) -> None:
    """Raise PacaError if a file that could not be loaded is not whole, or no model."""
    reader = quick_reader()
    try:
        field = reader(path).get_field("general.type")
        kind = None if field is None else str(field.contents())
    except Exception as error:  # whatever numpy and struct raise on what is cut off
        reason = first_line(error).rstrip(".")
        raise PacaError(
            f"The GGUF file {path!r} is incomplete or damaged: {reason}. Download or copy it again."
        ) from error
    if kind not in (None, "model"):
        raise PacaError(f"The GGUF file {path!r} is of the type {kind!r}, not a model. Give the model that it is for.")


@contextmanager
def reading() -> Iterator[None]:
    """A block in which transformers reads a GGUF file in a fifth of the time: the 98 MB of SmolLM2 in 3 s, not 16.

    It asks for the names of all tensors anew for each of the model's modules, and slices numpy's slow kind of file for
    each word of the vocabulary. Its bar is hidden, which no switch of its logging reaches. Not for several threads.
    """
    package, bar = require_gguf(), vars(modeling_gguf_pytorch_utils).get("tqdm")
    with ExitStack() as stack:
        stack.enter_context(patch.object(package, "GGUFReader", quick_reader()))
        stack.enter_context(patch.object(package, "get_tensor_name_map", functools.cache(package.get_tensor_name_map)))
        if bar is not None:  # else a transformers without that bar
            disabled = functools.partial(bar, disable=True)
            stack.enter_context(patch.object(modeling_gguf_pytorch_utils, "tqdm", disabled))
        yield


@functools.cache
def quick_reader() -> Any:
    """gguf's reader, on a plain array in place of `numpy.memmap`: slices of it are made in a third of the time."""

    class QuickReader(require_gguf().GGUFReader):  # type: ignore[misc]
        @property
        def data(self) -> np.ndarray:
            return self._plain

        @data.setter
        def data(self, file: np.ndarray) -> None:
            self._plain = file.view(np.ndarray)

    return QuickReader


def check_is_plain(model: PreTrainedModel, path: str) -> None:
    """Raise PacaError if a weight stayed in GGUF blocks."""
    packed = [name for name, parameter in model.named_parameters() if not parameter.is_floating_point()]
    if packed or getattr(model, "is_quantized", False) or getattr(model.config, "quantization_config", None):
        raise PacaError(
            f"The GGUF file {path!r} was not dequantized (for one: {packed[0] if packed else 'config'}), so it cannot "
            "be trained. Convert it to a 16-bit checkpoint first."
        )


def restore_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Give a byte-level tokenizer from a GGUF file the splitting rule that the file names, in place.

    transformers knows the rules of some names, and drops the others silently: then most numbers tokenize differently
    from what the model was trained on. A name that nobody here knows is logged as a warning.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        return  # sentencepiece, or a rule that transformers did restore
    field = quick_reader()(path).get_field("tokenizer.ggml.pre")
    name = None if field is None else str(field.contents())
    if name in _DIGITS_THEN_GPT2:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif name not in _GPT2:
        logger.warning(
            "The GGUF file %s splits text by the rule %r, which neither transformers nor paca knows; the rule of GPT-2 "
            "is used. Some texts may tokenize differently from what the model was trained on. To be safe, train the "
            "original checkpoint instead of the GGUF file.",
            path,
            name,
        )
