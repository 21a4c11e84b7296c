"""A training step without values: the real forward and backward pass of the real modules, on fake tensors.

What autograd would keep, what would be allocated when, and how many operations the matrix products take all follow
from shapes, so nothing is modelled here: the step is run, and looked at.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.shadow.layers import ShadowCarrier
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from paca.lean import make_lean
from paca.messages.errors import PacaError, first_line
from paca.planning import shadow
from paca.planning.answering import make_answers
from paca.planning.fake_model import make_fake, without_values
from paca.planning.learned_prompt import LearnedPrompt
from paca.planning.live_memory import LiveMemory
from paca.planning.module_stack import ModuleStack
from paca.planning.operators import Operator
from paca.planning.optimizer_state import factoring, gradient_of, state_bytes, step_temporaries, stepped
from paca.planning.passes import inputs_of, loss_of
from paca.planning.quantized_layers import states, unpacked_by_peft
from paca.planning.setting import Answering, Setting
from paca.planning.step_trace import (
    ACTIVATIONS,
    GRADIENTS,
    LOSS,
    OPTIMIZER,
    ORIGINAL_COLUMNS,
    TEMPORARIES,
    TRAINABLE,
    WEIGHTS,
    StepTrace,
)
from paca.planning.unseen_values import places
from paca.pretrained.loss_in_pieces import answer_for_loss

_OUTPUTS = {
    "sft": ("log_probs", "entropy", "is_top1"),
    "dpo": ("log_probs", "entropy", "mean_logits", "is_top1"),
    "grpo": ("log_probs", "entropy"),
}
"""What TRL's trainers ask its output head for."""


def simulate(
    model: PreTrainedModel,
    setting: Setting,
    backbone: nn.Module,
    before_last: nn.Module | None,
    timed: bool = False,
) -> StepTrace:
    """Run one forward and backward pass of `model` without values.

    Args:
        model: One that has a task (`passes.task_of`), on the meta device, with its adapters in; it is used up.
        setting: How it is trained.
        backbone: The module of it that gives the last hidden states.
        before_last: The last but one of its blocks. Where the backward pass comes to it a new stretch begins: there,
            what each block frees and what it adds decides where the peak is.
        timed: Run a second step, with the optimizer's, and take the operators from it: they are those of all later
            ones.

    Raises:
        PacaError: The forward pass depends on values (as routing to experts may), or can't be made lean.
    """
    copied = setting.reference
    reference = _copy_of(model, copied, setting) if isinstance(copied, torch.dtype) else None
    model.train()
    if setting.disable_dropout:
        disable_dropout_in_model(model)
    with shadow.apart(model):  # a run doesn't find the second network there
        if setting.lean:
            make_lean(model, recompute=setting.recompute)
        if setting.checkpointing:
            _checkpoint_blocks(model)
    if setting.chunked_loss:
        answer_for_loss(model)
        add_fused_lm_head(model, outputs=_OUTPUTS.get(setting.trainer, _OUTPUTS["sft"]))
    with warnings.catch_warnings(), without_values(setting.device), unpacked_by_peft(model):
        warnings.simplefilter("ignore")
        try:
            return _Simulation(model, setting, backbone, before_last, timed, reference).run()
        except RuntimeError as error:  # of which torch's errors about missing values are kinds
            raise PacaError(
                f"{type(model).__name__} can't be planned: without values it does not run ({first_line(error)}). "
                "Measure it instead, with a short run."
            ) from error


class _Simulation:
    def __init__(
        self,
        model: PreTrainedModel,
        setting: Setting,
        backbone: nn.Module,
        before_last: nn.Module | None,
        timed: bool,
        reference: PreTrainedModel | None,
    ) -> None:
        self.model, self.setting, self.backbone, self.before_last = model, setting, backbone, before_last
        self.timed, self.reference = timed, reference
        self.memory, self.stack = LiveMemory(every_operator=False), ModuleStack()

    def run(self) -> StepTrace:
        memory, setting = self.memory, self.setting
        memory.region = ORIGINAL_COLUMNS  # an adapted layer that gets its weight keeps the columns that it replaces
        with memory:
            make_fake(self.model)
            if self.reference is not None:
                make_fake(self.reference)
                memory.categorize((*self.reference.parameters(), *self.reference.buffers()), WEIGHTS)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        held = (*self.model.buffers(), *states(self.model), *places(self.model))
        memory.categorize((*self.model.parameters(), *held), WEIGHTS)
        memory.categorize(trainable, TRAINABLE)
        self.of_factors = factoring(setting.optimizer, trainable)
        if setting.gradient_accumulation > 1:
            for parameter in trainable:
                parameter.grad = gradient_of(parameter)
            memory.note([p.grad for p in trainable], GRADIENTS)
        inputs = inputs_of(self.model, setting, setting.batch_size, setting.masked)
        with memory:
            saved = self._forward_and_backward(inputs)
        for parameter in trainable:
            if parameter.grad is not None:
                memory.categorize([parameter.grad], GRADIENTS)
        peaks = memory.peaks() | {"optimizer step": memory.now()}
        peaks["optimizer step"][TEMPORARIES] += step_temporaries(setting.optimizer, setting.device, trainable)
        state = state_bytes(setting.optimizer, trainable)
        for peak in peaks.values():
            peak[OPTIMIZER] += state
        operators = self._steady(inputs, trainable) if self.timed else memory.operators.copy()
        dequantized = memory.dequantized
        if setting.eval_batch_size is not None:
            self.memory = memory
            peaks["evaluation"] = self._evaluation(setting.eval_batch_size, trainable)
            peaks["evaluation"][OPTIMIZER] += state
        if setting.answering is not None:
            self.memory = memory
            for name, peak in self._answering(setting.answering, trainable).items():
                peaks[name] = peak
                peak[OPTIMIZER] += state
        return StepTrace(saved, peaks, operators, dequantized)

    def _evaluation(self, batch_size: int, trainable: list[nn.Parameter]) -> Counter[str]:
        """What a forward pass between two steps holds at its fullest: no gradients, and nothing is kept for any."""
        for parameter in trainable:
            parameter.grad = None
        self.model.eval()
        self.memory.begin_window("evaluation")
        with self.memory, torch.no_grad():
            self._forward(inputs_of(self.model, self.setting, batch_size, padded=batch_size > 1))
        return self.memory.peaks()["evaluation"]

    def _answering(self, answering: Answering, trainable: list[nn.Parameter]) -> dict[str, Counter[str]]:
        """What making the answers that are learned from holds at its fullest, for each stretch of it."""
        setting, autocast = self.setting, self.setting.autocast
        for parameter in trainable:
            if not setting.answers_within_a_step:
                parameter.grad = None
            elif parameter.grad is None:  # an evaluation came before
                parameter.grad = gradient_of(parameter)
                self.memory.note([parameter.grad], GRADIENTS)
        self.memory.region = TEMPORARIES
        adapted = any(isinstance(module, (BaseTunerLayer, LearnedPrompt)) for module in self.model.modules())
        made = max(setting.answers, setting.eval_batch_size or 0)
        with (
            self.memory,
            torch.no_grad(),
            # PEFT's `generate` is that of the model inside, around which accelerate has no autocast.
            torch.autocast("cpu", dtype=autocast, enabled=autocast is not None and not adapted),
        ):
            windows = make_answers(
                self.model, self.backbone, self.memory, made, setting.sequence_length, answering.length
            )
        peaks = self.memory.peaks()
        return {name: peaks[name] for name in windows}

    def _steady(self, inputs: dict[str, Tensor], trainable: list[nn.Parameter]) -> Counter[Operator]:
        """What a later step runs: the first one also writes columns anew and makes the optimizer's state."""
        step = stepped(self.setting.optimizer, trainable, self.of_factors)
        step()
        for parameter in trainable:
            parameter.grad = None
        self.memory = recorder = LiveMemory()
        with recorder:
            self._forward_and_backward(inputs)
            recorder.phase = "step"
            step()
        for parameter in trainable:
            parameter.grad = None  # `memory` does not follow it
        return recorder.operators

    def _forward_and_backward(self, inputs: dict[str, Tensor]) -> Counter[str]:
        memory = self.memory
        memory.begin_window("forward pass")
        loss = self._forward(inputs)
        held = memory.now()
        memory.begin_window("backward pass, last block")
        memory.phase = "backward"
        loss.backward()
        return Counter({name: count for name, count in held.items() if name.startswith(ACTIVATIONS) or name == LOSS})

    def _forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """The loss."""
        autocast = self.setting.autocast
        self.memory.region = TEMPORARIES
        with (
            self.stack.following(self._after_module),
            torch.autograd.graph.saved_tensors_hooks(self._note_saved, lambda tensor: tensor),
            torch.autocast("cpu", dtype=autocast, enabled=autocast is not None),
        ):
            return loss_of(self.model, inputs, self.setting, self.reference, self._before_reference)

    def _before_reference(self) -> None:
        self.memory.region = TEMPORARIES

    def _note_saved(self, tensor: Tensor) -> Tensor:
        allocation = self.memory.allocation_of(tensor)
        if allocation is not None and allocation.category == TEMPORARIES:
            allocation.category = LOSS if self.memory.region == LOSS else ACTIVATIONS + self.stack.kind()
        return tensor if tensor.grad_fn is None else tensor.detach()  # a saved output would hold itself alive

    def _after_module(self, module: nn.Module, output: Any) -> None:
        memory = self.memory
        if module is self.before_last:
            _when_gradient_arrives(output, lambda: memory.begin_window("backward pass, other blocks"))
        if module is self.backbone:
            memory.region = LOSS
            _when_gradient_arrives(output, lambda: setattr(memory, "region", TEMPORARIES))


def _copy_of(model: PreTrainedModel, dtype: torch.dtype, setting: Setting) -> PreTrainedModel:
    """The reference of a model that is trained in full."""
    reference: PreTrainedModel = copy.deepcopy(model).to(dtype).requires_grad_(False)  # type: ignore[arg-type]
    if setting.lean:
        make_lean(reference, recompute=setting.recompute)
    add_fused_lm_head(reference)
    return reference


def _when_gradient_arrives(output: Any, action: Callable[[], None]) -> None:
    hidden_states = output if isinstance(output, (Tensor, ShadowCarrier)) else output[0]
    hidden_states = hidden_states.hidden if isinstance(hidden_states, ShadowCarrier) else hidden_states
    if hidden_states.requires_grad:
        hidden_states.register_hook(lambda gradient: action())


def _checkpoint_blocks(model: PreTrainedModel) -> None:
    # transformers >= 5.2x has the first name; the other one is on its way out.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
