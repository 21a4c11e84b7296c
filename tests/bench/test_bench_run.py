"""A whole run, in this process."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pytest

from bench.row_maker import frame
from bench.tiny_bench import settings
from paca.bench import run
from paca.bench.rows import Row
from paca.bench.run import run_benchmark
from paca.bench.settings import BenchSettings
from paca.messages.errors import PacaError


@pytest.mark.slow(reason="starts the program anew")
def test_every_method_asked_for_has_rows_or_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no bitsandbytes
    wanted = settings(
        methods=("frozen", "paca", "qlora"),
        rounds=3,
        warmup=1,
        measure=("time", "saved", "switch", "launches"),
        profile=True,
        cuda_graphs=True,
    )
    found: list[Row] = []
    said: list[str] = []
    run_benchmark(wanted, found.extend, said.append)
    rows = frame(found)
    assert any("CUDA graphs need a CUDA device" in line for line in said)
    assert set(rows["variant"]) == {"eager"}
    (unavailable,) = of(rows, "method").values()
    assert (unavailable.method, unavailable.status) == ("qlora", "unavailable")
    assert "bitsandbytes" in unavailable.note
    times = of(rows, "step_time")
    assert list(times) == ["frozen", "paca"]
    assert all(len(row.samples) == 3 and row.baseline == "frozen" and row.seq == 16 for row in times.values())
    assert times["frozen"].ratio == 1.0
    ratios = sorted(p / f for p, f in zip(times["paca"].samples, times["frozen"].samples, strict=True))
    assert times["paca"].ratio == pytest.approx(ratios[1])
    rates = of(rows, "throughput")["paca"].samples
    assert rates == pytest.approx([16 / seconds for seconds in times["paca"].samples])
    assert 1 < of(rows, "saved_per_token_and_layer")["paca"].ratio < 1.05
    units = of(rows, "saved_units_per_layer")["paca"].median
    assert units == pytest.approx(of(rows, "saved_per_token_and_layer")["paca"].median / 192 / 2)
    switches = of(rows, "switch_time")
    assert (switches["frozen"].status, switches["paca"].status) == ("unavailable", "ok")
    assert 0.5 < of(rows, "launches_per_layer")["paca"].ratio < 4
    assert {"phase: optimizer", "kind: GEMM"} <= set(rows["metric"])
    assert rows["run"].nunique() == 1
    assert "torch" in json.loads(rows["versions"][0])
    assert (rows[["machine", "date", "command", "threads"]] != "").all(axis=None)
    assert times["paca"].trainable > 0


def of(rows: pd.DataFrame, metric: str) -> dict[str, Any]:
    return {row.method: row for row in rows[rows["metric"] == metric].itertuples()}


def test_without_frozen_ratios_are_to_the_first_method() -> None:
    found: list[Row] = []
    said: list[str] = []
    run_benchmark(settings(methods=("paca:r=2", "lora"), rounds=1, measure=("saved",)), found.extend, said.append)
    saved = of(frame(found), "saved")
    assert {row.baseline for row in saved.values()} == {"paca:r=2"}
    assert saved["paca:r=2"].ratio == 1
    assert saved["lora"].ratio > 1
    assert any("ratios are to paca:r=2, the first method" in line for line in said)


def test_a_baseline_that_is_not_measured_is_refused() -> None:
    with pytest.raises(PacaError, match="'frozen' is not among the methods"):
        run_benchmark(settings(methods=("paca", "lora"), baseline="frozen"), print, print)


@pytest.mark.parametrize("measure", ["saved", "switch"])
def test_whatever_one_method_throws_the_others_are_measured(measure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = {"saved": "measure_saved_activations", "switch": "time_switches"}[measure]
    original: Any = getattr(run, name)
    calls: list[int] = []

    def fails_once(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("no such luck")
        return original(*given)

    monkeypatch.setattr(run, name, fails_once)
    found: list[Row] = []
    run_benchmark(settings(methods=("paca", "lora", "frozen"), measure=(measure,)), found.extend, lambda line: None)
    rows = of(frame(found), {"saved": "saved", "switch": "switch_time"}[measure])
    assert (rows["paca"].status, rows["paca"].note) == ("failed", "ValueError: no such luck")
    assert rows["lora"].status == "ok"
    assert rows["frozen"].status == {"saved": "ok", "switch": "unavailable"}[measure]


def test_rows_before_an_interruption_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("paca.bench.run.measure_saved_activations", pressed)
    found: list[Row] = []
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(settings(methods=("frozen",), rounds=2, measure=("time", "saved")), found.extend, print)
    assert {row["metric"] for row in found} == {"step_time", "throughput"}


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
        ({"compile": True, "loss": "fused"}, "--loss logits"),
        ({"measure": ("max-seq",)}, "--memory"),
        ({"measure": ("time",), "memory": 2**30}, "--memory .* would change nothing for time"),
    ],
)
def test_wrong_settings_are_named(values: dict, message: str) -> None:
    with pytest.raises(PacaError, match=message):
        BenchSettings(**values)
