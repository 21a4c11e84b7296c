"""Where PaCA would wait for the host on an H100, or be slower than a tuned LoRA: simulated, nothing is measured.

    python benchmarks/plan_on_h100.py && python benchmarks/plan_on_page.py

Writes `benchmarks/plan_on_h100.csv`; `plan_on_page.py` makes the page of it. It takes some minutes and no device.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from peft import LoraConfig

from paca import PacaConfig
from paca.planning import Setting, estimate
from paca.planning.device_time import Efficiency, step_time
from paca.planning.devices import find_device
from paca.planning.operators import Operator
from paca.planning.target import outline_of

ROWS = Path(__file__).parent / "plan_on_h100.csv"
DEVICE = find_device("h100")
RANK = 16
CASES = (
    ("smollm2-135m", 1, 128),
    ("llama3-8b", 1, 128),
    ("llama3-8b", 8, 1024),
    ("llama3-8b", 1, 512),
    ("smollm2-135m", 8, 1024),
)
PACA = PacaConfig(r=RANK, paca_alpha=RANK, task_type="CAUSAL_LM")
LORA = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
_HOST = ("host_forward", "host_backward", "view", "listed")
SLOW_HOST = replace(Efficiency(), **{name: 2 * getattr(Efficiency(), name) for name in _HOST})
AGAINST = {"paca": "lora-tuned", "qpaca": "qlora"}
Operators = Mapping[Operator, int]


def without(operators: Operators, dropped: Callable[[Operator], bool]) -> Operators:
    return {operator: count for operator, count in operators.items() if not dropped(operator)}


def unpacks_scales(operator: Operator) -> bool:
    """Double quantization: scales are unpacked before each weight is."""
    return operator.name == "dequantize_blockwise"


def unpacks(operator: Operator) -> bool:
    return operator.name.startswith("dequantize")


def is_elementwise(operator: Operator) -> bool:
    """Neither a product nor attention nor an unpacking: what a compiler can fuse."""
    return operator.launches and operator.flops == 0 and not unpacks(operator) and operator.phase != "step"


def traced(model: str, batch: int, length: int, method: str) -> Operators:
    """The operators of a step; PEFT's defaults, but for `lora-tuned`."""
    setting = Setting(
        length,
        batch,
        quantization="nf4" if method.startswith("q") else None,
        autocast_adapter_dtype=method != "lora-tuned",
        device="cuda",
    )
    adapter = PACA if method.endswith("paca") else LORA
    return estimate(outline_of(model, "auto"), setting, adapter, timed=True).operators


def row_of(model: str, batch: int, length: int, method: str) -> dict[str, object]:
    operators, other = (traced(model, batch, length, name) for name in (method, AGAINST[method]))
    time = step_time(operators, DEVICE)
    slow = step_time(operators, DEVICE, SLOW_HOST)
    elementwise, unpacking = (
        time.device - step_time(without(operators, dropped), DEVICE).device for dropped in (is_elementwise, unpacks)
    )
    scales = step_time(without(operators, unpacks_scales), DEVICE)
    return {
        "model": model,
        "batch": batch,
        "length": length,
        "method": method,
        "ms": f"{1e3 * time.total:.1f}",
        "against": AGAINST[method],
        "ratio": f"{time.total / step_time(other, DEVICE).total:.3f}",
        "launches": launches(operators),
        "launches_against": launches(other),
        "launch_bound": f"{time.launch_bound:.3f}",
        "launch_bound_slow_host": f"{slow.launch_bound:.3f}",
        "elementwise": f"{elementwise / time.total:.3f}",
        "unpacking": f"{unpacking / time.total:.3f}",
        "plain_scales": f"{1 - scales.total / time.total:.3f}",
    }


def launches(operators: Operators) -> int:
    return sum(count for operator, count in operators.items() if operator.launches)


def read_rows() -> list[dict[str, str]]:
    """What is in the file."""
    if not ROWS.exists():
        return []
    with ROWS.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    for case in CASES:
        for method in AGAINST:
            rows: list[dict[str, object]] = [{**row} for row in read_rows()]
            if any(
                (row["model"], row["batch"], row["length"], row["method"]) == (*map(str, case), method) for row in rows
            ):
                continue  # delete the file to make them anew
            rows.append(row_of(*case, method))
            print(rows[-1], flush=True)
            with ROWS.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
