"""A whole run, in this process."""

from __future__ import annotations

import json

import pytest

from bench.tiny_bench import settings
from paca.bench.rows import Row
from paca.bench.run import run_benchmark
from paca.bench.settings import BenchSettings
from paca.messages.errors import PacaError


def test_every_method_asked_for_has_rows_or_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no bitsandbytes
    rows: list[Row] = []
    wanted = settings(
        methods=("frozen", "paca", "qlora"), rounds=3, warmup=1, measure=("time", "saved", "switch"), profile=True
    )
    run_benchmark(wanted, rows.extend, lambda line: None)
    assert [(r.method, r.status) for r in rows if r.metric == "method"] == [("qlora", "unavailable")]
    assert "bitsandbytes" in rows[0].note
    times = {r.method: r for r in rows if r.metric == "step_time"}
    assert list(times) == ["frozen", "paca"]
    assert all(len(r.samples) == 3 and r.baseline == "frozen" and r.seq == 16 for r in times.values())
    assert times["frozen"].ratio == 1.0
    ratios = sorted(p / f for p, f in zip(times["paca"].samples, times["frozen"].samples, strict=True))
    assert times["paca"].ratio == ratios[1]
    rates = {r.method: r for r in rows if r.metric == "throughput"}
    assert rates["paca"].samples == tuple(16 / seconds for seconds in times["paca"].samples)
    saved = {r.method: r for r in rows if r.metric == "saved_per_token_and_layer"}
    assert 1 < saved["paca"].ratio < 1.05
    switches = {r.method: r for r in rows if r.metric == "switch_time"}
    assert switches["frozen"].status == "unavailable"
    assert switches["paca"].status == "ok"
    assert {"phase: refresh", "kind: GEMM"} <= {r.metric for r in rows}
    assert len({r.run for r in rows}) == 1
    assert "torch" in json.loads(rows[0].versions)
    assert all(r.machine and r.date and r.command and r.threads for r in rows)
    assert times["paca"].trainable > 0


def test_a_baseline_that_is_not_measured_is_refused() -> None:
    with pytest.raises(PacaError, match="'frozen' is not among the methods"):
        run_benchmark(settings(methods=("paca", "lora")), print, print)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "bfloat"}, "Did you mean 'bfloat16'"),
        ({"measure": ("tim",)}, "Did you mean 'time'"),
        ({"scope": "layers"}, "model, blocks"),
        ({"seq": ()}, "empty"),
        ({"seq": (0,)}, "1 or more"),
        ({"seq": (1,)}, "2 or more"),
        ({"rounds": 0}, "1 or more"),
        ({"measure": ("max-seq",)}, "--memory"),
    ],
)
def test_wrong_settings_are_named(values: dict, message: str) -> None:
    with pytest.raises(PacaError, match=message):
        BenchSettings(**values)


def test_settings_survive_json() -> None:
    wanted = settings(measure=("max-seq",), memory=3 * 2**29)
    assert BenchSettings.from_dict(json.loads(json.dumps(wanted.to_dict()))) == wanted
