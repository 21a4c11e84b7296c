"""What a judge says of answers to MT-Bench: a grade from 1 to 10 for each turn, asked over HTTP and kept."""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pandas as pd

from paca.evaluation.judge import Judge, Usage
from paca.evaluation.kept_lines import append, as_written, key_of, lines_of
from paca.evaluation.mt_bench_questions import Question
from paca.evaluation.sides import Watcher
from paca.evaluation.statistics import mean_with_error

_RATING = re.compile(r"\[\[([^\[\]]*)\]\]")
_NUMBER = re.compile(r"\s*\d+(?:\.\d+)?\s*")

_THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)

_SYSTEM = """\
You grade the answers of an AI assistant. Weigh whether an answer is correct, whether it does what the user asked, how \
useful and how clear it is. Length alone is no merit. First name the answer's strengths and weaknesses in a few \
sentences. Then end with your grade on a line of its own: a number from 1 (useless) to 10 (excellent) in double square \
brackets, for example: Grade: [[6]]"""

_REMINDER = "Your reply held no grade. Reply with the grade alone: a number from 1 to 10 in double square brackets."

_VERDICTS_ASKED = 3
"""How often a judge that names no grade is asked for one."""

_IN_PARALLEL = 4
"""Questions at a judge at a time."""


@dataclass(frozen=True)
class Rating:
    """The grade of one turn's answer; None where the judge would not name one."""

    question: int | str
    category: str
    turn: int
    """1 or 2."""
    score: float | None
    usage: Usage = field(default_factory=Usage)
    """What its verdicts took, whenever they were given; those without a grade too."""


def scores_of(ratings: list[Rating]) -> dict[str, Any]:
    """Means with standard errors, over questions: in all, by turn and by category; and how many have no grade."""
    table = pd.DataFrame(ratings)
    graded = table.dropna(subset="score").astype({"score": float})

    def mean(chosen: pd.DataFrame) -> dict[str, float | None]:
        if chosen.empty:
            return {"score": None, "stderr": None}
        # The turns of a question are no independent draws: a question counts once.
        value, error = mean_with_error(chosen.groupby("question", sort=False)["score"].mean().tolist())
        return {"score": value, "stderr": error}

    return {
        "all": mean(graded),
        "turns": {str(turn): mean(graded[graded["turn"] == turn]) for turn in sorted(table["turn"].unique())},
        "categories": {name: mean(graded[graded["category"] == name]) for name in table["category"].unique()},
        "without_grade": len(table) - len(graded),
    }


def differences(base: list[Rating], adapted: list[Rating]) -> list[Rating]:
    """By how much each grade of the second list is above the first one's for the same turn, as ratings; None where one
    of both has no grade."""
    found = []
    for before, one in zip(base, adapted, strict=True):  # both are in the order of the questions
        apart = None if one.score is None or before.score is None else one.score - before.score
        found.append(replace(one, score=apart, usage=Usage()))
    return found


def grade_in(verdict: str) -> float | None:
    """The grade that a verdict ends with, outside of its thoughts (`<think>`): what is in its last double brackets, a
    number from 1 to 10. Those before it may be of the scale, or of the instruction."""
    said = _THOUGHTS.sub("", verdict).rpartition("</think>")[2]  # some templates begin the thoughts themselves
    found = _RATING.findall(said)
    if not found or not _NUMBER.fullmatch(found[-1]):
        return None
    return grade if 1 <= (grade := float(found[-1])) <= 10 else None


def ratings_of(
    judge: Judge, side: str, questions: list[Question], answers: list[list[str]], output: Path, watcher: Watcher
) -> list[Rating]:
    """Have every turn's answer graded, and keep each verdict in `judgments-*.jsonl` as it comes.

    Args:
        judge: Whom to ask.
        side: Whose answers they are.
        questions: What was asked.
        answers: For each question, what was said turn by turn.
        output: The folder of verdicts; grades by the same judge of the same answers are not asked for again.
        watcher: Told how far it is.

    Raises:
        PacaError: The judge refuses or does not answer. Verdicts until then are kept.
    """
    wanted = [
        (question, turn, _prompt(question, answers[index], turn))
        for index, question in enumerate(questions)
        for turn in range(1, len(question.turns) + 1)
    ]
    keys, keys_before = (
        [key_of(judge.settings.model, url, json.dumps(prompt)) for _, _, prompt in wanted]
        for url in (judge.settings.endpoint, judge.settings.url)
    )
    today = dict(zip(keys_before, keys, strict=True))
    file = output / f"judgments-{side}.jsonl"
    kept: dict[str, dict[str, Any]] = {}
    spent: dict[str, Usage] = defaultdict(Usage)
    for key, row in _kept_rows(file, today):
        kept[key] = row
        with as_written(file):
            spent[key] += _usage(row)
    given = _grades_of_others(output, file, today)
    for (question, _, _), key in zip(wanted, keys, strict=True):
        if key in given and kept.get(key, {}).get("score", -1) == -1:  # the very same answer, and so the same grade
            own = {"question_id": question.id, "model": side, "prompt_key": key, "usage": asdict(Usage())}
            kept[key] = {**given[key], **own}
            append(file, kept[key])
    missing = [index for index, key in enumerate(keys) if kept.get(key, {}).get("score", -1) == -1]
    if missing:
        watcher.begin(side, f"answers judged by {judge.settings.model}", len(missing))
    for index, (verdict, score, usage) in _in_parallel(judge, {index: wanted[index][2] for index in missing}):
        (question, turn, prompt), key = wanted[index], keys[index]
        kept[key] = {
            "question_id": question.id,
            "model": side,
            "judge": [judge.settings.model, "paca-single-v1"],
            "user_prompt": prompt[-1]["content"],
            "judgment": verdict,
            "score": -1 if score is None else score,  # as FastChat writes what could not be read
            "turn": turn,
            "tstamp": time.time(),
            "prompt_key": key,
            "usage": asdict(usage),
        }
        append(file, kept[key])
        spent[key] += usage
        watcher.advance()
    with as_written(file):
        return [
            Rating(question.id, question.category, turn, _grade(kept[key]), spent.pop(key, Usage()))
            for (question, turn, _), key in zip(wanted, keys, strict=True)
        ]


def _kept_rows(file: Path, today: dict[str, str]) -> list[tuple[str, dict[str, Any]]]:
    """Verdicts that are kept, by their keys; `today` has these for the keys that earlier versions made, of the URL as
    it was written."""
    with as_written(file):
        return [(today.get(row["prompt_key"], row["prompt_key"]), row) for row in lines_of(file)]


def _grades_of_others(output: Path, own: Path, today: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Verdicts with a grade, on answers of other sides."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(set(output.glob("judgments-*.jsonl")) - {own}):
        with as_written(file):
            found |= {key: row for key, row in _kept_rows(file, today) if row["score"] != -1}
    return found


def _grade(row: dict[str, Any]) -> float | None:
    """Of a verdict that was kept."""
    score = float(row["score"])
    return None if score == -1 else score


def _usage(row: dict[str, Any]) -> Usage:
    return Usage(**{name: int(count) for name, count in row["usage"].items()})


Prompt = list[dict[str, str]]
Verdict = tuple[str, float | None, Usage]


def _in_parallel(judge: Judge, prompts: dict[int, Prompt]) -> Iterator[tuple[int, Verdict]]:
    """Ask a few at a time, and give each verdict as it comes.

    After a failure nothing more is asked, and what is on its way already is given too. The pool's threads end with the
    program: after Ctrl-C nobody waits for a judge that is still thinking.
    """

    def work(index: int) -> tuple[int, Verdict | BaseException | None]:
        try:
            return index, None if judge.stopped else _verdict(judge, prompts[index])
        except BaseException as error:
            return index, error

    failure: BaseException | None = None
    with ThreadPool(_IN_PARALLEL) as pool:
        try:
            for index, verdict in pool.imap_unordered(work, prompts):
                if isinstance(verdict, BaseException):
                    failure = failure or verdict
                    judge.stop()
                elif verdict is not None:
                    yield index, verdict
        except BaseException:
            judge.stop()
            raise
    if failure is not None:
        raise failure


def _verdict(judge: Judge, prompt: Prompt) -> Verdict:
    messages, used, verdict = list(prompt), Usage(), ""
    for _ in range(_VERDICTS_ASKED):
        verdict, usage, cut = judge.ask(messages)
        used += usage
        grade = None if cut else grade_in(verdict)
        if cut or grade is not None:
            return verdict, grade, used
        said = [{"role": "assistant", "content": verdict}, {"role": "user", "content": _REMINDER}] if verdict else []
        messages = [*prompt, *said]
    return verdict, None, used


def _prompt(question: Question, answers: list[str], turn: int) -> list[dict[str, str]]:
    parts = []
    for number in range(1, turn + 1):
        parts.append(f"<user turn={number}>\n{question.turns[number - 1]}\n</user>")
        if number <= len(question.references):
            parts.append(f"<reference turn={number}>\n{question.references[number - 1]}\n</reference>")
        parts.append(f"<assistant turn={number}>\n{answers[number - 1]}\n</assistant>")
    task = f"Grade the assistant's answer in turn {turn}."
    if turn > 1:
        task += " The turns before it are its context."
    if question.references[:turn]:
        task += " A reference is right; the assistant did not see it."
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": "\n\n".join([*parts, task])}]
