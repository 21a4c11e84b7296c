"""The state machine: all operations, and what holds after each."""

from __future__ import annotations

import sys
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from operation_sequences.adapters import SETTINGS, Adapters
from operation_sequences.checks import COUNTS
from operation_sequences.failures import Failures
from operation_sequences.subjects import SUBJECTS
from operation_sequences.training import CHECKPOINTS, ENTRIES, Training
from operation_sequences.values import Values

WAYS = ["state dict", "copy", "disable"]


class Operations(Training, Adapters, Values, Failures, RuleBasedStateMachine):
    """A sequence of operations on a model of one kind (subclasses say which)."""

    kind = "llama"
    compiled = st.just(False)

    ready = False

    @initialize(data=st.data(), settings=SETTINGS, parks=st.booleans())
    def start(self, data: Any, settings: dict[str, Any], parks: bool) -> None:
        self.start_with(SUBJECTS[self.kind], settings, data.draw(self.compiled, label="compiled"))
        self.parks, self.count, self.ready = parks, 0, True
        COUNTS["sequences"] += 1
        COUNTS[f"sequences: {self.kind}"] += 1

    @rule(how=st.sampled_from(WAYS))
    def park(self, how: str) -> None:
        self.compare_base(how)

    @rule(
        batch=st.integers(0, 3),
        what=st.sampled_from(
            ["switch", "disable", "disable and enable", "park", "merge and unmerge", "scale", "mixed"]
        ),
        number=st.integers(0, 3),
        entry=ENTRIES,
        runs=st.booleans(),
        checkpointing=CHECKPOINTS,
    )
    def backward_after(
        self, batch: int, what: str, number: int, entry: str, runs: bool, checkpointing: str | None
    ) -> None:
        """A backward pass after what does not change its columns, but may take them out of the weights."""
        if self.pending is not None:
            self.backward_of_before()
        self.forward_for_later(batch, entry, checkpointing)
        if what == "switch":
            self.switch([number, number + 1] if number % 2 else [number])
        elif what.startswith("disable"):
            self.disable_for_a_while(0, False) if "enable" in what else self.disable()
        elif what == "park":
            self.compare_base(WAYS[number % 2])
        elif what == "scale":
            self.scale(number, -2.0, "set")
        elif what == "mixed":
            self.mixed_batch(batch, [number, 0, 1], False)
        else:
            self.merge([number], False)
            self.unmerge()
        if runs:
            self.compare_pass(number)
        if self.pending is not None:
            self.backward_of_before()
        COUNTS[f"backward passes after: {what}"] += 1

    @invariant()
    def all_is_as_expected(self) -> None:
        if not self.ready:
            return
        self.compare_values()
        self.compare_weights()
        if self.parks and not self.expected.disabled:
            self.count += 1
            self.compare_base(WAYS[self.count % 2])  # not by disabling, which would unmerge
        COUNTS["operations"] += 1

    def teardown(self) -> None:
        if self.ready:
            self.finish(failed=sys.exc_info()[0] is not None)


def machine(kind: str, compiled: Any) -> type[Operations]:
    """The state machine over the models of one kind."""
    return type(f"Operations_{kind}", (Operations,), {"kind": kind, "compiled": compiled})
