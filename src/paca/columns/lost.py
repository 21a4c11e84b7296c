"""Why a backward pass can't have the columns of its forward pass."""

from __future__ import annotations

REPEATED = (
    "Activation checkpointing repeats a forward pass with {now} active, but it first ran with other adapters or other "
    "values. Make the same adapters active again before backward(), or run backward() before switching or stepping."
)


def refuse_backward(*, repeated: bool, base_changed: bool, then: str, now: str) -> None:
    """Raise `RuntimeError` with the reason; `then` and `now` name the forward pass's adapters and the active ones."""
    if repeated:
        raise RuntimeError(REPEATED.format(now=now))
    if base_changed:
        raise RuntimeError(
            "The weight of an adapted layer was merged, unmerged or loaded between forward and backward, or written by "
            "somebody else, or its columns rotated, or its adapter unloaded, so the gradient can't be computed. Run "
            "backward() first."
        )
    raise RuntimeError(
        f"The columns of {then} were modified between forward and backward (by an optimizer step or an in-place "
        "operation), so the gradient can't be computed. Run backward() first."
    )
