"""The short form of `launches.py`: DDP and FSDP2 by their files in `recipes/launch`, two processes, against one.

DeepSpeed is no dependency of the tests: it runs where it is installed, all of it in the long form.
"""

from __future__ import annotations

import importlib.util

import pytest

from distributed.launches import ROOT, forked, from_file, verdict

VARIANTS = ("plain", "all at once", "collectives")


HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ZERO3 = pytest.param("deepspeed-zero3", marks=pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs DeepSpeed"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", ZERO3])
def test_two_processes_are_one_and_a_step_has_no_collective_of_pacas(kind, tmp_path):
    """ "all at once": odd numbers of rows, accumulation, clipping, checkpointing."""
    results = forked(kind, 2, tmp_path / "result", VARIANTS)
    assert {variant: verdict(kind, variant, results) for variant in VARIANTS} == dict.fromkeys(VARIANTS, "")


@pytest.mark.parametrize("file", sorted(path.stem for path in (ROOT / "recipes/launch").glob("*.yaml")))
def test_accelerates_launcher_takes_the_file(file, monkeypatch):
    import accelerate.commands.launch

    monkeypatch.setattr(accelerate.commands.launch, "is_deepspeed_available", lambda: True, raising=False)
    told = from_file(file, 4)
    stage = file.partition("zero")[2]
    assert told.get("ACCELERATE_USE_FSDP", "false") == str(file == "fsdp2").lower()
    assert told.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "") == stage
