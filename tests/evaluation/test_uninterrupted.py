"""Ctrl-C within a request to the answers' writing thread takes effect after it."""

from __future__ import annotations

import os
import signal

import pytest

from paca.cli.ending import sigterm_as_ctrl_c
from paca.evaluation.harness import _uninterrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_the_end_of_the_call(number: signal.Signals) -> None:
    ended = []

    def call(value: int) -> None:
        os.kill(os.getpid(), number)
        signal.getsignal(signal.SIGINT)  # Python runs handlers between instructions
        ended.append(value)

    with sigterm_as_ctrl_c(), pytest.raises(KeyboardInterrupt):
        _uninterrupted(call)(3)
    assert ended == [3]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_an_interrupt_nothing_changes() -> None:
    assert _uninterrupted(lambda value: value + 1)(2) == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
