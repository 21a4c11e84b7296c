"""The held-out data as a task, measured when the training is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from peft import PeftModel
from rich.console import Console
from transformers import TrainerState

from paca.messages.say import say
from paca.pretrained.changed_base import left_on
from paca.training.config.run_config import RunConfig
from paca.training.folder.checkpoints import kept_step
from paca.training.folder.provenance import now
from paca.training.folder.run_folder import RunFolder
from paca.training.reporting.metrics import MetricsLog
from paca.training.reporting.progress import busy
from paca.training.reporting.scores import Scorer, trainers_scores
from paca.training.starting_model import as_it_began, load_model, with_first_adapter
from paca.training.trainers.kind import TrainerKind


def timed(measure: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """What `measure` finds, as the summary has it, and what that took: it may be longer than the training."""
    begun = time.monotonic()
    scores = measure()
    return {"scores": scores, "scores_seconds": round(time.monotonic() - begun, 3), "finished": now()}


def held_out_loss(kind: TrainerKind, trainer: Any, state: TrainerState, console: Console) -> float:
    """That of the weights that are kept, which `trainer` has, evaluated anew where the training did not do it.

    Args:
        kind: Of the run. Afterwards what it tells of single examples is of these weights as well.
        trainer: Of the run; of many processes each calls this.
        state: As the training ended.
        console: Where it is shown that this goes on.
    """
    step = kept_step(state, trainer.args)
    for entry in reversed(state.log_history):
        if entry.get("step") == step and "eval_loss" in entry:  # the last evaluation of the training loop
            loss = entry["eval_loss"]
            break
    else:
        with busy(console, "Measuring the held-out loss after training ..."):
            loss = trainer.evaluate()["eval_loss"]
    kind.evaluate_examples(trainer, step)
    return float(loss)


def scores_by_trainer(kind: TrainerKind, log: MetricsLog, trainer: Any, step: int) -> dict[str, Any] | None:
    """What `trainer` measured itself, before training and at `step`; None where it did not."""
    assert kind.score is not None
    before, after = (log.eval_metric_at(at, kind.score) for at in (0, step))
    return trainers_scores(kind.score, len(trainer.eval_dataset), before, after, kind.right(trainer, step)) or None


def scores_by(
    scorer: Scorer,
    trainer: Any,
    rows: Any,
    config: RunConfig,
    folder: RunFolder,
    console: Console,
) -> dict[str, Any]:
    """What `scorer` measures of the model as it came and as it is trained.

    Args:
        scorer: Measures `eval.metric`.
        trainer: Whose model it is.
        rows: The held-out examples.
        config: Of the run.
        folder: Of the run.
        console: Where it is shown.
    """
    wanted = config.eval
    trained: Any = trainer.accelerator.unwrap_model(trainer.model)
    score = partial(scorer.score, tokenizer=trainer.processing_class, rows=rows)
    found: dict[str, Any] = {}
    # No line that moves: the scorer may show one, and a terminal has room for one.
    when = " and ".join(side for side in ("before", "after") if getattr(wanted, side))
    say(console, f"Measuring {wanted.metric} on {len(rows):,} held-out examples, {when} training ...")
    if wanted.before and isinstance(trained, PeftModel) and left_on(trained) is None:
        with as_it_began(trained, config):
            found["before"] = score(trained, when="before training")
    elif wanted.before:
        trainer.optimizer = trainer.lr_scheduler = None  # its state takes the room of a second model
        trainer.accelerator.free_memory()
        trained.zero_grad(set_to_none=True)
        before: Any = load_model(config, folder, console).model
        if config.model.adapter is not None:
            before = with_first_adapter(before, config).eval()
        before = before.to(trained.device)
        with trainer.accelerator.autocast():  # as the trained one runs
            found["before"] = score(before, when="before training")
    if wanted.after:
        found["after"] = score(trained, when="after training")
    return found
