"""MT-Bench (Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", NeurIPS 2023): two-turn questions,
answered by a model and rated from 1 to 10 by a judge, each turn by itself.

The files are laid out as FastChat's: questions, answers and judgments, one JSON object a line. The judge's prompts are
paca's own, so ratings compare with each other, not with published ones.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paca.data.conversion import ORIGIN
from paca.evaluation.completions import completions
from paca.evaluation.encoding import question_of
from paca.evaluation.identity import identity
from paca.evaluation.judge import Judge, Usage
from paca.evaluation.kept_lines import KeptAnswers
from paca.evaluation.mt_bench_questions import Question
from paca.evaluation.mt_bench_ratings import differences, ratings_of, scores_of
from paca.evaluation.sides import BASE, Watcher, sides_of
from paca.messages.errors import PacaError
from paca.pretrained.context_length import context_length
from paca.pretrained.conversation import answering
from paca.pretrained.generation import LoadedModel
from paca.pretrained.whole_output import write_whole

_LONGEST = 1024
"""Tokens of an answer, where the model's context has room: FastChat's number."""


def run_mt_bench(
    loaded: LoadedModel,
    questions: list[Question],
    judge: Judge,
    output: Path,
    watcher: Watcher,
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Answer and judge, and write `answers-*.jsonl`, `judgments-*.jsonl` and `results.json`.

    Answers take the likeliest token each time, so that they can be repeated.

    Args:
        loaded: The model.
        questions: From `read_questions`.
        judge: Whom to ask.
        output: A folder; answers and verdicts of an earlier run in it are used.
        watcher: Told how far it is.
        max_new_tokens: Length at which an answer is cut; None for 1,024, or for a quarter of the model's context where
            that is less: the second turn has two answers and both questions in it.
        batch_size: Answers at a time.

    Returns:
        The content of `results.json`: `models` with their scores, their `difference` in pairs, what the judge took, and
            how many questions lost their beginning, `cut_questions`, where the context had no room.

    Raises:
        PacaError: The model cannot chat, or the judge does not answer.
    """
    if loaded.tokenizer.chat_template is None:
        raise PacaError("MT-Bench is a conversation, and this model's tokenizer has no chat template.")
    context = context_length(loaded.model)
    if max_new_tokens is None:
        max_new_tokens = _LONGEST if context is None else max(1, min(_LONGEST, context // 4))
    output.mkdir(parents=True, exist_ok=True)
    answers, cut = {}, 0
    for side in sides_of(loaded):
        with answering(loaded, base=side == BASE):
            answers[side], too_long = _answers(loaded, side, questions, output, watcher, max_new_tokens, batch_size)
            cut += too_long
    ratings = {side: ratings_of(judge, side, questions, said, output, watcher) for side, said in answers.items()}
    used = sum((rating.usage for of_side in ratings.values() for rating in of_side), Usage())
    compared = {"difference": scores_of(differences(*ratings.values()))} if len(ratings) == 2 else {}
    results = {
        "models": {side: scores_of(of_side) for side, of_side in ratings.items()},
        **compared,
        "questions": len(questions),
        "max_new_tokens": max_new_tokens,
        "context": context,
        "cut_questions": cut,
        "judge": {"model": judge.settings.model, "url": judge.settings.url, **asdict(used)},
    }
    write_whole(output / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    return results


def _answers(
    loaded: LoadedModel,
    side: str,
    questions: list[Question],
    output: Path,
    watcher: Watcher,
    max_new_tokens: int,
    batch_size: int,
) -> tuple[list[list[str]], int]:
    """What the model says to each question, turn by turn; each answer is kept as it comes. And how many questions lost
    their beginning."""
    name = f"answers-{side}-{identity(loaded, side)}-{max_new_tokens}.jsonl"
    kept = KeptAnswers(side, watcher, output / "answers" / name)
    talks: list[list[dict[str, str]]] = [[] for _ in questions]
    room, cut = (context_length(loaded.model) or math.inf) - max_new_tokens, 0
    for turn in range(max(len(question.turns) for question in questions)):
        going_on = [pair for pair in zip(questions, talks, strict=True) if turn < len(pair[0].turns)]
        for question, talk in going_on:
            talk.append({"role": "user", "content": question.turns[turn]})
        prompts = [question_of({"prompt": talk, ORIGIN: one.id}, loaded.tokenizer) for one, talk in going_on]
        cut += sum(len(prompt) > room for prompt in prompts)
        options: Any = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "kept": kept}
        texts = completions(loaded.model, loaded.tokenizer, prompts, **options)
        for (_, talk), text in zip(going_on, texts, strict=True):
            talk.append({"role": "assistant", "content": text})
    answers = [[message["content"] for message in talk[1::2]] for talk in talks]
    rows = [
        {"question_id": one.id, "model_id": side, "choices": [{"index": 0, "turns": turns}], "tstamp": time.time()}
        for one, turns in zip(questions, answers, strict=True)
    ]
    write_whole(output / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return answers, cut
