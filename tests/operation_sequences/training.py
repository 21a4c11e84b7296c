"""Operations that run and train the model."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from operation_sequences.checks import COUNTS, Checked, Pending
from operation_sequences.expected import loss_of
from operation_sequences.optimizers import OPTIMIZERS
from operation_sequences.subjects import SAMPLES, tokens

BATCHES = st.integers(0, 3)
ENTRIES = st.sampled_from(["model", "compiled", "compiled", "compiled", "compiled", "base"])
KINDS = st.sampled_from([*sorted(OPTIMIZERS), *["AdamW fused"] * 3])  # many people train with it
CHECKPOINTS = st.sampled_from([None, None, None, "whole", "whole, re-entrant", "blocks", "blocks, re-entrant"])


class Training(Checked):
    """Passes, optimizers, scalers, generation."""

    # -- passes --------------------------------------------------------------------------------------------------------

    def recorded(self, x: Tensor, entry: str, checkpointing: str | None) -> Tensor:
        """The logits of a pass for a backward pass."""
        self.note_pass()
        if checkpointing is None:
            return self.run(x, entry)
        COUNTS[f"passes checkpointed: {checkpointing}"] += 1
        reentrant = checkpointing.endswith("re-entrant")
        if checkpointing.startswith("whole") or not self.subject.is_transformer:
            start = torch.ones(1, requires_grad=True, dtype=self.expected.dtype)  # what re-entrant ones need to see
            return checkpoint(lambda x, start: self.run(x) * start, x, start, use_reentrant=reentrant)
        base, training = self.model.get_base_model(), self.model.training
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if not getattr(base, "_require_grads_hooks", None):
            base.enable_input_require_grads()
        self.model.train()
        try:
            return self.run(x)
        finally:
            base.gradient_checkpointing_disable()
            base.disable_input_require_grads()
            self.model.train(training)

    def forward(self, number: int, entry: str, checkpointing: str | None) -> tuple[Tensor, Any]:
        """A pass, compared. Returns its loss, and the gradients that its backward pass must give."""
        x = tokens(number)
        want, gradients = self.expected.forward_backward(x, self.trainable())
        logits = self.recorded(x, entry, checkpointing)
        self.close(logits, want, "output")
        self.at_once, self.may_be_parked, self.doubtful = True, False, False
        return loss_of(logits), gradients

    def accumulate(self, gradients: Any) -> None:
        for key, gradient in gradients.items():
            self.gradients[key] = self.gradients[key] + gradient if key in self.gradients else gradient

    def zero_gradients(self) -> None:
        self.model.zero_grad()
        self.gradients = {}

    def forward_backward(self, number: int, entry: str = "model", checkpointing: str | None = None) -> None:
        loss, gradients = self.forward(number, entry, checkpointing)
        if loss.requires_grad:
            loss.backward()
        self.accumulate(gradients)
        self.compare_gradients()

    @rule(number=BATCHES, entry=ENTRIES, gradients=st.booleans(), training=st.booleans())
    def infer(self, number: int, entry: str, gradients: bool, training: bool) -> None:
        self.model.train(training)
        self.compare_pass(number, gradients=gradients, entry=entry)
        self.doubtful = False

    @rule(number=BATCHES)
    def infer_in_inference_mode(self, number: int) -> None:
        with torch.inference_mode():
            self.close(self.run(tokens(number)), self.expected.forward(tokens(number)), "output")
        self.at_once, self.may_be_parked, self.doubtful = True, False, False

    @rule(number=BATCHES, entry=ENTRIES, checkpointing=CHECKPOINTS)
    def accumulate_a_batch(self, number: int, entry: str, checkpointing: str | None) -> None:
        self.forward_backward(number, entry, checkpointing)

    @precondition(lambda self: self.subject.is_transformer)
    @rule(number=BATCHES, training=st.booleans())
    def generate(self, number: int, training: bool) -> None:
        self.model.train(training)
        x = tokens(number)
        found = self.model.generate(input_ids=x, max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0)
        if self.expected.dtype == torch.float64:  # a rounding decides between close tokens
            assert torch.equal(found, self.expected.generate(x, 2)), "generated tokens"
            COUNTS["generations compared"] += 1
        self.at_once, self.may_be_parked, self.doubtful = True, False, False

    @rule(number=BATCHES, choice=st.lists(st.integers(0, 4), min_size=SAMPLES, max_size=SAMPLES), train=st.booleans())
    def mixed_batch(self, number: int, choice: list[int], train: bool) -> None:
        known = ["__base__", *(n for n, a in self.expected.adapters.items() if not any(c.folded for c in a.values()))]
        names = [known[c % len(known)] for c in choice]
        if self.expected.merged:
            return
        self.model.eval()
        x, trainable = tokens(number), self.trainable() if train else []
        want, gradients = self.expected.forward_backward(x, trainable, names)
        with torch.set_grad_enabled(train):
            found = self.run(x, adapter_names=names)
            self.close(found, want, "mixed output")
            if found.requires_grad:
                loss_of(found).backward()
        if not self.expected.disabled:
            self.accumulate(gradients)
            self.compare_gradients()
        self.may_be_parked, self.at_once = True, False  # stacks of experts hold one adapter after the other
        self.passes += 1

    # -- a backward pass that comes later ------------------------------------------------------------------------------

    @precondition(lambda self: self.pending is None)
    @rule(number=BATCHES, entry=ENTRIES, checkpointing=CHECKPOINTS)
    def forward_for_later(self, number: int, entry: str, checkpointing: str | None) -> None:
        compiled = self.compiles and entry == "compiled" and checkpointing is None
        if checkpointing and checkpointing.startswith("blocks"):
            checkpointing = checkpointing.replace("blocks", "whole")
        loss, gradients = self.forward(number, entry, checkpointing)
        if loss.requires_grad:
            held = tuple(self.expected.held())
            touched = {name: self.touched[name] for name in ("", *held)}
            self.pending = Pending(loss, gradients, touched, held, checkpointing, compiled, self.passes)

    @precondition(lambda self: self.pending is not None)
    @rule()
    def backward_of_before(self) -> None:
        pending, self.pending = self.pending, None
        assert pending is not None
        unchanged = all(self.touched[name] == count for name, count in pending.touched.items())
        same = pending.held == tuple(self.expected.held())
        surely = unchanged and not pending.compiled and (same or not pending.checkpointed)
        if pending.checkpointed and pending.checkpointed.endswith("re-entrant") and self.passes != pending.passes:
            return  # what can't be told apart there is documented
        before = dict(self.gradients)
        frozen = [p for key, p in self.deltas() if key in pending.gradients and not p.requires_grad]
        for parameter in frozen:  # by PEFT, when it was switched away from, or disabled
            parameter.requires_grad_(True)
        try:
            pending.loss.backward()
        except RuntimeError:
            assert not surely, "nothing changed, and the backward pass is refused"
            COUNTS["backward passes refused, since something changed"] += 1
            self.zero_gradients()
        else:
            self.accumulate({key: g for key, g in pending.gradients.items() if key[1] in self.expected.adapters})
            replaced = {key for key, delta in self.deltas() if delta.grad is None} & pending.gradients.keys()
            if replaced and not unchanged:
                self.gradients = before
                self.zero_gradients()  # the deltas of then are not the model's any more
            else:
                self.compare_gradients()
            COUNTS["backward passes compared that came later"] += 1
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
        self.at_once = False  # the weights hold what the forward pass saw, until the next one

    # -- steps ---------------------------------------------------------------------------------------------------------

    def optimizer(self, kind: str) -> tuple[Any, Any, list[Any], list[Any]]:
        """The optimizer of this kind, its twin over plain parameters, and the parameters of both; made anew if it does
        not hold the deltas that are trained now."""
        held = [(key, p) for key, p in self.deltas() if p.requires_grad]
        if kind == "Muon" and any(p.dim() != 2 for _, p in held):
            kind = "SGD"
        found = self.optimizers.get(kind)
        if found is None or not {id(p) for _, p in held} <= {id(p) for _, p in found[2]}:
            twins = [nn.Parameter(p.detach().clone()) for _, p in held]
            make = OPTIMIZERS[kind]
            found = self.optimizers[kind] = make([p for _, p in held]), make(twins), held, twins
        COUNTS[f"steps: {kind}"] += 1
        return found

    def step(self, kind: str, number: int = 0) -> None:
        """One step, and the same by plain parameters with the same gradients: equal bit for bit."""
        if not self.trainable():
            return
        optimizer, twin, held, twins = self.optimizer(kind)
        self._give(held, twins)
        unseen = kind == "perturbs" and any(p.grad is None for _, p in held)
        if kind == "LBFGS":
            self._step_with_closure(optimizer, twin, held, twins, number)
        else:
            optimizer.step()
            twin.step()
        self._take(held, twins)
        self.doubtful = self.doubtful or unseen
        self.at_once = not self.doubtful
        active = {key[1] for key, p in held if p.grad is not None}
        self.may_be_parked = self.may_be_parked and not set(self.expected.active) <= active

    def _give(self, held: Any, twins: Any) -> None:
        """Give the twin's parameters the values that are expected now, and the gradients, which were compared."""
        current = dict(self.deltas())
        for (key, parameter), plain in zip(held, twins, strict=True):
            if current.get(key) is parameter:
                plain.data.copy_(self.expected.adapters[key[1]][key[0]].delta)
            plain.grad = None if parameter.grad is None else parameter.grad.clone()

    def _take(self, held: Any, twins: Any) -> None:
        """Expect what the twin stepped to."""
        current = dict(self.deltas())
        for (key, parameter), plain in zip(held, twins, strict=True):
            if current.get(key) is parameter:
                self.expected.adapters[key[1]][key[0]].delta = plain.detach().clone()
                self.touched[key[1]] += 1

    def _step_with_closure(self, optimizer: Any, twin: Any, held: Any, twins: Any, number: int) -> None:
        evaluations: list[tuple[Tensor, list[Any]]] = []

        def closure() -> Tensor:
            for key, parameter in held:
                if key[1] in self.expected.adapters and key[0] in self.expected.adapters[key[1]]:
                    self.expected.adapters[key[1]][key[0]].delta = parameter.detach().clone()
            self.zero_gradients()
            loss, gradients = self.forward(number, "model", None)
            if loss.requires_grad:
                loss.backward()
            self.accumulate(gradients)
            self.compare_gradients()
            evaluations.append((loss.detach(), [None if p.grad is None else p.grad.clone() for _, p in held]))
            return loss

        optimizer.step(closure)
        replay = iter(evaluations)

        def again() -> Tensor:
            loss, gradients = next(replay)
            for plain, gradient in zip(twins, gradients, strict=True):
                plain.grad = gradient
            return loss

        twin.step(again)

    @rule(
        kind=KINDS,
        batches=st.lists(BATCHES, min_size=1, max_size=2),
        entry=ENTRIES,
        checkpointing=CHECKPOINTS,
        training=st.booleans(),
    )
    def train(self, kind: str, batches: list[int], entry: str, checkpointing: str | None, training: bool) -> None:
        self.model.train(training)
        for number in batches:
            self.forward_backward(number, entry, checkpointing)
        self.step(kind, batches[0])
        self.zero_gradients()

    @rule(kind=KINDS)
    def step_again(self, kind: str) -> None:
        """With whatever gradients there are."""
        self.step(kind)

    @rule()
    def drop_gradients(self) -> None:
        self.zero_gradients()

    @rule(kind=st.sampled_from(["SGD", "AdamW", "AdamW foreach", "Adagrad"]), number=BATCHES, skipped=st.booleans())
    def scaled_step(self, kind: str, number: int, skipped: bool) -> None:
        """A gradient scaler: a step that it skips changes nothing."""
        if not self.trainable() or self.expected.dtype == torch.bfloat16:
            return
        self.zero_gradients()
        loss, gradients = self.forward(number, "model", None)
        if not loss.requires_grad:
            return
        optimizer, twin, held, twins = self.optimizer(kind)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        self.accumulate(gradients)
        self.compare_gradients()
        self._give(held, twins)
        if skipped:
            scaler._found_inf_per_device(optimizer)[torch.device("cpu")].fill_(1.0)
            COUNTS["steps that a scaler skipped"] += 1
        else:
            twin.step()
        scaler.step(optimizer)
        scaler.update()
        if not skipped:
            self._take(held, twins)
        self.zero_gradients()
