"""A few steps of a method, to see what they take; a fake stands in for the training itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from comparison.fake_trainer import PER_STEP, STEPS
from comparison.small_comparison import COMMON, FAKE, small_comparison
from paca.comparison import counted_memory, trial
from paca.comparison.trial import WARM_UP, Trial, TrialFailed, trials_of


def test_a_trial_times_the_steps_after_the_warm_up_and_does_nothing_else(tmp_path: Path) -> None:
    comparison = small_comparison(tmp_path)
    comparison.common = {**COMMON, "eval": {"metric": "exact_match", "answer_pattern": "x"}}
    with comparison.claim("preparation") as claim:
        assert claim.take()
        found = trials_of(comparison, claim, FAKE)(comparison.methods[1], STEPS - WARM_UP)
    assert found == Trial((STEPS - WARM_UP) * PER_STEP, 2**30)
    config = yaml.safe_load((tmp_path / "trials" / "lora.yaml").read_text())
    assert config["train"] == {
        "max_steps": STEPS, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False,
        "logging_steps": 1, "learning_rate": 0.0, "seed": 0,
    }  # fmt: skip
    assert config["eval"] == {"metric": None, "answer_pattern": None, "before": False, "after": False}
    assert config["data"] == COMMON["data"]  # the same training data as in the runs
    assert not (tmp_path / "runs").exists()


def test_a_trial_that_fails_says_why_and_the_next_one_is_new(tmp_path: Path) -> None:
    comparison = small_comparison(tmp_path)
    with comparison.claim("preparation") as claim:
        assert claim.take()
        attempt = trials_of(comparison, claim, FAKE)
        with pytest.raises(TrialFailed, match="The training loss is nan"):
            attempt(comparison.methods[0].with_settings("train", weight_decay=13), STEPS)
        assert attempt(comparison.methods[0], STEPS - WARM_UP).peak == 2**30


@pytest.mark.parametrize(
    ("end", "out_of_memory"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", True),
        ("print('Error: Memory ran out. In this order, try: ...'); sys.exit(1)", True),
        ("sys.exit('torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.')", True),
        ("raise MemoryError", True),
        ("print('Error: A setting needs a package that is not installed: galore_torch'); sys.exit(1)", False),
        ("os.kill(os.getpid(), signal.SIGSEGV)", False),
    ],
)
def test_a_trial_that_fails_says_whether_memory_ran_out(tmp_path: Path, end: str, out_of_memory: bool) -> None:
    comparison = small_comparison(tmp_path)
    with comparison.claim("preparation") as claim:
        assert claim.take()
        attempt = trials_of(comparison, claim, (sys.executable, "-c", f"import os, signal, sys; {end}"))
        with pytest.raises(TrialFailed) as failed:
            attempt(comparison.methods[0], 1)
    assert failed.value.out_of_memory == out_of_memory


def test_a_trial_that_was_killed_while_its_bytes_were_added_up_ran_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run has finished by then. It ended in a FileNotFoundError."""
    comparison, end = small_comparison(tmp_path), "open('trials/paca/summary.json', 'w'); os.kill(os.getpid(), 9)"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(counted_memory, "PROGRAM", (sys.executable, "-c", f"import os; {end}"))
    with comparison.claim("preparation") as claim:
        assert claim.take()
        with pytest.raises(TrialFailed, match="killed by SIGKILL") as failed:
            trials_of(comparison, claim, count_memory=True)(comparison.methods[0], 1)
    assert failed.value.out_of_memory


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGTERM)", "sys.exit(130)"])
def test_a_trial_that_was_stopped_stops_the_comparison_as_ctrl_c_does(tmp_path: Path, end: str) -> None:
    """It ended in an IndexError."""
    comparison = small_comparison(tmp_path)
    with comparison.claim("preparation") as claim:
        assert claim.take()
        attempt = trials_of(comparison, claim, (sys.executable, "-c", f"import os, signal, sys; {end}"))
        with pytest.raises(KeyboardInterrupt):
            attempt(comparison.methods[0], 1)


def test_what_was_measured_is_kept_for_the_call_after_one_that_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = small_comparison(tmp_path)
    with comparison.claim("preparation") as claim:
        assert claim.take()
        method, none = comparison.methods[0], ("no-such-program",)
        found = trials_of(comparison, claim, FAKE, keep=True)(method, STEPS - WARM_UP)
        assert trials_of(comparison, claim, none, keep=True)(method, STEPS - WARM_UP) == found
        for again in (
            lambda: trials_of(comparison, claim, none)(method, STEPS - WARM_UP),
            lambda: trials_of(comparison, claim, none, keep=True)(method.with_rank(3), STEPS - WARM_UP),
        ):
            with pytest.raises(FileNotFoundError, match="no-such-program"):
                again()
        (comparison.path / "trials" / "made.json").write_text('{"damaged')
        assert trials_of(comparison, claim, FAKE, keep=True)(method, STEPS - WARM_UP).peak == found.peak
        for name in ("content_of", "versions"):  # of other data under the same names, by other libraries
            with monkeypatch.context() as patch:
                patch.setattr(trial, name, lambda *_: {"something": "else"})
                with pytest.raises(FileNotFoundError, match="no-such-program"):
                    trials_of(comparison, claim, none, keep=True)(method, STEPS - WARM_UP)
