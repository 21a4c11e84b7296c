"""`train.trainer: sft`: a language model learns texts, or the answers in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from trl import SFTConfig, SFTTrainer

from paca.data import Examples, check_labels, tokenize
from paca.data.packing import packed
from paca.data.sample import take_sample
from paca.messages.errors import PacaError
from paca.training.config.key_checks import Origins
from paca.training.config.run_config import RunConfig
from paca.training.packed_samples import check_apart
from paca.training.prompt_form import describe_loss, tokenizer_of, trains_everything
from paca.training.run_setting import holds_all_logits
from paca.training.trainers.kind import RunData, TrainerKind, read_texts, reader


class Sft(TrainerKind):
    """TRL's `SFTTrainer`."""

    name = "sft"
    measured = ("loss", "mean_token_accuracy", "entropy", "num_tokens", "aux_loss")
    arguments = SFTConfig
    # What counts in the loss is in the data's labels, made beforehand; TRL refuses to look for it once more.
    forced: ClassVar[dict[str, Any]] = {"completion_only_loss": False, "assistant_only_loss": False}
    trainer = SFTTrainer

    def check(self, settings: Mapping[str, Any], origins: Origins) -> None:
        """Packing keeps examples apart, and has a length to fill."""
        if settings.get("packing") and settings.get("max_length", 1) is None:
            raise PacaError(
                f"{origins.of('train.max_length')}: train.max_length: null does not go with train.packing, which fills "
                "sequences up to that length. Give a number of tokens, or leave it out."
            )
        if settings.get("packing") and settings.get("packing_strategy") == "wrapped":
            raise PacaError(
                f"{origins.of('train.packing_strategy')}: train.packing_strategy: wrapped would let the examples of a "
                "sequence read each other. Give bfd, or bfd_split to cut long examples instead of leaving out their "
                "ends."
            )
        if settings.get("eval_packing") and not settings.get("packing"):
            raise PacaError(
                f"{origins.of('train.eval_packing')}: train.eval_packing goes with train.packing: true; alone, TRL "
                "lets the held-out examples of a sequence read each other. Leave it out."
            )

    def defaults(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Padding is not counted; without padding there is no attention mask to count by, and all positions are."""
        packs = settings.get("packing", False) or settings.get("padding_free", False)
        return {"packing": False, "include_num_input_tokens_seen": "all" if packs else "non_padding"}

    def loader(self, config: RunConfig, *, held_out: bool = False) -> Callable[..., Examples]:
        """Texts, conversations, or prompts with their answers."""
        return reader(config, "text", held_out=held_out)

    def read(self, config: RunConfig) -> RunData:
        """The same, with their form."""
        train, held_out, template = read_texts(config, "text")
        return RunData(train, held_out, describe_loss(config, train), template)

    def shape(self, config: RunConfig, data: RunData, *, whole: bool) -> RunData:
        """The tokens of the data, and which of them count in the loss.

        Raises:
            PacaError: None counts of an example, and `data.unusable` is not `leave_out`.
        """
        tokenizer, train, settings = tokenizer_of(config), data.train, config.train
        everything = trains_everything(config, train)
        splits = settings.get("packing") and settings.get("packing_strategy", "bfd") != "bfd"
        sample = take_sample(
            train,
            tokenizer,
            everything=everything,
            limit=None if splits else settings["max_length"],  # what is too long goes on in the next sequence
            keep_end=settings.get("truncation_mode") == "keep_end",
            batch_size=settings["per_device_train_batch_size"],
            leave_out=config.data.unusable == "leave_out",
        )
        packs, packs_eval = settings.get("packing", False), settings.get("eval_packing")
        if not whole:
            filled = packed(sample.lengths, sample.examples, settings) if packs else None
            return replace(data, sample=sample, packed=filled)
        options: Any = {"everything": everything, "processes": settings.get("dataset_num_proc")}
        held_out = None if data.eval is None else tokenize(data.eval, tokenizer, **options)
        train = tokenize(train, tokenizer, **options)
        leave_out = config.data.unusable == "leave_out"
        check = partial(check_labels, train=settings, leave_out=leave_out, context=data.context)
        left_out = (
            check(train, packed=packs),
            0 if held_out is None else check(held_out, packed=packs if packs_eval is None else packs_eval),
        )
        filled = packed(self.lengths(train.dataset), sample.examples, settings) if packs else None
        return replace(data, sample=sample, packed=filled, train=train, eval=held_out, left_out=left_out)

    def lines(self, config: RunConfig) -> list[tuple[str, str]]:
        """How the logits are held."""
        if holds_all_logits(config.train):
            return [("logits", "of a whole batch at once, because of train.label_smoothing_factor")]
        return [("logits", "a part at a time (TRL's fused output head), never of a whole batch at once")]

    def check_prepared(self, config: RunConfig, trainer: Any, data: RunData) -> tuple[int, int]:
        """Packed examples stay apart."""
        check_apart(trainer)
        return data.left_out

    def batches(self, examples: int, train: Mapping[str, Any], processes: int) -> int | None:
        """None where packing decides how many sequences there are."""
        return None if train["packing"] else super().batches(examples, train, processes)
