"""Compare simulated steps (`paca plan --on`) with published measurements; `plan_on_page.py` makes the page of them.

    python benchmarks/plan_on.py && python benchmarks/plan_on_page.py

The published numbers are in `benchmarks/plan_on.csv`; nothing is measured here, and no device is needed. It takes some
minutes. What was simulated goes into `benchmarks/plan_on_simulated.csv`, which the tests read.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, MissConfig
from torch import nn

import paca
from paca.planning import MemoryEstimate, Setting, estimate
from paca.planning.device_time import step_time
from paca.planning.devices import find_device
from paca.planning.memory_estimate import prepare_model
from paca.planning.target import outline_of

HERE = Path(__file__).parent
PUBLISHED, SIMULATED = HERE / "plan_on.csv", HERE / "plan_on_simulated.csv"
TIME_WITHIN, MEMORY_WITHIN = 0.15, 0.10
DROPOUT = " with dropout"
ALL: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Row:
    """One published number."""

    source: str
    device: str
    model: str
    method: str
    rank: int
    batch: int
    """0 where it is what was searched."""
    length: int
    quantity: str
    published: float
    use: str
    """`"fitted"`, if the parameters of `Efficiency` were chosen with it, or `"held out"`."""

    @property
    def is_memory(self) -> bool:
        """Whether it says something about memory, rather than time."""
        return self.quantity.startswith(("GiB", "largest batch", "longest sequence"))


def published() -> list[Row]:
    """The rows of `plan_on.csv`."""
    with PUBLISHED.open(encoding="utf-8") as file:
        return [
            Row(**{**row, **{name: int(row[name] or 0) for name in ("rank", "batch", "length")},
                   "published": float(row["published"])})
            for row in csv.DictReader(file)
        ]  # fmt: skip


def error(row: Row, simulated: float) -> float:
    """Of the simulation: 0.1 is 10 % too much."""
    return simulated / row.published - 1


def within(row: Row, simulated: float) -> bool:
    """Whether it is as near as is asked for."""
    return abs(error(row, simulated)) <= (MEMORY_WITHIN if row.is_memory else TIME_WITHIN)


def simulated_of(row: Row) -> float:
    """The number that the simulation gives in place of the published one."""
    reached: dict[str, Callable[[Row], float]] = {
        "ms": lambda row: 1e3 * seconds(row),
        "s per 5000 steps": lambda row: 5000 * seconds(row),
        "GiB": lambda row: planned(row.model, row.method, row.rank, row.batch, row.length).total / 2**30,
        "largest batch": lambda row: largest_batch(row, row.method),
        "time against LoRA": lambda row: seconds(row) / seconds(row, baseline(row)),
        "throughput against LoRA": lambda row: throughput(row, row.method) / throughput(row, baseline(row)),
        "longest sequence against LoRA": lambda row: longest(row, row.method) / longest(row, baseline(row)),
    }
    return reached[row.quantity.removesuffix(DROPOUT)](row)


def baseline(row: Row) -> str:
    """The LoRA that a row compares with: the paper does not say which it was."""
    return "lora-dropout" if row.quantity.endswith(DROPOUT) else "lora-tuned"


def seconds(row: Row, method: str | None = None, batch: int | None = None) -> float:
    step = planned(row.model, method or row.method, row.rank, batch or row.batch, row.length)
    return step_time(step.operators, find_device(row.device)).total


def largest_batch(row: Row, method: str) -> int:
    """Of sequences of `row.length` that fit. Memory is linear in it, so two plans say it."""
    low, high = (planned(row.model, method, row.rank, batch, row.length).total for batch in (4, 8))
    return int(8 + (find_device(row.device).usable - high) // ((high - low) / 4))


def throughput(row: Row, method: str) -> float:
    """Sequences per second at the largest batch that fits."""
    batch = largest_batch(row, method)
    return batch / seconds(row, method, batch)


def longest(row: Row, method: str) -> float:
    """Tokens of one sequence that fits, without a mask: with one, memory grows with the square."""
    low, high = (planned(row.model, method, row.rank, 1, length, padded=False).total for length in (4096, 8192))
    return 8192 + (find_device(row.device).usable - high) / ((high - low) / 4096)


@functools.cache
def planned(model: str, method: str, rank: int, batch: int, length: int, padded: bool = True) -> MemoryEstimate:
    """The traced step. A100: DeepSpeed keeps all in bfloat16, adapters included; L40S: PEFT's defaults."""
    setting = Setting(
        sequence_length=length,
        batch_size=batch,
        chunked_loss=False,
        padded=padded,
        autocast_adapter_dtype=method.endswith("-qv"),
        optimizer="adamw_torch",
        device="cuda",
    )
    outline = outline_of(model, "auto")
    config, change = METHODS[method]
    if config is None:
        return estimate(outline, setting, None, timed=True)
    adapted = prepare_model(outline, config(rank), autocast_adapter_dtype=setting.autocast_adapter_dtype)
    change(adapted)
    return estimate(adapted, setting, timed=True)


def _as_it_is(model: nn.Module) -> None:
    pass


def _mixed(model: nn.Module) -> None:
    """MosLoRA, which PEFT does not have: a trained `(r, r)` matrix between A and B."""
    for layer in _lora_layers(model):
        b = layer.lora_B["default"]
        with torch.device("meta"):
            mixer = nn.Linear(b.in_features, b.in_features, bias=False, dtype=b.weight.dtype)
        layer.lora_B["default"] = nn.Sequential(mixer, b)


def _multiplies_twice(model: nn.Module) -> None:
    """DoRA as in PEFT of 2024, which multiplied with the weight a second time: now only with a dropout."""
    for layer in _lora_layers(model):
        layer.lora_dropout["default"] = nn.Sequential()


def _lora_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_B") and "default" in module.lora_B]


METHODS: dict[str, tuple[Any, Callable[[nn.Module], None]]] = {
    "paca-random": (lambda r: paca.PacaConfig(r=r, selection="random", task_type="CAUSAL_LM"), _as_it_is),
    "lora-tuned": (lambda r: LoraConfig(r=r, **ALL), _as_it_is),
    # LMFlow's default, which the paper's training runs have; the authors' log was made without.
    "lora-dropout": (lambda r: LoraConfig(r=r, lora_dropout=0.1, **ALL), _as_it_is),
    "moslora": (lambda r: LoraConfig(r=r, **ALL), _mixed),
    "dora-2024": (lambda r: LoraConfig(r=r, use_dora=True, **ALL), _multiplies_twice),
    "lora-qv": (lambda r: LoraConfig(r=r, **QV), _as_it_is),
    "dora-qv": (lambda r: LoraConfig(r=r, use_dora=True, **QV), _as_it_is),
    "miss-qv": (lambda r: MissConfig(r=r, **QV), _as_it_is),
    "full": (None, _as_it_is),
}


def table(simulated: list[float]) -> list[str]:
    """The lines of the page's table, whose errors are computed here and nowhere else.

    A line has what differs in the batch alone, or in the method alone.
    """
    lines = ["| source, device | what | published | simulated | error, % |", "| --- | --- | --- | --- | --- |"]
    source = ""
    for group in _groups([*zip(published(), simulated, strict=True)]):
        row = group[0][0]
        of = f"{row.source}, {row.device}"
        cells = [", ".join(cell(*pair) for pair in group) for cell in (_published, _simulated, _error)]
        what = _what([row for row, _ in group])
        lines.append(f"| {' | '.join(['' if of == source else of, what, *cells])} |")
        source = of
    return lines


def _groups(pairs: list[tuple[Row, float]]) -> list[list[tuple[Row, float]]]:
    sources = [*dict.fromkeys(row.source for row, _ in pairs)]
    groups: list[list[tuple[Row, float]]] = []
    for pair in sorted(pairs, key=lambda pair: sources.index(pair[0].source)):
        if groups and _one_line([row for row, _ in [*groups[-1], pair]]):
            groups[-1].append(pair)
        else:
            groups.append([pair])
    return groups


def _one_line(rows: list[Row]) -> bool:
    one_quantity = len({(row.source, row.length, row.quantity.removesuffix(DROPOUT)) for row in rows}) == 1
    return one_quantity and (len({row.method for row in rows}) == 1 or len({row.batch for row in rows}) == 1)


def _what(rows: list[Row]) -> str:
    methods = dict.fromkeys(f"`{row.method}`" + (f" r {row.rank}" if row.rank else "") for row in rows)
    batches = ", ".join(dict.fromkeys(str(row.batch) for row in rows if row.batch))
    size = " × ".join(filter(None, (batches, str(rows[0].length)))) if rows[0].length else "one sequence"
    quantity = rows[0].quantity + (", then" + DROPOUT if rows[-1].quantity.endswith(DROPOUT) else "")
    return f"{quantity}; {size}: {', '.join(methods)}"


def _published(row: Row, _: float) -> str:
    return f"{row.published:g}"


def _simulated(_: Row, number: float) -> str:
    return f"{number:.4g}"


def _error(row: Row, number: float) -> str:
    """In percent: bold where it is off, in italics where the row was fitted."""
    mark = "" if within(row, number) else "**"
    text = f"{mark}{100 * error(row, number):+.0f}{mark}"
    return f"*{text}*" if row.use == "fitted" else text


def read_simulated() -> list[float]:
    """What the last run of this script got, in the order of `published`."""
    with SIMULATED.open(encoding="utf-8") as file:
        return [float(row["simulated"]) for row in csv.DictReader(file)]


def main() -> None:
    rows = published()
    numbers = []
    for row in rows:
        numbers.append(float(f"{simulated_of(row):.5g}"))
        print(row.source, row.method, row.batch, row.quantity, row.published, numbers[-1], flush=True)
    with SIMULATED.open("w", encoding="utf-8", newline="") as file:
        names = ["source", "device", "model", "method", "rank", "batch", "length", "quantity", "published"]
        writer = csv.DictWriter(file, [*names, "simulated"], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**asdict(row), "simulated": number} for row, number in zip(rows, numbers, strict=True))


if __name__ == "__main__":
    main()
