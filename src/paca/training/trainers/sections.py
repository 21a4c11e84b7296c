"""Settings of other sections than `train` that go with some trainers only."""

from __future__ import annotations

from paca.columns.selection import FROM_BATCHES
from paca.config import PacaConfig
from paca.messages.errors import PacaError
from paca.training.config.run_config import RunConfig
from paca.training.trainers.kind import TrainerKind


def check_sections_fit(config: RunConfig, kind: TrainerKind) -> None:
    """Refuse settings that the run's trainer has no use for, or can't work with.

    Raises:
        PacaError: Names the key and the trainer.
    """
    if config.data.label is not None and kind.name != "image_classification":
        raise PacaError(f"data.label goes with train.trainer: image_classification, not {kind.name}. Leave it out.")
    if config.data.template is not None and not kind.renders:
        raise PacaError(f"data.template has no effect with train.trainer: {kind.name}. Leave it out.")
    if config.eval.metric is not None and kind.score is not None:
        raise PacaError(f"eval.metric goes with train.trainer: sft; {kind.name} measures {kind.score}. Leave it out.")
    selection = config.adapter.get("selection") if config.method == "paca" else None
    if selection in FROM_BATCHES and kind.name != "sft":
        raise PacaError(
            f"paca.selection: {selection} goes by batches as train.trainer: sft makes them. For {kind.name} choose "
            "random_blocks, random or weight_norm, or give paca.indices."
        )
    rank, r = config.train.get("factor_rank"), config.adapter.get("r", PacaConfig.r)
    if rank is not None and rank >= r:
        raise PacaError(
            f"train.factor_rank is {rank} and paca.r {r}: factors as wide as the deltas gain nothing. Give a quarter "
            "of paca.r."
        )
    if config.model.quantization is not None and kind.task_type != "CAUSAL_LM":
        raise PacaError(
            f"model.quantization does not go with train.trainer: {kind.name}, whose new head would be quantized "
            "before it is trained. Leave it out."
        )
