"""Run many sequences: `python -m operation_sequences --sequences 2000`; the tests run some."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from operation_sequences.checks import COUNTS
from operation_sequences.interrupts_everywhere import interrupt_everywhere, operations
from operation_sequences.machine import machine
from operation_sequences.subjects import SUBJECTS

AT_ONCE = 25
"""Sequences of one kind from one seed."""


def run(kind: str, sequences: int, operations: int, number: int, compiled: float, *, shrink: bool = True) -> None:
    """Run `sequences` of up to `operations` operations on models of one kind; a share `compiled` of them compiled.

    Raises whatever a check raised, with the shortest sequence that does.
    """
    choices = [True] * round(10 * compiled) + [False] * (10 - round(10 * compiled))
    once = settings(
        max_examples=sequences,
        stateful_step_count=operations,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        report_multiple_bugs=False,
        print_blob=False,
    )
    run_state_machine_as_test(seed(number)(machine(kind, st.sampled_from(choices))), settings=once)


def sweep(step: int) -> list[str]:
    """Interrupt every operation at every `step`-th of its lines. Returns what was wrong."""
    failed = []
    for kind in ("words", "gpt-oss"):
        with tempfile.TemporaryDirectory() as folder:
            for name, operation in operations(SUBJECTS[kind], Path(folder)).items():
                for where, wrong in interrupt_everywhere(SUBJECTS[kind], name, operation, range(1, 10**6, step)):
                    COUNTS[f"lines interrupted: {name}"] += 1
                    if wrong:
                        failed.append(f"{kind}, {name}, interrupted at {where}: {wrong}")
                        print(failed[-1], flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="operation_sequences", description=__doc__)
    parser.add_argument("--sequences", type=int, default=2000, help="how many in all")
    parser.add_argument("--operations", type=int, default=20, help="the most in one sequence")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compiled", type=float, default=0.4, help="the share of Llamas and Words that is compiled")
    parser.add_argument("--kinds", nargs="*", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--ctrl-c", type=int, default=0, metavar="N", help="also interrupt at every Nth line")
    parser.add_argument("--counts", type=Path, help="a file for the counts, written as they grow")
    parser.add_argument("--no-shrink", action="store_true", help="show a failing sequence as it was found")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    failed, start, number = [], time.monotonic(), arguments.seed
    while COUNTS["sequences"] < arguments.sequences:
        for kind in arguments.kinds:
            share = arguments.compiled if kind in ("llama", "words") else 0.0
            try:
                run(kind, AT_ONCE, arguments.operations, number, share, shrink=not arguments.no_shrink)
            except Exception:
                traceback.print_exc()
                failed.append(f"{kind} with --seed {number}")
        number += 1
        print(
            f"{COUNTS['sequences']} sequences, {time.monotonic() - start:.0f} s, failed: {failed or 'none'}", flush=True
        )
        if arguments.counts:
            arguments.counts.write_text(json.dumps(dict(sorted(COUNTS.items())), indent=1) + "\n")
    if arguments.ctrl_c:
        failed += sweep(arguments.ctrl_c)
    for name, count in sorted(COUNTS.items()):
        print(f"{count:>9,}  {name}")
    print(f"seeds {arguments.seed} to {number - 1}; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
