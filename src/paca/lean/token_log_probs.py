"""The log-probabilities of labels and their gradient, in two matrix products instead of three, for CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from trl.kernels import ChunkedLogProbFunction

from paca.functional.first_order import first_order

BLOCK = 32 * 2**20
"""Bytes of logits that are held at once: whole rows of the vocabulary, of as many positions as fit."""
ROWS = 32
"""Positions are taken in multiples of this: oneDNN compiles a program for each number of rows, and keeps it."""
TILE = 1024
"""Tokens of the vocabulary in one pass of the work by element, which then stays in the cache."""
KNOWN = {"log_probs", "entropy", "mean_logits", "is_top1"}


class TokenLogProbs:
    """What TRL's fused output head calls on a CPU, in the place of its own function.

    TRL's computes the logits in the backward pass again, and takes the gradient's product in float32, as it rounds no
    sum of a part of the vocabulary. Here a block has the whole vocabulary, so that a product in the weight's dtype sums
    all of it in float32 and rounds once. It is made in the forward pass, while the logits are there.
    """

    @staticmethod
    def apply(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        chunk: int,
        softcap: float | None,
        scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        """Return log-probabilities, entropy, `None`, mean logits, whether the target is the most likely; `[N]` each.

        Args:
            hidden: Of shape `[N, H]`.
            weight: Of shape `[V, H]`. Where it is trained, or of another dtype, TRL's function is used.
            bias: Of shape `[V]`, or none. With one, TRL's function is used.
            targets: Of shape `[N]`.
            temperature: What logits are divided by.
            chunk: The width of TRL's tiles.
            softcap: The bound of the logits, before the temperature, or none.
            scale: What logits are multiplied by, before `softcap`.
            outputs: Which results are wanted, in TRL's words.
        """
        mixed = weight.dtype != hidden.dtype or torch.is_autocast_enabled(hidden.device.type)
        trained = weight.requires_grad and torch.is_grad_enabled()
        if bias is not None or mixed or trained or scale / temperature <= 0 or not KNOWN.issuperset(outputs):
            theirs = (hidden, weight, bias, targets, temperature, chunk, softcap, scale, outputs)
            return ChunkedLogProbFunction.apply(*theirs)
        settings = (temperature, chunk, softcap, scale)
        logprobs, entropy, mean, top1 = _LogProbs.apply(hidden, weight, targets, *settings, "mean_logits" in outputs)
        results = {"log_probs": logprobs, "entropy": entropy, "mean_logits": mean, "is_top1": top1}
        wanted = {"log_probs", *outputs}
        order = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        return tuple(results[name] if name in wanted else None for name in order)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        chunk: int,
        softcap: float | None,
        scale: float,
        averages: bool,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        count, (vocabulary, _) = len(hidden), weight.shape
        rows = max(BLOCK // (vocabulary * hidden.element_size()) // ROWS, 1) * ROWS
        logits = hidden.new_empty(min(rows, _padded(count)), vocabulary)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        logprobs = hidden.new_empty(count, dtype=_wide(hidden))
        entropy, mean = torch.empty_like(logprobs), torch.empty_like(logprobs)
        top1 = torch.empty_like(targets, dtype=torch.bool)
        scores = _Scores(scale, softcap, temperature)
        for here in pieces(count, rows):
            some, target = hidden[here], targets[here, None]
            some = torch.nn.functional.pad(some, (0, 0, 0, _padded(len(some)) - len(some)))
            torch.mm(some, weight.t(), out=logits[: len(some)])
            block = logits[: len(target)]
            largest, most_likely = block.max(1, keepdim=True)
            top1[here] = most_likely.eq(target).squeeze(1)
            of_target = scores.of(block.gather(1, target))
            log_sum, uncertainty, average = scores.log_sum_entropy_and_mean(block, scores.of(largest), averages)
            logprobs[here] = (of_target - log_sum).squeeze(1)
            entropy[here] = uncertainty.squeeze(1)
            mean[here] = average.squeeze(1)
            if gradient is not None:
                scores.replace_by_gradient(block, target, of_target, log_sum)
                gradient[here] = torch.mm(logits[: len(some)], weight)[: len(target)]
        ctx.settings = (temperature, chunk, softcap, scale)
        ctx.save_for_backward(gradient, hidden, weight, targets)
        ctx.mark_non_differentiable(mean, top1)
        return logprobs, entropy, mean, top1

    @staticmethod
    @first_order
    def backward(
        ctx: Any, of_logprobs: torch.Tensor | None, of_entropy: torch.Tensor | None, *_: None
    ) -> tuple[torch.Tensor | None, ...]:
        gradient, hidden, weight, targets = ctx.saved_tensors
        if of_entropy is not None:  # a bonus for it, as GRPO can have: a training loss has none
            with torch.enable_grad():
                again = hidden.detach().requires_grad_()
                theirs = (again, weight, None, targets, *ctx.settings, ("log_probs", "entropy"))
                logprobs, entropy, *_ = ChunkedLogProbFunction.apply(*theirs)
            of_logprobs = torch.zeros_like(logprobs) if of_logprobs is None else of_logprobs
            total = torch.autograd.grad([logprobs, entropy], again, [of_logprobs, of_entropy])[0]
        else:
            total = None if of_logprobs is None else (gradient * of_logprobs[:, None]).to(gradient.dtype)
        return total, *(None,) * 7


class _Scores:
    """Logits as the model's config and the temperature want them, in float32 (float64 for float64).

    With the defaults nothing is done to them, and nothing is computed for it.
    """

    def __init__(self, scale: float, softcap: float | None, temperature: float) -> None:
        self.scale, self.softcap, self.temperature = scale, softcap, temperature

    def of(self, logits: torch.Tensor) -> torch.Tensor:
        z = logits.to(_wide(logits), copy=True)
        if self.softcap is not None:
            z.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        elif self.scale != self.temperature:
            z.mul_(self.scale / self.temperature)
        return z

    def slope(self, z: torch.Tensor) -> torch.Tensor | float:
        """What a score changes by with its logit."""
        slope = self.scale / self.temperature
        return slope if self.softcap is None else slope * (1 - (z * (self.temperature / self.softcap)) ** 2)

    def log_sum_entropy_and_mean(
        self, block: torch.Tensor, largest: torch.Tensor, averages: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of each row the log of the sum of the exponentials, the entropy and, with `averages`, the mean.

        Args:
            block: Logits, `[N, V]`.
            largest: Of each row, `[N, 1]`.
            averages: Whether the mean is asked for; else it is 0.
        """
        total, weighted, plain = (torch.zeros_like(largest) for _ in range(3))
        for columns in pieces(block.shape[1], TILE):
            z = self.of(block[:, columns])
            if averages:
                plain += z.sum(1, keepdim=True)
            e = z.sub_(largest).exp()
            total += e.sum(1, keepdim=True)
            weighted += e.mul_(z).sum(1, keepdim=True)
        return largest + total.log(), total.log() - weighted / total, plain / block.shape[1]

    def replace_by_gradient(
        self, block: torch.Tensor, target: torch.Tensor, of_target: torch.Tensor, log_sum: torch.Tensor
    ) -> None:
        """Put the gradient of the target's log-probability in the place of the logits."""
        at_target = (1 - (of_target - log_sum).exp()) * self.slope(of_target)
        for columns in pieces(block.shape[1], TILE):
            z = self.of(block[:, columns])
            slope = self.slope(z)
            block[:, columns].copy_(z.sub_(log_sum).exp_().mul_(slope).neg_())
        block.scatter_(1, target, at_target.to(block.dtype))


def pieces(length: int, size: int) -> Iterator[slice]:
    """Slices of `size` that cover `length`; the last may be shorter."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _padded(rows: int) -> int:
    return -(-rows // ROWS) * ROWS
