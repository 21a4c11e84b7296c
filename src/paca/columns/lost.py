"""Why a backward pass can't have the columns of its forward pass, and how a repeated forward pass is known to differ.

Re-entrant activation checkpointing runs its first pass without gradients, which keeps nothing that the repeated one
could be compared with; so first passes are counted, by the key of their state. (Checkpointing that is not re-entrant is
checked exactly.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch._C._autograd import _top_saved_tensors_default_hooks as is_checkpointing
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

_REPEATED = (
    "Activation checkpointing repeats a forward pass with {now} active, but it first ran with other adapters or other "
    "values. Make the same adapters active again before backward(), or run backward() before switching or stepping."
)


def names_of(columns: Iterable[Any]) -> str:
    """For messages."""
    return ", ".join(f"adapter {c.name!r}" for c in columns) or "no adapter"


def refuse_backward(*, repeated: bool, base_changed: bool, then: str, now: str) -> None:
    """Raise `RuntimeError` with the reason; `then` and `now` name the forward pass's adapters and the active ones."""
    if repeated:
        raise RuntimeError(_REPEATED.format(now=now))
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


def refuse_handler() -> None:
    """Raise `RuntimeError`: a signal's handler came into a write."""
    raise RuntimeError(
        "A signal's handler, or something else that Python runs at any moment, used the adapted model while this "
        "thread was writing its columns. Let the handler set a flag, and look at the flag between two steps or passes."
    )


def is_on_the_stack(call: FrameType | None) -> bool:
    """Whether this thread is in that call."""
    return any(one is call for one in _calls())


def refuse_torn() -> None:
    """Raise `RuntimeError`: a weight changed in the middle of a backward pass."""
    raise RuntimeError(
        "Another thread wrote other columns into a weight in the middle of this thread's backward pass (a mixed batch "
        "with adapter_names, or a switch), so the gradient can't be computed. Run forward and backward again, or train "
        "while no other thread does that."
    )


def note_first(passes: dict[Any, list[Any]], state: Any, can_come_back: Callable[[Any], bool]) -> None:
    """Count a first pass, and forget those whose state can't come back."""
    if state.key not in passes:
        for old in [key for key, states in passes.items() if not states or not can_come_back(states[0])]:
            del passes[old]
    passes.setdefault(state.key, []).append(state)  # the state itself: its key has ids of its tensors


def check_repeated(passes: dict[Any, list[Any]], key: Any, now: str) -> None:
    """Note a pass within a backward pass; raise if checkpointing repeats it with columns that no first pass had."""
    if passes.get(key):
        passes[key].pop()
    elif any(passes.values()) and _is_reentrant():
        raise RuntimeError(_REPEATED.format(now=now))


_MOST_PASSES = 64
"""States that are kept of passes that checkpointing may repeat, for each weight."""


def note_checkpointed(columns: Any, state: Any) -> None:
    """Note a pass with `state` that checkpointing may repeat; raise if checkpointing that is not re-entrant repeats it
    with columns that no first pass had. Where the layer's own backward pass runs, the saved tag tells more: here, where
    it does not (the layer's output is detached, or everything in it is frozen)."""
    passes = columns.__dict__.setdefault("checkpointed_passes", {})
    if torch._C._current_graph_task_id() == -1:
        note_first(passes, state, columns.can_come_back)
        del passes[state.key][1:]
        if len(passes) > _MOST_PASSES:
            del passes[next(iter(passes))]
    elif state.key not in passes and _is_repeated_by_checkpointing():
        raise RuntimeError(_REPEATED.format(now=names_of(state.columns)))


@torch.compiler.assume_constant_result
def lies_in_checkpointing() -> bool:
    """Whether what is being compiled lies in a block that checkpointing repeats, or is repeated: nothing would tell
    that the second pass reads other columns. Asked once, when it is traced."""
    hooks = is_checkpointing(True)
    if hooks is not None and getattr(hooks[0], "__module__", None) == torch.utils.checkpoint.__name__:
        return True
    first_pass = not torch.is_grad_enabled() and not torch._C._is_fwd_grad_enabled()
    return torch._C._current_graph_task_id() != -1 or (first_pass and not torch.is_inference_mode_enabled())


@contextmanager
def beside_checkpointing() -> Iterator[None]:
    """A block whose operators selective checkpointing neither keeps nor looks for: the repeated pass may write columns,
    where the first one had nothing to write. Nor does `make_fx` record them; within `FakeTensorMode` they are real."""
    kinds = {type(mode).__module__ for mode in _get_current_dispatch_mode_stack()}
    unseen = kinds & {"torch.utils.checkpoint", "torch._subclasses.fake_tensor", "torch.fx.experimental.proxy_tensor"}
    with _disable_current_modes() if unseen else nullcontext():
        yield


_BACKWARDS = {
    getattr(BackwardCFunction, name).__code__ for name in ("apply", "apply_boxed") if hasattr(BackwardCFunction, name)
}
_REPEATS = ("recompute_fn", "unpack_hook")


def _is_reentrant() -> bool:
    """Whether an autograd function in Python runs this pass in its backward: checkpointing of torch's, DeepSpeed's or
    the user's own. (Reading its saved tensors there may repeat a pass that is checked otherwise.)"""
    for call in _calls():
        if call.f_code in _BACKWARDS or _repeats(call):
            return not _repeats(call)
    return False


def _is_repeated_by_checkpointing() -> bool:
    """Whether torch's checkpointing that is not re-entrant repeats this pass."""
    return any(map(_repeats, _calls()))


def _repeats(call: FrameType) -> bool:
    return call.f_code.co_name in _REPEATS and "checkpoint" in call.f_code.co_filename.rpartition("/")[2]


def _calls() -> Iterator[FrameType]:
    """Those that this thread is in, from the innermost one on."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
