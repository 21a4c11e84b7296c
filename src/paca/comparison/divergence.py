"""Training that diverged: a failure that says something of its rate, as others do not."""

from __future__ import annotations

import re

from paca.comparison.rows import Row

_SAID = re.compile(
    r"training loss is (nan|-?inf) at step|weights are not finite after step"  # `paca.training.finite_loss`
    r"|model's output is NaN"  # `paca.evaluation.log_likelihood`, by weights whose last losses were finite
    r"|probability tensor contains either `inf`, `nan`"  # torch, where grpo draws words from such an output
)


def diverged(row: Row) -> bool:
    """Whether a run without a score came to what is not finite: made again, it would do so again.

    One that ended has a score that is not finite; of one that failed, its last words tell.
    """
    ended = row["train_info"]["status"] == "success"
    return row["score"] is None and (ended or _SAID.search(row["run_info"]["error_msg"]) is not None)
