"""Made-up rows of runs, for what is said of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paca.comparison.method_result import MethodResult
from paca.comparison.results import ComparisonResult


def row(method: str, seed: int, score: float | None, **changed: Any) -> dict[str, Any]:
    """Of one run; a score of None is a run that failed."""
    failed = score is None
    config = {"model": {"name": "m"}, "data": {"train": "t", "eval": "e"}, "train": {"seed": seed}, "eval": {}}
    made: dict[str, Any] = {
        "name": f"{method}-lr0.001-seed{seed}",
        "method": method,
        "learning_rate": 1e-3,
        "seed": seed,
        "metric": "loss",
        "lower_is_better": True,
        "score": score,
        "score_stderr": None,
        "score_before": None if failed else 2.0,
        "loss": score,
        "loss_before": None if failed else 2.0,
        "steps": None if failed else 10,
        "tokens": None if failed else 1000,
        "tokens_per_second": None if failed else 50.0,
        "run_info": {"total_time": 30.0, "config": config, "error_msg": "out of memory" if failed else ""},
        "train_info": {
            "accelerator_memory_max": None if failed else 2**30,
            "train_time": None if failed else 20.0,
            "num_trainable_params": None if failed else 1000,
            "file_size": None if failed else 4000,
            "status": "failed" if failed else "success",
        },
        "meta_info": {"package_info": {"torch": "2"}, "system_info": {"cpu": "some"}, "git": None},
    }
    return {**made, **changed}


def result(scores: Mapping[str, Mapping[int, float | None]], **changed: Any) -> ComparisonResult:
    """Of methods with scores by seed."""
    methods = []
    for name, by_seed in scores.items():
        rows = [row(name, seed, score, **changed) for seed, score in by_seed.items()]
        methods.append(MethodResult(name, "r 8", 1e-3, [one for one in rows if one["score"] is not None], rows))
    return ComparisonResult(methods, [])
