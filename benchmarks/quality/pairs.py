"""Pairs of answers for DPO (`python -m benchmarks.quality.pairs`): ARC's right option, and a wrong one by chance.

Reads what `benchmarks.quality.prepare` left; writes `.cache/quality/arc/pairs-train.jsonl` and `pairs-test.jsonl`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

FOLDER = Path(".cache/quality/arc")
HELD_OUT = 300


def main() -> None:
    """Write both files, the same each time."""
    chance = random.Random(0)
    for part in ("train", "test"):
        rows = [json.loads(line) for line in (FOLDER / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
        chance.shuffle(rows)
        with (FOLDER / f"pairs-{part}.jsonl").open("w", encoding="utf-8") as file:
            for row in rows if part == "train" else rows[:HELD_OUT]:
                rejected = chance.choice([option for option in row["options"] if option != row["answer"]])
                pair = {"question": row["question"], "chosen": row["answer"], "rejected": rejected}
                file.write(json.dumps(pair) + "\n")


if __name__ == "__main__":
    main()
