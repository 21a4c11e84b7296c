"""Load a model for answering, with or without an adapter, and stream its replies."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList, TextIteratorStreamer

from paca.messages.errors import PacaError, is_failure
from paca.pretrained import load_config, load_pretrained
from paca.pretrained.adapter_folder import (
    find_adapter,
    find_base,
    find_dtype,
    find_quantization,
    find_revision,
    weight_file,
)
from paca.pretrained.adapter_tokenizer import saved_tokenizer
from paca.pretrained.bounded_template import conversation_text, renderer
from paca.pretrained.context_length import context_length
from paca.pretrained.ends_of_texts import ends_texts
from paca.pretrained.generation_settings import sampling_settings
from paca.pretrained.hub_adapter import adapter_of_hub
from paca.pretrained.out_of_memory import failure_reason, is_out_of_memory
from paca.pretrained.purpose import check_answers, classifier_in
from paca.pretrained.put_adapter import put_adapter_on
from paca.pretrained.quantizing import QUANTIZATIONS, is_quantized, method_of

Message = dict[str, str]
"""`{"role": "user" | "assistant" | "system", "content": text}`"""


@dataclass
class LoadedModel:
    """A model ready to generate, in evaluation mode."""

    model: Any
    """A `PreTrainedModel`, inside of a `PeftModel` when there is an adapter."""
    tokenizer: PreTrainedTokenizerBase
    adapter: Path | None
    """The adapter's folder; None for a plain model."""
    base: str
    """Name or path of the model without its adapter."""


def load_for_generation(
    path: str | Path, *, base_model: str | None = None, dtype: str = "auto", dequantize: bool = False
) -> LoadedModel:
    """Load a run folder, an adapter (a folder or a hub id) or a plain model (a folder, a .gguf file or a hub id).

    Args:
        path: The folder, the file or the hub id. An adapter on the hub is fetched, and checked as a folder is.
        base_model: Hub id, folder or .gguf file to use in place of the base model that the adapter names.
        dtype: "bfloat16", "float16", "float32", or "auto": that of the run, whose scores are measured in it; for
            adapters and models without a run as stored.
        dequantize: Give quantized weights back their 16 or 32 bits, rounded as they are, before the adapter is put on.

    Raises:
        PacaError: No such folder, not an adapter, a broken weight file, or a base model that cannot be loaded or that
            the adapter does not fit.
    """
    path = adapter_of_hub(path) or path
    check_answers(path)
    with suppress(OSError):  # told when it is asked
        renderer().start()  # while the model loads
    dtype = find_dtype(find_adapter(path, or_hub=True)) if dtype == "auto" else dtype
    return load_saved(path, base_model=base_model, dtype=dtype, dequantize=dequantize)


def load_saved(
    path: str | Path, *, base_model: str | None = None, dtype: str = "auto", dequantize: bool = False
) -> LoadedModel:
    """The same for a model of any kind, a classifier too, whose dtype "auto" is that of the files.

    Arguments and errors are those of `load_for_generation`.
    """
    path = adapter_of_hub(path) or path
    adapter, classifier = find_adapter(path, or_hub=True), classifier_in(path)
    made: dict[str, Any] = {}
    if classifier is not None:
        made = {"auto_class": getattr(transformers, classifier.auto_class), "labels": classifier.labels}
    if adapter is None:
        if base_model is not None:
            raise PacaError(f"{path} is a whole model, not an adapter; leave --base-model out.")
        plain = load_pretrained(str(path), dtype=dtype, **made)
        return LoadedModel(on_accelerator(plain.model).eval(), plain.tokenizer, None, plain.name_or_path)
    base = find_base(adapter, base_model)
    revision = find_revision(adapter, base)
    weight_file(adapter)  # one that is missing is told before the base model is loaded
    tokenizer = saved_tokenizer(adapter)
    try:
        recorded = find_quantization(adapter)
        as_it_lies = recorded not in QUANTIZATIONS or method_of(load_config(base, revision=revision).config) is not None
        pretrained = load_pretrained(
            base,
            dtype=dtype,
            revision=revision,
            quantization=None if as_it_lies else recorded,
            tokenizer=tokenizer,
            **made,
        )
    except PacaError as error:
        raise PacaError(
            f"The adapter in {adapter} needs its base model, {base}, which cannot be loaded. {error}\n"
            "If that model lies elsewhere, say where: --base-model NAME_OR_FOLDER"
        ) from error
    model = on_accelerator(pretrained.model)
    if dequantize and is_quantized(model):
        model = model.dequantize()
    return LoadedModel(put_adapter_on(model, adapter, base), pretrained.tokenizer, adapter, pretrained.name_or_path)


def on_accelerator(model: PreTrainedModel) -> PreTrainedModel:
    """The model, moved to the machine's accelerator if it has one. A quantized model was loaded there."""
    if not is_quantized(model) and torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())  # type: ignore[arg-type]
    return model


def stream_reply(
    loaded: LoadedModel,
    messages: list[Message],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    tools: Sequence[dict[str, Any]] | None = None,
) -> Iterator[str]:
    """Answer the last of `messages`, piece by piece as the text comes.

    Closing the iterator, or an exception such as Ctrl-C while it waits, stops the model at its next token. To answer
    without the adapter, iterate within `with loaded.model.disable_adapter():`.

    Args:
        loaded: The model.
        messages: The conversation, oldest first. A tokenizer without a chat template is given the text of the last
            message alone, to be continued.
        max_new_tokens: Length at which an answer is cut; the end of the model's context cuts it too.
        temperature: 0 takes the likeliest token each time; above 0 samples.
        tools: Definitions of what the model may call, as in OpenAI's interface, for its chat template.

    Raises:
        PacaError: A value out of range, a conversation that does not fit the model's context, or a model, an adapter
            or a tokenizer that fails to answer.
    """
    if max_new_tokens < 1:
        raise PacaError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more.")
    if not 0 <= temperature < float("inf"):
        raise PacaError(
            f"temperature is {temperature}; it must be 0 (always the likeliest token) or a positive number."
        )
    inputs, room = _encode(loaded, messages, tools)
    stop = threading.Event()
    settings = sampling_settings(loaded.model, loaded.tokenizer, temperature)
    streamer = _Streamer(loaded.tokenizer, settings.get("eos_token_id", []) if tools else None)
    failures: Queue[BaseException] = Queue()

    def stopped(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), stop.is_set(), dtype=torch.bool, device=input_ids.device)

    def generate() -> None:
        try:
            loaded.model.generate(
                **inputs,
                **settings,
                max_new_tokens=max_new_tokens if room is None else min(max_new_tokens, room),
                stopping_criteria=StoppingCriteriaList([stopped]),
                streamer=streamer,
            )
        except BaseException as error:
            failures.put(error)
            streamer.on_finalized_text("", stream_end=True)

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    try:
        for piece in streamer:
            if piece:
                yield piece
    finally:
        stop.set()
        thread.join()
    if not failures.empty():
        error = failures.get()
        if isinstance(error, PacaError) or not is_failure(error):
            raise error
        raise PacaError(_no_answer(loaded, error)) from error


class _Streamer(TextIteratorStreamer):
    """Without special tokens; with `ends` only without these and padding, as special ones may mark a call of a tool."""

    def __init__(self, tokenizer: Any, ends: Sequence[int] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=ends is None)
        self.hidden = {tokenizer.pad_token_id, tokenizer.bos_token_id, *(ends or ())} if ends is not None else set()

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt or not self.hidden.intersection(value.flatten().tolist()):
            super().put(value)


def _no_answer(loaded: LoadedModel, error: BaseException) -> str:
    """What to say when the model fails: for want of memory, or of whatever in an adapter's or a tokenizer's files."""
    reason = failure_reason(error)
    if is_out_of_memory(error):
        return f"The model can't answer: {reason}. Start a new conversation (/reset), or ask for fewer new tokens."
    if loaded.adapter is None:
        return f"The model {loaded.base}, or its tokenizer, can't answer: {reason}. Are all its files of one model?"
    return (
        f"The adapter in {loaded.adapter}, or the tokenizer there, can't answer on {loaded.base}: {reason}. It may be "
        f"broken, or need what only PEFT can be told. Give {loaded.base} in its place to talk to the model without it."
    )


def _encode(
    loaded: LoadedModel, messages: list[Message], tools: Sequence[dict[str, Any]] | None
) -> tuple[dict[str, torch.Tensor], int | None]:
    """The prompt as tensors `(1, tokens)`, and how many more tokens the model's context holds, if it has an end."""
    tokenizer = loaded.tokenizer
    if tokenizer.chat_template is None:
        encoded = _tokens(tokenizer, messages[-1]["content"])
        if ends_texts(tokenizer):  # an answer is to follow
            encoded = {name: values[:, :-1] for name, values in encoded.items()}
    else:
        text = conversation_text(tokenizer, messages, tools)
        # The template writes the special tokens itself.
        encoded = _tokens(tokenizer, text, add_special_tokens=False)
    length = encoded["input_ids"].shape[1]
    if length == 0:
        raise PacaError("The prompt is empty. Write something for the model to answer.")
    embeddings = loaded.model.get_input_embeddings().weight.shape[0]
    if int(encoded["input_ids"].max()) >= embeddings:
        raise PacaError(
            f"The tokenizer of {tokenizer.name_or_path} gives token {int(encoded['input_ids'].max())}, but the model "
            f"embeds {embeddings}. It belongs to another model."
        )
    context = context_length(loaded.model)
    if context is not None and length >= context:
        raise PacaError(
            f"The conversation is {length} tokens long and leaves no room for an answer in the model's context of "
            f"{context}. Start a new one (/reset), or shorten the prompt."
        )
    inputs = {name: encoded[name].to(loaded.model.device) for name in ("input_ids", "attention_mask")}
    return inputs, None if context is None else context - length


def _tokens(tokenizer: Any, text: str, **options: Any) -> Any:
    try:
        return tokenizer(text, return_tensors="pt", **options)
    except BaseException as error:
        if not is_failure(error):
            raise
        raise PacaError(f"The tokenizer of {tokenizer.name_or_path} can't split this text: {error}") from error
