"""ARC for DPO and GRPO (`python -m benchmarks.quality.pairs`): the right option before a wrong one, and to be copied.

Reads what `benchmarks.quality.prepare` left; writes `.cache/quality/arc/pairs-train.jsonl` and `pairs-test.jsonl` for
DPO, `choose-train.jsonl` and `choose-test.jsonl` for GRPO: questions with their options, of four words at most.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

FOLDER = Path(".cache/quality/arc")
HELD_OUT = 300
ASKED = 48  # of the held-out questions for GRPO, whose answers are written anew in each evaluation
WORDS = 4


def main() -> None:
    """Write the files, the same each time."""
    chance = random.Random(0)
    for part in ("train", "test"):
        rows = [json.loads(line) for line in (FOLDER / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]
        chance.shuffle(rows)
        _write(f"pairs-{part}", [_pair(row, chance) for row in (rows if part == "train" else rows[:HELD_OUT])])
        short = [row for row in rows if all(len(option.split()) <= WORDS for option in row["options"])]
        _write(f"choose-{part}", [_choice(row) for row in (short if part == "train" else short[:ASKED])])


def _pair(row: dict[str, Any], chance: random.Random) -> dict[str, str]:
    rejected = chance.choice([option for option in row["options"] if option != row["answer"]])
    return {"question": row["question"], "chosen": row["answer"], "rejected": rejected}


def _choice(row: dict[str, Any]) -> dict[str, str]:
    options = "\n".join(f"- {option}" for option in row["options"])
    return {
        "question": f"{row['question']}\n{options}\nCopy the right line, and write nothing else.",
        "answer": row["answer"],
    }


def _write(name: str, rows: list[dict[str, str]]) -> None:
    with (FOLDER / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
