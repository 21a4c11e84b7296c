"""What a training step is like, as far as its memory and time depend on it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch

from paca.messages.errors import PacaError

PAIRED = ("dpo", "reward")
"""Trainers of pairs of answers, both of which are in a pass."""
ALWAYS_CHUNKED = ("dpo", "grpo")
"""Those that compute log-probabilities without all logits, whatever is set."""


@dataclass(frozen=True)
class Answering:
    """How a model answers what it learns from (`grpo`)."""

    length: int
    """Tokens of an answer, at most; they are part of a sequence."""
    num_generations: int = 1
    """Answers to a prompt."""
    steps_per_generation: int | None = None
    """Forward passes for which answers are made at a time; None: those of an optimizer step."""
    generation_batch_size: int | None = None
    """Answers that are made at a time, where it is not what such passes take."""
    num_iterations: int = 1
    """How often each answer is learned from."""


@dataclass(frozen=True)
class Setting:
    """One way to train a given model; PacaError for a number below 1, or settings that exclude each other."""

    sequence_length: int
    """Tokens in each sequence, padding included."""
    batch_size: int = 1
    """Sequences in one forward pass; where answers are compared, pairs of them."""
    gradient_accumulation: int = 1
    """Forward passes per optimizer step."""
    lean: bool = False
    """`paca.make_lean`."""
    recompute: Literal["mlp"] | None = None
    """Its argument of that name; needs `lean`."""
    checkpointing: bool = False
    """Activation checkpointing of every block (non-reentrant)."""
    chunked_loss: bool = True
    """TRL's loss, which never holds all logits; otherwise the loss of transformers over the whole batch's logits."""
    padded: bool | None = False
    """Whether batches hold padding or packed sequences, so that attention needs a mask. None: those of more than one
    sequence do."""
    autocast: torch.dtype | None = None
    """Dtype of `torch.autocast`, or None without it."""
    quantization: str | None = None
    """As `model.quantization` of a run: `"nf4"`, `"fp4"`, `"int8"`, or None for the weights as the model has them."""
    autocast_adapter_dtype: bool = True
    """As in `peft.get_peft_model`: whether an adapter on 16-bit weights is kept in float32."""
    optimizer: str = "adamw_torch_fused"
    """As `optim` of transformers' `TrainingArguments`."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Whose attention kernels are assumed."""
    eval_batch_size: int | None = None
    """Sequences in a forward pass of an evaluation between steps; None without one."""
    lengths: int = 1
    """How many different lengths batches have; `sequence_length` is the longest."""
    trainer: str = "sft"
    """As `train.trainer` of a run."""
    reference: Literal["without adapter"] | torch.dtype | None = None
    """What the trained model is held against: itself, with its adapter off (or a copied one in its place), or a second
    copy of it, of a dtype."""
    copied_adapter: bool = False
    """Whether a copy of the adapter is held that a run begins with, as TRL's DPOTrainer does."""
    disable_dropout: bool = False
    """Whether the trainer sets every dropout to zero."""
    answering: Answering | None = None
    """How the model answers, where it does."""

    def __post_init__(self) -> None:
        for name in ("sequence_length", "lengths", "batch_size", "gradient_accumulation"):
            value = getattr(self, name)
            if value < 1:
                raise PacaError(f"{name} is {value}; it must be 1 or more.")
        if self.recompute is not None and not self.lean:
            raise PacaError(f"recompute={self.recompute!r} is a part of the lean blocks: set lean as well.")
        if self.trainer in ALWAYS_CHUNKED and not self.chunked_loss:
            raise PacaError(
                f"A run of train.trainer: {self.trainer} never holds all logits, so there is no other loss to plan. "
                "Leave out --loss."
            )
        if self.answering is not None and self.answering.length >= self.sequence_length:
            raise PacaError(
                f"Sequences of {self.sequence_length} tokens leave no room for a prompt, as answers "
                f"(train.max_completion_length) have up to {self.answering.length}. Give both together (--seq)."
            )
        if self.device not in ("cpu", "cuda"):
            raise PacaError(f"Plans can be made for the devices 'cpu' and 'cuda', not for {self.device!r}.")

    @property
    def tokens_per_pass(self) -> int:
        """Tokens in one forward pass."""
        return self.batch_size * self.sequence_length * (2 if self.trainer in PAIRED else 1)

    @property
    def sequences_per_step(self) -> int:
        """Sequences per optimizer step."""
        return self.batch_size * self.gradient_accumulation

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step."""
        return self.gradient_accumulation * self.tokens_per_pass

    @property
    def masked(self) -> bool:
        """Whether attention gets a mask."""
        if self.trainer in (*PAIRED, "grpo"):
            return True
        return self.batch_size > 1 if self.padded is None else self.padded

    @property
    def answers(self) -> int:
        """How many answers are made at a time."""
        if self.answering is None:
            return 0
        passes = self.answering.steps_per_generation or self.gradient_accumulation
        return self.answering.generation_batch_size or self.batch_size * passes

    @property
    def answers_go_round(self) -> bool:
        """Whether the answers that are made at a time are whole groups, and whole batches."""
        if self.answering is None:
            return True
        return self.answers % self.answering.num_generations == 0 and self.answers % self.batch_size == 0

    @property
    def answers_within_a_step(self) -> bool:
        """Whether answers are made while gradients wait for further passes."""
        if self.answering is None:
            return False
        return self.answers // self.batch_size * self.answering.num_iterations % self.gradient_accumulation != 0

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        values = {**dataclasses.asdict(self), "padded": self.masked, "answers": self.answers}
        return {
            name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for name, value in values.items()
        }

    def batch_in_words(self, images: bool = False) -> str:
        """What is in a forward pass."""
        count = self.batch_size
        if images:
            return f"{count} images"
        kind = "pair" if self.trainer in PAIRED else "sequence"
        of = " of 2 sequences" if self.trainer in PAIRED else ""
        return f"{count} {kind}{'' if count == 1 else 's'}{of} of {self.sequence_length} tokens"

    def techniques(self) -> str:
        """What is done to save memory, in words."""
        words = [] if self.quantization is None else [f"{self.quantization} weights"]
        if self.lean:
            words.append("lean blocks" if self.recompute is None else "lean blocks, MLP recomputed")
        if self.checkpointing:
            words.append("activation checkpointing")
        if self.chunked_loss:
            words.append("chunked loss")
        return ", ".join(words) or "none"
