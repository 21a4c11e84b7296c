"""A few steps of a method, in a process of its own, to see what they take: time and memory."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from paca.comparison import counted_memory
from paca.comparison.methods import Method
from paca.comparison.settings import Comparison, content_of, run_sections, write_config
from paca.comparison.training_process import PROGRAM, TrainingProcess, ran_out_of_memory
from paca.pretrained.claims import Claim
from paca.pretrained.whole_output import write_whole
from paca.training.folder.provenance import versions
from paca.training.folder.run_folder import RunFolder, read_record
from paca.training.reporting.metrics import read_rows

WARM_UP = 2
"""Steps that are not timed: the first ones also fill caches and make the optimizer's state."""

_NOTHING_BUT_STEPS = {
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "logging_steps": 1,
}


@dataclass(frozen=True)
class Trial:
    """What some steps of a method took."""

    seconds: float
    """For the steps after the warm-up, together."""
    peak: int
    """Bytes of the tensors, of the CUDA allocator, or of the whole process."""


class TrialFailed(Exception):
    """The steps could not be made; the text says why."""

    def __init__(self, why: str, *, out_of_memory: bool = False) -> None:
        """Args:
        why: In words.
        out_of_memory: Whether memory ran out, most likely; the method may fit in another size.
        """
        super().__init__(why)
        self.out_of_memory = out_of_memory


Try = Callable[[Method, int], Trial]
"""Makes so many steps of a method after the warm-up, on the same batches for every method; may raise `TrialFailed`, and
`KeyboardInterrupt` where it was stopped."""


def trials_of(
    comparison: Comparison,
    claim: Claim,
    program: Sequence[str] = PROGRAM,
    *,
    count_memory: bool = False,
    keep: bool = False,
) -> Try:
    """What makes trials in the comparison's folder.

    Args:
        comparison: Whose data and first seed they take.
        claim: On the folder's preparation.
        program: What runs `train CONFIG`.
        count_memory: Count the bytes of CPU tensors, which takes time: what the run itself knows there is the resident
            set, and that is never twice the same.
        keep: Keep what was found in the folder, and take it from there when the same is asked for again. Not for times,
            which are compared with those taken beside them.
    """
    known = _Known(comparison, count_memory=count_memory) if keep else None

    def run(method: Method, steps: int) -> Trial:
        folder = RunFolder(comparison.path / "trials" / method.name)
        shutil.rmtree(folder.path, ignore_errors=True)
        changed = {**_NOTHING_BUT_STEPS, "max_steps": WARM_UP + steps}
        sections = _only_steps(comparison, method.with_settings("train", **changed), folder)
        if known is not None and (trial := known.get(sections)) is not None:
            return trial
        config = write_config(folder.path.with_suffix(".yaml"), sections)
        process = TrainingProcess(config, folder, claim, counted_memory.PROGRAM if count_memory else program)
        try:
            while not process.ended(1):
                pass
        except KeyboardInterrupt:
            process.kill()
            raise
        if process.interrupted:
            raise KeyboardInterrupt
        # A process that counts may be killed after its run has finished.
        if not folder.finished() or (count_memory and not counted_memory.peak_file(config).is_file()):
            failure = process.failure()
            raise TrialFailed(failure["error_msg"], out_of_memory=ran_out_of_memory(failure))
        ends = [row["train_seconds"] for row in read_rows(folder.metrics) if "train_seconds" in row]
        peak = counted_memory.peak_of(config) if count_memory else folder.read_summary()["peak_memory_bytes"]
        trial = Trial(ends[-1] - ends[WARM_UP - 1], peak)
        if known is not None:
            known.add(sections, trial)
        return trial

    return run


class _Known:
    """Trials that were made before, also by a call that was stopped, in a file of the comparison."""

    def __init__(self, comparison: Comparison, *, count_memory: bool) -> None:
        device = "cpu" if count_memory or not torch.cuda.is_available() else torch.cuda.get_device_name()
        self.measured_by = ["the longest batch" if count_memory else False, device, versions()]
        self.path = comparison.path / "trials" / "made.json"
        self.content = content_of(comparison.common)  # of data and model: another one may lie under the same name
        self.found: dict[str, Any] = read_record(self.path)

    def get(self, sections: Mapping[str, Any]) -> Trial | None:
        """The trial by these sections of a config."""
        values = self.found.get(self._key(sections))
        return None if values is None else Trial(**values)

    def add(self, sections: Mapping[str, Any], trial: Trial) -> None:
        """Keep it."""
        self.found[self._key(sections)] = asdict(trial)
        write_whole(self.path, json.dumps(self.found, indent=2) + "\n")

    def _key(self, sections: Mapping[str, Any]) -> str:
        text = json.dumps([sections, self.content, self.measured_by], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _only_steps(comparison: Comparison, method: Method, folder: RunFolder) -> dict[str, dict[str, Any]]:
    no_rate = 0.0  # none is too high to be timed
    sections = run_sections(comparison.common, method, no_rate, comparison.seeds[0], folder.path)
    # Held-out data stays given: where it is split off, the training data is what is left.
    sections["eval"] = {**sections["eval"], "before": False, "after": False, "metric": None, "answer_pattern": None}
    return sections
