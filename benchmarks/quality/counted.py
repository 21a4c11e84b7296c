"""The bytes that the methods of the pages at equal memory take, counted again on their longest batch.

    python -m benchmarks.quality.counted [PAGE ...]     such as arc-memory; else all of them

A row for each setting of a method, into counted.csv: the most bytes that its tensors have at a time, weights included
(`paca.comparison.counted_memory`), in two steps of the run that its first row on the page describes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from paca.comparison import counted_memory

FOLDER = Path(__file__).parent
FILE = FOLDER / "counted.csv"
FEW = {"max_steps": 2, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}


def main(pages: list[str]) -> None:
    rows = [] if not FILE.is_file() else pd.read_csv(FILE).to_dict("records")
    known = {(row["page"], row["method"]) for row in rows}
    for path in sorted(FOLDER.glob("*-memory/runs.jsonl")):
        for line in path.read_text().splitlines():
            run = json.loads(line)
            page, method = path.parent.name, run["method"]
            if (pages and page not in pages) or (page, method) in known:
                continue
            known.add((page, method))
            rows.append({"page": page, "method": method, **counted(run["run_info"]["config"])})
            print(rows[-1], flush=True)
            pd.DataFrame(rows).sort_values(["page", "method"]).to_csv(FILE, index=False)


def counted(config: dict[str, Any]) -> dict[str, Any]:
    """What a run with this config takes, and the settings that it follows from."""
    train = config["train"] = {**config["train"], **FEW}
    config["eval"] = {"before": False, "after": False}
    adapter = config.get("paca") or config["lora"]
    with tempfile.TemporaryDirectory() as folder:
        config["output"] = {"dir": f"{folder}/run"}
        file = Path(folder, "config.yaml")
        file.write_text(yaml.safe_dump(config))
        subprocess.run([*counted_memory.PROGRAM, "train", file], check=True, stdout=subprocess.DEVNULL)
        found = counted_memory.peak_of(file)
    return {
        "r": adapter["r"],
        "batch": train["per_device_train_batch_size"],
        "accumulation": train["gradient_accumulation_steps"],
        "factor_rank": train.get("factor_rank"),
        "float32_adapter": train.get("autocast_adapter_dtype", True),
        "peak_bytes": found,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
