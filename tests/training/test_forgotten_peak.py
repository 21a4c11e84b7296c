"""The peak of the resident set, as a run counts it."""

from __future__ import annotations

import sys

import pytest

from forked_process import run_forked

SCRIPT = """
from paca.training.memory import forget_peak_resident_set, peak_resident_set
much = bytearray(b"1") * 400_000_000
del much
before = peak_resident_set()
forget_peak_resident_set()
print(before - peak_resident_set())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts it anew")
def test_a_peak_before_the_run_can_be_forgotten() -> None:
    done = run_forked(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 300_000_000
