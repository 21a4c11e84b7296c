"""What four methods of PEFT keep beside their adapter: it goes into checkpoints, and comes back with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import AdaLoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from paca.messages.errors import PacaError
from paca.training.config.run_config import RunConfig
from paca.training.folder.run_folder import RunFolder
from paca.tuner.rotation.callback import RotateColumns


class _KeepWithCheckpoints(TrainerCallback):
    """Writes tensors into each checkpoint, and reads them wherever the adapter of a checkpoint is read."""

    file: ClassVar[str]

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Read them too when the trainer goes on from a checkpoint, or takes the best one, by `load_adapter`."""
        model = kwargs["model"]
        load: Callable[..., Any] = model.load_adapter

        def load_both(checkpoint: str, *given: Any, **options: Any) -> Any:
            self.make_ready(model)
            loaded = load(checkpoint, *given, **options)
            self.put_back(model, load_file(Path(checkpoint) / self.file))
            return loaded

        vars(model)["load_adapter"] = load_both

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write them into the checkpoint."""
        if state.is_world_process_zero:
            tensors = {
                name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors(kwargs["model"]).items()
            }
            save_file(tensors, self.folder.checkpoint(state.global_step) / self.file)

    def make_ready(self, model: Any) -> None:
        """Before an adapter is read into the model."""

    def tensors(self, model: Any) -> dict[str, torch.Tensor]:
        """What a checkpoint lacks."""
        raise NotImplementedError

    def put_back(self, model: Any, tensors: dict[str, torch.Tensor]) -> None:
        """Go on with them."""
        raise NotImplementedError


class KeepPromptEncoder(_KeepWithCheckpoints):
    """The encoder of P-tuning and of projected prefix tuning, of which PEFT saves what it gives alone."""

    file = "prompt_encoder.safetensors"

    def make_ready(self, model: Any) -> None:
        """Have PEFT read nothing into it: of a projected prefix the shapes differ."""
        for encoder in model.prompt_encoder.values():
            vars(encoder)["_load_adapter_state_dict"] = lambda tensors: None

    def tensors(self, model: Any) -> dict[str, torch.Tensor]:
        """Its weights."""
        return dict(model.prompt_encoder.state_dict())

    def put_back(self, model: Any, tensors: dict[str, torch.Tensor]) -> None:
        """Its weights."""
        model.prompt_encoder.load_state_dict(tensors)


class ProjectContext(KeepPromptEncoder):
    """Keeps CPT's tokens as near to those they began as, as its config says, once after each step.

    PEFT does so in each forward pass, and each time may round otherwise: a checkpoint more would be another run.
    """

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Have forward passes leave the tokens as they are."""
        super().on_init_end(args, state, control, **kwargs)
        for encoder in kwargs["model"].prompt_encoder.values():
            moved = encoder.delta_embedding.weight
            vars(encoder)["get_projection"] = lambda moved=moved: moved.data

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Bring them back."""
        for encoder in kwargs["model"].prompt_encoder.values():
            encoder.delta_embedding.weight.data = type(encoder).get_projection(encoder)


class AllocateRanks(_KeepWithCheckpoints):
    """Shares out AdaLoRA's ranks after each step, by PEFT's `update_and_allocate`.

    While it trains, `rank_pattern` is not in the config: a checkpoint then holds all rows, those that are masked as
    zeros, and the optimizer's moments fit them. The adapter that the run leaves is cut to its ranks.
    """

    file = "rank_allocation.safetensors"
    _AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")

    def __init__(self, folder: RunFolder, total_step: int | None) -> None:
        """Args:
        folder: Of the run.
        total_step: Of the section; None for the run's steps.
        """
        super().__init__(folder)
        self._given = total_step
        self._pattern: dict[str, list[bool]] | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """See to loading, and leave the pull towards orthogonal factors to `pull_towards_orthogonal`."""
        super().on_init_end(args, state, control, **kwargs)
        tuner, config = kwargs["model"].base_model, _config(kwargs["model"])
        asked = config.orth_reg_weight

        def leave_out(module: nn.Module, inputs: Any) -> None:
            config.orth_reg_weight = 0.0

        def restore(module: nn.Module, inputs: Any, outputs: Any) -> None:
            config.orth_reg_weight = asked

        tuner.register_forward_pre_hook(leave_out)
        tuner.register_forward_hook(restore, always_call=True)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Plan for the steps of the run."""
        config = _config(kwargs["model"])
        config.total_step = self._given or state.max_steps
        check_budget(config.tinit, config.tfinal, config.total_step)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take the pattern out of the config."""
        _config(kwargs["model"]).rank_pattern = None

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Share out: the step is made, and its gradients are still there."""
        model, config = kwargs["model"], _config(kwargs["model"])
        for name, parameter in model.named_parameters():
            if ".lora_" in name and parameter.requires_grad and parameter.grad is None:  # an expert without tokens
                parameter.grad = torch.zeros_like(parameter)
        config.rank_pattern = self._pattern
        model.base_model.update_and_allocate(state.global_step + 1)
        self._pattern, config.rank_pattern = config.rank_pattern, None

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Have the adapter saved with its ranks."""
        _config(kwargs["model"]).rank_pattern = self._pattern

    def make_ready(self, model: Any) -> None:
        """A checkpoint has all rows."""
        _config(model).rank_pattern = None

    def tensors(self, model: Any) -> dict[str, torch.Tensor]:
        """The moving averages of importance, which rows are in use, and of how many steps the plan is."""
        allocator = model.base_model.rankallocator
        kept = {
            f"{kind}:{name}": tensor for kind in self._AVERAGES for name, tensor in getattr(allocator, kind).items()
        }
        pattern = {f"pattern:{name}": torch.tensor(rows) for name, rows in (self._pattern or {}).items()}
        return {**kept, **pattern, "total_step": torch.tensor(_config(model).total_step)}

    def put_back(self, model: Any, tensors: dict[str, torch.Tensor]) -> None:
        """The same, as the adapter has them now."""
        allocator, config = model.base_model.rankallocator, _config(model)
        found: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in (*self._AVERAGES, "pattern")}
        config.total_step = int(tensors.pop("total_step"))
        for key, tensor in tensors.items():
            kind, _, name = key.partition(":")
            found[kind][name] = tensor
        for kind in self._AVERAGES:
            where = dict(model.base_model.model.named_parameters())
            values = {name: tensor.to(where[name].device) for name, tensor in found[kind].items()}
            setattr(allocator, kind, values)
        self._pattern = {name: rows.tolist() for name, rows in found["pattern"].items()} or None
        config.rank_pattern = self._pattern


def method_callbacks(config: RunConfig, folder: RunFolder) -> list[TrainerCallback]:
    """What a trainer needs for the method of a run, beside its adapter.

    Args:
        config: The resolved run.
        folder: Of the run.
    """
    if config.adapter.get("rotate_every") is not None:
        return [RotateColumns()]
    kind = config.adapter.get("peft_type")
    if kind == "ADALORA":
        return [AllocateRanks(folder, config.adapter.get("total_step"))]
    if kind == "CPT":
        return [ProjectContext(folder)]
    return [KeepPromptEncoder(folder)] if kind == "P_TUNING" or config.adapter.get("prefix_projection") else []


def pull_towards_orthogonal(trainer: Any, config: RunConfig) -> None:
    """Add AdaLoRA's regularization to what a trainer minimizes: `orth_reg_weight` times how far factors are from
    orthogonal ones, ‖AAᵀ - 1‖ and ‖BᵀB - 1‖, on average.

    PEFT adds it to the loss that a model computes. TRL's trainers compute theirs from other outputs, and evaluations of
    several methods are to be comparable. So it is added here, once a step, and in training alone.

    Args:
        trainer: Of the run.
        config: The resolved run; with another method nothing is done.
    """
    if config.adapter.get("peft_type") != "ADALORA":
        return
    compute, model = trainer.compute_loss, trainer.model
    factors = [(name, p) for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name]
    weight = _config(model).orth_reg_weight

    def penalty() -> torch.Tensor:
        square = (p @ p.T if ".lora_A." in name else p.T @ p for name, p in factors)
        away = [
            torch.linalg.matrix_norm((one - torch.eye(*one.shape, out=torch.empty_like(one))).float()) for one in square
        ]
        return weight * torch.stack([one.to(away[0].device) for one in away]).mean()

    def with_penalty(
        given: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> Any:
        found = compute(given, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if not given.training:
            return found
        loss = found[0] if return_outputs else found
        batches = trainer.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        loss = loss + penalty().to(loss.device) / batches
        return (loss, found[1]) if return_outputs else loss

    vars(trainer)["compute_loss"] = with_penalty


def check_budget(tinit: int, tfinal: int, total_step: int) -> None:
    """Refuse a plan of AdaLoRA's that has no steps in which ranks are shared out.

    Args:
        tinit: Steps before.
        tfinal: Steps after.
        total_step: All steps.

    Raises:
        PacaError: It is such a plan.
    """
    if tinit + tfinal >= total_step:
        raise PacaError(
            f"peft.tinit ({tinit}) and peft.tfinal ({tfinal}) leave none of {total_step} steps for sharing out ranks. "
            "Lower them, or train for longer."
        )


def _config(model: Any) -> AdaLoraConfig:
    tuner = model.base_model
    found = tuner.peft_config[tuner.trainable_adapter_name]
    assert isinstance(found, AdaLoraConfig)
    return found
