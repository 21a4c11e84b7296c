"""`train.trainer: sft`: a language model learns texts, or the answers in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl import SFTConfig, SFTTrainer

from paca.data import check_labels
from paca.training.loss_scope import scope_loss
from paca.training.run_config import RunConfig
from paca.training.run_setting import holds_all_logits
from paca.training.trainers.kind import RunData, TrainerKind, read_texts


class Sft(TrainerKind):
    """TRL's `SFTTrainer`."""

    name = "sft"
    arguments = SFTConfig
    trainer = SFTTrainer

    def defaults(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Padding is not counted; without padding there is no attention mask to count by, and all positions are."""
        packs = settings.get("packing", False) or settings.get("padding_free", False)
        return {"packing": False, "include_num_input_tokens_seen": "all" if packs else "non_padding"}

    def read(self, config: RunConfig) -> RunData:
        """Texts, conversations, or prompts with their answers."""
        train, held_out, tokenizer = read_texts(config, "text")
        scope = scope_loss(train, held_out, tokenizer, config.train)
        return RunData(scope.train, scope.eval, scope.description, scope.settings)

    def lines(self, config: RunConfig) -> list[tuple[str, str]]:
        """How the logits are held."""
        if holds_all_logits(config.train):
            return [("logits", "of a whole batch at once, because of train.label_smoothing_factor")]
        return [("logits", "tile by tile (TRL's fused output head), never of a whole batch at once")]

    def check_prepared(self, trainer: Any, data: RunData) -> None:
        """Every example has a token that counts in the loss."""
        check_labels(trainer.train_dataset, data.train, trainer.args, trainer.processing_class)
        if data.eval is not None:
            check_labels(trainer.eval_dataset, data.eval, trainer.args, trainer.processing_class)

    def steps(self, examples: int, train: Mapping[str, Any], processes: int) -> int | None:
        """None where packing decides how many sequences there are."""
        return None if train["packing"] else super().steps(examples, train, processes)
