"""A run from its config to its folder: SFTTrainer does the training, this file what lies around it."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from transformers import PrinterCallback, TrainerState, TrainingArguments

from paca.lean.loss import loss_for
from paca.messages.disk import writing
from paca.messages.errors import PacaError, within_peft
from paca.messages.program import resume_command
from paca.messages.say import say
from paca.pretrained import Pretrained
from paca.pretrained.purpose import save_classifier_config
from paca.pretrained.whole_output import put_in_place, write_whole
from paca.training.config import train_settings
from paca.training.config.run_config import RunConfig
from paca.training.data_order import SetEpochOfSampler
from paca.training.early_stop import StopEarly, since_best
from paca.training.failures import explained, told_how_to_go_on
from paca.training.finite_loss import StopOnNonFiniteLoss
from paca.training.folder.checkpoints import WholeCheckpoints, kept_step, load_if_finished
from paca.training.folder.run_folder import RunFolder, steps_done
from paca.training.folder.same_run import check_same_model, check_same_run, check_same_settings, told_of_finished
from paca.training.interrupt import StopOnSignal
from paca.training.memory import reset_peak_memory
from paca.training.memory_check import memory_at_hand, memory_warning
from paca.training.method_state import method_callbacks, pull_towards_orthogonal
from paca.training.plain_lora import save_as_plain_lora
from paca.training.plan import show_plan
from paca.training.prepare import PreparedRun, prepare
from paca.training.probe import ProbeLongestBatch
from paca.training.products import decide_products, products_of_run
from paca.training.prompt_form import give_form
from paca.training.reporting.adapter_card import write_card, write_no_empty_cards
from paca.training.reporting.final_scores import held_out_loss, scores_by, scores_by_trainer, timed
from paca.training.reporting.metrics import MetricsLog, RecordMetrics
from paca.training.reporting.progress import ShowProgress, busy
from paca.training.reporting.report import write_report
from paca.training.reporting.scores import Scorer
from paca.training.reporting.summary import summary_of
from paca.training.reporting.tracking import Trackers, check_login, names_for_trackers
from paca.training.sharding import check_sharding, devices_warning
from paca.training.starting_model import finish_trainer, load_model, with_adapter
from paca.training.trainers import trainer_kind
from paca.training.untrained_layers import TellUntrainedLayers


@dataclass
class RunResult:
    """How a run ended."""

    folder: Path
    summary: dict[str, Any] | None
    """The content of `summary.json`; None when a signal stopped the run."""
    resume_command: str | None
    """What continues the run; None when it is finished."""
    saved: bool = True
    """Whether it can be continued from the step at which it stopped."""


def train(
    config: RunConfig,
    resume: bool = False,
    console: Console | None = None,
    *,
    probe: bool = False,
    scorer: Scorer | None = None,
) -> RunResult:
    """Train.

    Args:
        config: From `paca.training.load_run_config`.
        resume: Continue from the newest checkpoint in the run folder, to the same weights as if the run had not
            stopped (bit for bit on a CPU). One that is finished is left as it is; other settings are refused.
        console: Where progress is shown; standard output when None. Only the first process shows anything.
        probe: Try the longest batch first, with no effect on the result.
        scorer: What measures `eval.metric`, from `paca.evaluation.own_data.scorer`.

    Returns:
        The folder and the summary.

    Raises:
        PacaError: Settings, model and data don't fit each other, the folder is taken, or memory or the disk runs out.
        KeyboardInterrupt: A signal came while nothing was being trained, or twice.
    """
    if (config.eval.metric is None) != (scorer is None):
        raise PacaError("eval.metric and scorer go together: train(config, scorer=own_data.scorer(config.eval)).")
    main = os.environ.get("RANK", "0") == "0"
    console = (console or Console()) if main else Console(quiet=True)
    folder = RunFolder(Path(config.output.dir))
    if resume and folder.finished():
        say(console, told_of_finished(folder, config))
        return RunResult(folder.path, folder.read_summary(), None)
    held = folder.in_use() if main else nullcontext()
    with held, StopOnSignal(partial(say, console)) as stopper, told_how_to_go_on(folder):
        if main:
            if resume:
                folder.reopen()
            else:
                folder.check_free(overwrite=config.output.overwrite, used=config.paths_used())
            check_login(config.train.get("report_to"))
        prepared = prepare(config)
        plan = prepared.plan
        record = folder.recorded_inputs() if resume else prepared.inputs
        decide_products(plan.config, plan.dtype, record, resumed=resume)
        if scorer is not None and plan.data.eval is not None:
            scorer.check(plan.data.eval.dataset, prepared.outline)
        settings = {**names_for_trackers(folder, resume=resume), **plan.config.train}
        # Not `trainer.evaluate()` before `trainer.train()`: with several processes, accelerate 1.15 takes the model as
        # prepared after that, leaves DDP away, and each process trains on its own.
        settings["eval_on_start"] = plan.data.eval is not None and config.eval.before and not resume
        arguments = train_settings.training_arguments(settings, folder.checkpoints)  # also joins the other processes
        check_same_settings(plan.config)
        check_sharding(arguments, plan.config)
        if probe and arguments.deepspeed_plugin is not None:
            raise PacaError("--probe does not go with DeepSpeed, whose backward pass is also a step. Leave it out.")
        if main and resume:
            check_same_run(folder, plan.config, prepared.inputs)
        show_plan(plan, console, record)
        if main and not resume:
            folder.clear(prepared.inputs)
        PartialState().wait_for_everyone()
        checkpoint = folder.newest_checkpoint() if resume else None
        with (
            explained(plan.config),
            products_of_run(plan.config, plan.dtype, record),
            loss_for(arguments.device, arguments.torch_compile),
        ):
            return _Run(prepared, folder, arguments, checkpoint, stopper, console, probe, scorer).result()


class _Run:
    """The parts of a run that all its stages need."""

    def __init__(
        self,
        prepared: PreparedRun,
        folder: RunFolder,
        arguments: TrainingArguments,
        checkpoint: Path | None,
        stopper: StopOnSignal,
        console: Console,
        probe: bool,
        scorer: Scorer | None,
    ) -> None:
        self.scorer = scorer
        self.plan, self.data, self.config = prepared.plan, prepared.plan.data, prepared.plan.config
        self.kind = trainer_kind(self.config.train)
        self.folder = folder
        self.checkpoint = checkpoint
        self.checkpoints = WholeCheckpoints(folder, arguments)
        self.stopper = stopper
        self.console = console
        self.main = PartialState().is_main_process
        reset_peak_memory()
        available = memory_at_hand(arguments)
        with busy(self.console, "Loading the model ..."):
            pretrained = load_model(self.config, folder, console, self.data.labels)
            if self.main:
                check_same_model(folder, self.config, pretrained, resume=checkpoint is not None)
            if self.data.template is not None:
                give_form(pretrained.tokenizer, self.config, self.data.train)
        self.trainer = self._make_trainer(pretrained, arguments)
        if scorer is not None and (self.trainer.is_fsdp_enabled or arguments.deepspeed_plugin):
            raise PacaError(
                "eval.metric needs whole weights in one process, not FSDP's or DeepSpeed's shards. Leave it out, add "
                "it to the finished run's config.yaml, and give the run to `paca evaluate`."
            )
        self.trainer.remove_callback(PrinterCallback)
        left_out = self.kind.check_prepared(self.config, self.trainer, self.data)
        self.plan = self.plan.as_made(self.trainer.model).without(*left_out)
        if self.main:
            for warning in (
                self.plan.left_out,
                memory_warning(prepared, self.trainer.train_dataset, arguments, available),
                devices_warning(arguments, self.trainer.is_fsdp_enabled),
            ):
                if warning is not None:
                    say(console, f"Warning: {warning}", style="yellow")
        if probe:
            self.trainer.add_callback(ProbeLongestBatch(self.trainer, self.config, partial(say, console)))
        self.log: MetricsLog | None = None
        self.trackers: Trackers | None = None
        if self.main:
            self.log = MetricsLog(folder.metrics)
            if checkpoint is not None:
                self.log.rewind(steps_done(checkpoint))
            untold = None if self.kind.scored_before else self.kind.score
            self.recorder = RecordMetrics(self.log, self.trainer.args.device, untold)
            self.progress = ShowProgress(console, self.log, self.recorder, self.kind.counts, self.kind.score)
            self.trackers = Trackers(self.trainer, folder, self.log, checkpoint)
            for callback in (self.recorder, self.progress, self.trackers):
                self.trainer.add_callback(callback)
            write_whole(folder.config, self.config.to_yaml())
        self.trainer.add_callback(StopOnNonFiniteLoss())
        self.trainer.add_callback(self.checkpoints)

    def result(self) -> RunResult:
        """Evaluate, train, evaluate, and write the results."""
        try:
            return self._result()
        finally:
            if self.trackers is not None:
                self.trackers.close()

    def _result(self) -> RunResult:
        state = self._train()
        if self.stopper.stopped:
            newest = self.folder.newest_checkpoint()
            saved = newest is not None and steps_done(newest) == state.global_step
            return RunResult(self.folder.path, None, resume_command(self.folder.config), saved)
        loss_after = None
        if self.data.eval is not None and self.config.eval.after:
            loss_after = held_out_loss(self.kind, self.trainer, state, self.console)
        if self.trainer.is_fsdp_enabled:  # whatever the checkpoints are, the adapter is one file
            self.trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trained = self.folder.model if self.config.method == "full" else self.folder.adapter
        unfinished = trained.with_name(f".{trained.name}.partial")
        with writing(trained, self.checkpoints.bytes_of(self.trainer.model)):
            self.trainer.save_model(str(unfinished))
        if self.log is None:
            return RunResult(self.folder.path, None, None)
        if self.data.labels is not None:  # which the adapter's own files don't say, and whoever loads it must know
            save_classifier_config(unfinished, self.trainer.accelerator.unwrap_model(self.trainer.model))
        save_as_plain_lora(unfinished, self.trainer.model, self.config, self.folder.start)
        (unfinished / "training_args.bin").unlink(missing_ok=True)  # a pickle; config.yaml says the same
        result = summary_of(self.plan, state, self.recorder, self.trainer.args, loss_after)
        assert self.trainer.model is not None
        write_card(unfinished, result, self.trainer.model)
        put_in_place(unfinished, trained)  # now: answering questions takes long, and may fail
        result |= timed(partial(self._scores, kept_step(state, self.trainer.args)))
        if result["scores"] is not None:
            write_card(trained, result, self.trainer.model)
        write_report(self.folder.report, result, self.log.rows, self.config.to_yaml())
        # Last: it says that the run is finished.
        write_whole(self.folder.summary, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        assert self.trackers is not None
        self.trackers.finish(result, partial(say, self.console, style="yellow"))
        return RunResult(self.folder.path, result, None)

    def _make_trainer(self, pretrained: Pretrained, arguments: TrainingArguments) -> Any:
        folder, console = self.folder, self.console
        callbacks: list[Any] = [self.stopper, SetEpochOfSampler(), TellUntrainedLayers(console)]
        callbacks += method_callbacks(self.config, folder)
        if (patience := self.config.train.get("early_stopping_patience")) is not None:
            callbacks.append(StopEarly(patience, console))
        model, adapter = with_adapter(pretrained.model, self.config, arguments, self.data.train, folder, console)
        try:
            given = {"processing_class": pretrained.tokenizer, "callbacks": callbacks}
            trainer = self.kind.make(self.config, adapter, self.data, model=model, args=arguments, **given)
        except (PacaError, torch.OutOfMemoryError):
            raise
        except (ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and self.config.model.quantization is not None and within_peft(error):
                raise  # not the trainer's: see `explained`
            raise PacaError(f"{self.kind.trainer.__name__} refuses this run: {error}") from error
        write_no_empty_cards(trainer)
        finish_trainer(trainer, self.config)
        pull_towards_orthogonal(trainer, self.config)
        return trainer

    def _train(self) -> TrainerState:
        trainer = self.trainer
        if self.checkpoint is not None:
            state = TrainerState.load_from_json(str(self.checkpoint / "trainer_state.json"))
            patience = self.config.train.get("early_stopping_patience")
            early = patience is not None and since_best(state, trainer.args) >= patience
            if load_if_finished(trainer, state, self.checkpoint, self.folder, early=early):
                self.stopper.raise_discarded()
                return state
            say(self.console, self.kind.resuming(trainer.args, state))
        try:
            with self.checkpoints.explained(trainer):
                trainer.train(resume_from_checkpoint=None if self.checkpoint is None else str(self.checkpoint))
        finally:
            if self.main:
                self.progress.close()
        return trainer.state

    def _scores(self, step: int) -> dict[str, Any] | None:
        if self.data.eval is None or self.log is None:
            return None
        rows = self.data.eval.dataset
        if self.kind.score is not None:
            return scores_by_trainer(self.kind, self.log, self.trainer, step)
        if self.scorer is None:
            return None
        return scores_by(self.scorer, self.trainer, rows, self.config, self.folder, self.console)
