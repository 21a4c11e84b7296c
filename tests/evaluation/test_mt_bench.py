"""MT-Bench, judged over HTTP by a server on loopback: both turns, retries, kept verdicts, refusals."""

from __future__ import annotations

import contextlib
import json
import math
import re
import socket
import statistics
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import requests

from evaluation.judge_server import Body, JudgeServer, Reply, judging, verdict
from evaluation.tally import Tally
from paca.evaluation import judge as judge_module
from paca.evaluation.judge import Answer, Judge, Usage
from paca.evaluation.judge_settings import JudgeSettings
from paca.evaluation.kept_lines import key_of
from paca.evaluation.mt_bench import run_mt_bench
from paca.evaluation.mt_bench_questions import Question, read_questions
from paca.evaluation.mt_bench_ratings import Rating, differences, grade_in, ratings_of, scores_of
from paca.messages.errors import PacaError
from paca.pretrained.generation import LoadedModel, load_for_generation, stream_reply

pytestmark = pytest.mark.usefixtures("in_time")

QUESTIONS = [
    Question(1, "writing", ["Say a.", "Again."], []),
    Question(2, "maths", ["2+2?", "And 1 more?"], ["It is 4.", "It is 5."]),
    Question(3, "maths", ["Only this turn."], []),
]
HELLO = [{"role": "user", "content": "hello"}]
SHARED = Path("/work/shared/data/mt_bench_question.jsonl")


@pytest.fixture(scope="module")
def loaded(run_folder: Path) -> LoadedModel:
    return load_for_generation(run_folder)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What judges would have waited; nobody waits."""
    found: list[float] = []

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            found.append(timeout or 0.0)
            return self.is_set()

    monkeypatch.setattr(judge_module, "Event", Event)
    return found


def judge_of(server: JudgeServer, **settings: Any) -> Judge:
    return Judge(replace(JudgeSettings(server.url, "strict", timeout=30), **settings))


def graded(body: Body, number: int) -> Reply:
    """A grade that depends on the question and the turn alone, so that the order of requests does not matter."""
    asked = body["messages"][1]["content"]
    grade = 3 + asked.count("<user turn=") + 2 * ("Say a." in asked)
    return verdict(f"Fine.\nGrade: [[{grade}]]", {"prompt_tokens": 10, "completion_tokens": 2})


def test_the_judge_is_asked_by_openai_s_protocol() -> None:
    with judging(lambda body, number: verdict("yes", {"prompt_tokens": 7, "completion_tokens": 3})) as server:
        assert judge_of(server, key="secret").ask(HELLO) == Answer("yes", Usage(7, 3, 1))
        assert judge_of(server).ask(HELLO)[0] == "yes"
    (headers, body), (without_key, _) = server.requests
    assert headers["path"] == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert "Authorization" not in without_key
    assert (body["model"], body["messages"], body["temperature"]) == ("strict", HELLO, 0)


BAD_ONCE: dict[str, tuple[Reply, float]] = {
    "busy, says when": ((429, {"Retry-After": "7"}, b"slow down"), 7.0),
    "busy, says a date long gone": ((503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, b""), 0.0),
    "busy, asks for a day": ((429, {"Retry-After": "86400"}, b""), 120.0),
    "busy, says nonsense": ((429, {"Retry-After": "soon"}, b""), 1.0),
    "busy, says a date of no year": ((503, {"Retry-After": "Wed, 21 Oct 9999999999 07:28:00 GMT"}, b""), 1.0),
    "broken": ((500, {}, b"oops"), 1.0),
    "not JSON": ((200, {}, b"<html>"), 1.0),
    "no choices": ((200, {}, b'{"choices": []}'), 1.0),
    "a list": ((200, {}, b"[]"), 1.0),
    "cut short": ((200, {"Content-Length": "999"}, b'{"choices"'), 1.0),
    "hangs up": ((0, {}, b""), 1.0),
    "nested too deeply": ((200, {}, b"[" * 20_000), 1.0),
    "a number of 10,000 digits": ((200, {}, b'{"usage": ' + b"9" * 10_000 + b"}"), 1.0),
    "too long": ((200, {}, b" " * 2_000), 1.0),
    "elsewhere, at half an address": ((307, {"Location": "http://["}, b""), 1.0),
    "elsewhere, at a name without a label": ((302, {"Location": "http://.example.com/"}, b""), 1.0),
    "elsewhere, in bytes of no text": ((302, {"Location": "http://\xff/"}, b""), 1.0),
    "a chunk of less than no length": ((200, {"Transfer-Encoding": "chunked"}, b"-5\r\nabc\r\n0\r\n\r\n"), 1.0),
}


@pytest.mark.parametrize("case", BAD_ONCE)
def test_what_may_pass_is_tried_again(case: str, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "_LARGEST", 1_000 if case == "too long" else 2**20)
    bad, expected = BAD_ONCE[case]
    with judging(lambda body, number: bad if number == 1 else verdict("yes")) as server:
        assert judge_of(server).ask(HELLO) == Answer("yes", Usage(0, 0, 2))
    assert waits == [expected]


def test_waits_double_and_end(waits: list[float]) -> None:
    with judging(lambda body, number: (500, {}, b"down for\nnow")) as server:
        with pytest.raises(PacaError, match=r"not answer in 4 tries; the last time: HTTP 500 .*: down for now\. Ver"):
            judge_of(server, tries=4).ask(HELLO)
        assert len(server.requests) == 4
    assert waits == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(("said", "shown"), [(b"<html>\n<p>Hello", "<html> <p>Hello"), (b"", r"\(empty\)")])
def test_an_address_that_answers_with_a_page_is_told_which_one_is_expected(
    said: bytes, shown: str, waits: list[float]
) -> None:
    told = rf"in 2 tries; the last time: the answer was no JSON: {shown}\. --judge-url should be .* ends in /v1"
    with judging(lambda body, number: (200, {}, said)) as server, pytest.raises(PacaError, match=told):
        judge_of(server, tries=2).ask(HELLO)


@pytest.mark.parametrize("status", [429, 503, 529])
def test_a_busy_judge_is_waited_for_longer_than_one_that_fails(status: int, waits: list[float]) -> None:
    """Limits of requests a minute end within one; not every server says when."""
    with judging(lambda body, number: (status, {}, b"3 a minute") if number < 9 else verdict("yes")) as server:
        assert judge_of(server).ask(HELLO) == Answer("yes", Usage(0, 0, 9))
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, *4 * [60.0]]),
        ({"Retry-After": "0"}, [*5 * [0.0], 32.0, *5 * [60.0]]),
        ({"Retry-After": "86400"}, 3 * [120.0]),
    ],
)
def test_a_judge_that_stays_busy_is_given_up_after_five_minutes(
    headers: dict[str, str], expected: list[float], waits: list[float]
) -> None:
    told = rf"not answer in {len(expected) + 1} tries; the last time: HTTP 429"
    with judging(lambda body, number: (429, headers, b"")) as server, pytest.raises(PacaError, match=told):
        judge_of(server).ask(HELLO)
    assert waits == expected


def test_failures_of_a_judge_that_is_busy_between_them_are_counted(waits: list[float]) -> None:
    told = "not answer in 5 tries; the last time: HTTP 500"
    with (
        judging(lambda body, number: (500 if number % 2 else 429, {}, b"")) as server,
        pytest.raises(PacaError, match=told),
    ):
        judge_of(server, tries=3).ask(HELLO)


def test_an_answer_that_is_cut_off_is_asked_for_with_more_tokens() -> None:
    def reply(body: Body, number: int) -> Reply:
        reason = "length" if body["max_tokens"] < 4096 else "stop"
        return verdict("[[6]]", {"prompt_tokens": 7, "completion_tokens": 100}, reason)

    with judging(reply) as server:
        judge = judge_of(server)
        assert judge.ask(HELLO) == Answer("[[6]]", Usage(21, 300, 3))
        judge.ask(HELLO)
    assert [body["max_tokens"] for _, body in server.requests] == 2 * [1024, 2048, 4096]


def test_more_tokens_may_take_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found, post = [], requests.post

    def recorded(*arguments: Any, timeout: float, **others: Any) -> requests.Response:
        found.append(timeout)
        return post(*arguments, timeout=timeout, **others)

    monkeypatch.setattr(requests, "post", recorded)
    with judging(lambda body, number: verdict("yes", reason="length" if number == 1 else "stop")) as server:
        judge_of(server, timeout=60).ask(HELLO)
    assert found == [60, 120]


@pytest.mark.parametrize(
    "text", ["<think>\nI end with a line like Grade: [[6]]. The answer", "For example [[6]]", None]
)
def test_a_verdict_that_is_cut_off_however_many_tokens_it_has_is_no_grade(tmp_path: Path, text: str | None) -> None:
    with judging(lambda body, number: verdict(text, reason="length")) as server:
        ratings = ratings_of(judge_of(server), "base", QUESTIONS[2:], [["e"]], tmp_path, Tally())
    assert [rating.score for rating in ratings] == [None]
    assert [body["max_tokens"] for _, body in server.requests] == [1024, 2048, 4096, 8192]
    assert ratings[0].usage.requests == 4


@pytest.mark.parametrize("status", [400, 422])
def test_a_judge_that_has_no_room_for_more_tokens_gives_no_grade_and_ends_nothing(tmp_path: Path, status: int) -> None:
    def reply(body: Body, number: int) -> Reply:
        if body["max_tokens"] > 2048:
            return status, {}, b"max_tokens is too large"
        return verdict("[[6]]", reason="length" if "Only" in body["messages"][1]["content"] else "stop")

    with judging(reply) as server:
        judge, questions = judge_of(server), [QUESTIONS[2], replace(QUESTIONS[0], turns=["Say a."])]
        ratings = ratings_of(judge, "base", questions, [["e"], ["a"]], tmp_path, Tally())
    assert [rating.score for rating in ratings] == [None, 6]
    assert all("max_tokens" in body for _, body in server.requests)


def test_a_slow_judge_is_not_waited_for_beyond_the_timeout(waits: list[float]) -> None:
    answer_late = threading.Event()

    def reply(body: Body, number: int) -> Reply:
        if number == 1:
            answer_late.wait(10)
        return verdict("yes")

    with judging(reply) as server:
        try:
            assert judge_of(server, timeout=0.2).ask(HELLO) == Answer("yes", Usage(0, 0, 2))
        finally:
            answer_late.set()


def test_an_answer_that_trickles_in_ends_in_time_too(waits: list[float]) -> None:
    content = verdict("yes")[2]
    with judging(lambda body, number: (200, {"Pause": "0.01"} if number == 1 else {}, content)) as server:
        assert judge_of(server, timeout=0.3).ask(HELLO) == Answer("yes", Usage(0, 0, 2))
    assert waits == [1.0]


@pytest.mark.parametrize("start", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\nLong: "])
def test_an_answer_whose_text_never_begins_ends_in_time_too(start: bytes, waits: list[float]) -> None:
    """`requests` waits for it without an end."""
    gone = threading.Event()

    def trickle() -> None:
        connection, _ = server.accept()
        connection.recv(1 << 16)
        with connection, contextlib.suppress(OSError):
            connection.sendall(start)
            for _ in range(500):  # then it hangs up: a judge that waits for it fails, and does not wait for ever
                if gone.wait(0.02):
                    break
                connection.sendall(start if b"100" in start else b"a")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=trickle, daemon=True).start()
        settings = JudgeSettings(f"http://127.0.0.1:{server.getsockname()[1]}/v1", "strict", timeout=0.1, tries=1)
        with pytest.raises(PacaError, match=r"the answer did not begin in 0\.1 s\. Verdicts so far are kept"):
            Judge(settings).ask(HELLO)
        gone.set()


def test_half_a_character_of_a_judge_is_kept_as_none(tmp_path: Path) -> None:
    cut = b'{"choices": [{"message": {"content": "Fine \\ud83d [[6]]"}}]}'
    with judging(lambda body, number: (200, {}, cut)) as server:
        ratings = ratings_of(judge_of(server), "base", QUESTIONS[2:], [["e"]], tmp_path, Tally())
    assert [rating.score for rating in ratings] == [6]
    assert judgments(tmp_path)[0]["judgment"] == "Fine ? [[6]]"


def test_a_verdict_that_was_cut_within_a_character_is_asked_for_again(tmp_path: Path) -> None:
    with judging(graded) as server:
        judge = judge_of(server)
        ratings_of(judge, "base", QUESTIONS[2:], [["e"]], tmp_path, Tally())
        with (tmp_path / "judgments-base.jsonl").open("ab") as file:
            file.write('{"question_id": "é'.encode()[:-1])
        assert [rating.score for rating in ratings_of(judge, "base", QUESTIONS[2:], [["e"]], tmp_path, Tally())] == [4]
        assert len(server.requests) == 1


def test_a_judge_that_refuses_a_setting_is_asked_without_it(waits: list[float]) -> None:
    def reply(body: Body, number: int) -> Reply:
        refused = next((name for name in ("max_tokens", "temperature") if name in body), None)
        error = {"error": {"message": f"Unsupported parameter: '{refused}'.", "param": refused}}
        return verdict("yes") if refused is None else (400, {}, json.dumps(error).encode())

    with judging(reply) as server:
        judge = judge_of(server)
        assert judge.ask(HELLO) == Answer("yes", Usage(0, 0, 3))
        assert judge.ask(HELLO) == Answer("yes", Usage(0, 0, 1))  # it is remembered
    assert waits == []
    assert server.requests[-1][1]["max_completion_tokens"] > 1024


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "Fine.\n"}, {"type": "text", "text": "[[6]]"}], "Fine.\n[[6]]"),
        ([{"type": "thinking", "thinking": [{"text": "[[3]]"}]}, {"type": "text", "text": "[[6]]"}], "[[6]]"),
        ([{"type": "refusal", "refusal": "No."}], ""),
        ([], ""),
    ],
)
def test_an_answer_in_parts_is_their_text(content: list[Body], text: str, waits: list[float]) -> None:
    with judging(lambda body, number: verdict(content)) as server:
        assert judge_of(server).ask(HELLO) == Answer(text, Usage(0, 0, 1))


@pytest.mark.parametrize("content", [[{"type": "text", "text": 6}], ["[[6]]"], {"text": "[[6]]"}, 6])
def test_an_answer_of_no_text_and_no_parts_is_told(content: Any, waits: list[float]) -> None:
    told = f"content is {re.escape(repr(content))}; expected text"
    with judging(lambda body, number: verdict(content)) as server, pytest.raises(PacaError, match=told):
        judge_of(server, tries=1).ask(HELLO)


def test_an_answer_without_text_has_no_grade_and_ends_nothing(tmp_path: Path, waits: list[float]) -> None:
    def reply(body: Body, number: int) -> Reply:
        return verdict(None if "2+2" in body["messages"][1]["content"] else "[[7]]")

    with judging(reply) as server:
        answers = [["a", "b"], ["c", "d"], ["e"]]
        ratings = ratings_of(judge_of(server), "base", QUESTIONS, answers, tmp_path, Tally())
    assert [rating.score for rating in ratings] == [7, 7, None, None, 7]
    assert len(server.requests) == 3 + 2 * 3
    assert waits == []


def test_an_answer_without_a_grade_is_judged_again_by_the_next_call(tmp_path: Path) -> None:
    replies = iter(["no", "no", "no", "[[4]]"])
    with judging(lambda body, number: verdict(next(replies))) as server:
        for score, requests in ((None, 3), (4, 4), (4, 4)):
            ratings = ratings_of(judge_of(server), "base", QUESTIONS[2:], [["e"]], tmp_path, Tally())
            assert ([rating.score for rating in ratings], len(server.requests)) == ([score], requests)
            assert ratings[0].usage.requests == requests  # what came to nothing was paid for as well


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_final(status: int, waits: list[float]) -> None:
    with judging(lambda body, number: (status, {}, b'{"error": "no such key"}')) as server:
        with pytest.raises(PacaError, match=rf"refuses: HTTP {status} .*no such key"):
            judge_of(server).ask(HELLO)
        assert len(server.requests) == 1
    assert waits == []


FILTERED = {
    "azure": (400, "The response was filtered due to the prompt triggering our content management policy."),
    "by its code": (422, '{"error": {"code": "content_filter", "message": "temperature: no"}}'),
}


@pytest.mark.parametrize("case", FILTERED)
def test_a_question_that_a_filter_refuses_has_no_grade_and_harms_no_other(tmp_path: Path, case: str) -> None:
    """It blocked the whole evaluation, each time anew."""
    status, said = FILTERED[case]

    def reply(body: Body, number: int) -> Reply:
        assert body["temperature"] == 0
        return (status, {}, said.encode()) if "2+2" in body["messages"][1]["content"] else graded(body, number)

    with judging(reply) as server:
        ratings = ratings_of(judge_of(server), "base", QUESTIONS, [["a", "b"], ["4", "5"], ["c"]], tmp_path, Tally())
    assert [rating.score is None for rating in ratings] == [False, False, True, True, False]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_of_whoever_asks_is_final_whatever_it_says(status: int) -> None:
    with judging(lambda body, number: (status, {}, b"content_filter")) as server:
        with pytest.raises(PacaError, match=f"refuses: HTTP {status}"):
            judge_of(server).ask(HELLO)
        assert len(server.requests) == 1


def test_nobody_there_is_said(waits: list[float]) -> None:
    with judging(graded) as server:
        pass
    with pytest.raises(PacaError, match=r"did not answer in 2 tries; .*refused"):
        judge_of(server, tries=2).ask(HELLO)


def test_settings_of_a_judge_are_checked() -> None:
    for url in ("localhost:8000", "//host/v1", "http:///v1", "http://host:port/v1", "http://[/v1"):
        with pytest.raises(PacaError, match=f"--judge-url is {re.escape(repr(url))}; expected"):
            JudgeSettings(url, "m")
    with pytest.raises(PacaError, match="--judge-model is empty"):
        JudgeSettings("http://localhost:8000/v1", " ")


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("[[5]]", 5),
        ("[[3]], no, [[7.5]]", 7.5),
        ("Grade: [[ 8 ]]", 8),
        ("[[11]]", None),
        ("[[0]]", None),
        ("[5]", None),
        ("[[2]][[99]]", None),
        ("On the scale from [[1]] to [[10]]. Grade: [[11]]", None),
        ("The scale is e.g. [[6]]. Grade: [[0]]", None),
        ("[[10]] would be perfect. Grade: [[n/a]]", None),
        ("[[10]] would be perfect. Grade: [[-3]]", None),
        ("It never closes `if [[ -f x ]`. Grade: [[6]]", 6),
        ("[[1, 2], [3, 4] lacks a bracket. Grade: [[5]]", 5),
        ("<think>Say, Grade: [[6]]?\n[[7]].</think>\nGrade: [[3]]", 3),
        ("<think>Say, Grade: [[6]]?</think>\nIt is good.", None),
        ("<think>Say, Grade: [[6]]", None),
        ("Say, Grade: [[6]]?</think>\nIt is good.", None),
        ("Say, Grade: [[6]]?</think>\n[[4]]", 4),
        ("Grade: [[5]]\n<think>Or [[6]]?</think>", 5),
    ],
)
def test_the_last_grade_that_can_be_one_counts(text: str, grade: float | None) -> None:
    assert grade_in(text) == grade


def test_both_turns_of_base_and_adapter_are_answered_and_judged(loaded: LoadedModel, tmp_path: Path) -> None:
    with judging(graded) as server:
        results = run_mt_bench(loaded, QUESTIONS, judge_of(server), tmp_path, Tally(), max_new_tokens=5, batch_size=2)
    asked = [body["messages"][1]["content"] for _, body in server.requests]
    assert len(asked) == 2 * 5
    model = results["models"]["adapter"]
    # By turn: 3 + turn, and 2 more for the question that says "Say a.".
    assert model["turns"]["1"]["score"] == pytest.approx((6 + 4 + 4) / 3)
    assert model["turns"]["2"]["score"] == pytest.approx((7 + 5) / 2)
    assert model["categories"]["writing"] == {"score": 6.5, "stderr": None}
    assert model["all"]["score"] == pytest.approx((6.5 + 4.5 + 4) / 3)
    assert model["all"]["stderr"] == pytest.approx(statistics.stdev([6.5, 4.5, 4]) / math.sqrt(3))
    assert model["without_grade"] == 0
    assert results["judge"] == {
        "model": "strict",
        "url": server.url,
        "prompt_tokens": 100,
        "completion_tokens": 20,
        "requests": 10,
    }
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["difference"]["all"] == {"score": 0, "stderr": 0}  # the same grades


@pytest.mark.slow(reason="scores a model several times")
def test_answers_leave_room_for_the_second_turn_in_the_context(loaded: LoadedModel, tmp_path: Path) -> None:
    with judging(graded) as server:
        results = run_mt_bench(loaded, QUESTIONS[:1], judge_of(server), tmp_path / "default", Tally())
        assert (results["context"], results["max_new_tokens"], results["cut_questions"]) == (256, 64, 0)
        results = run_mt_bench(loaded, QUESTIONS, judge_of(server), tmp_path, Tally(), max_new_tokens=220)
    assert results["cut_questions"] >= 4  # of both sides: what came before the second turn has no room


def test_a_verdict_that_two_questions_share_is_paid_for_once(tmp_path: Path) -> None:
    twins = [QUESTIONS[2], replace(QUESTIONS[2], id="again")]
    with judging(graded) as server:
        ratings = ratings_of(judge_of(server), "base", twins, [["e"], ["e"]], tmp_path, Tally())
        assert sum(rating.usage.requests for rating in ratings) == len(server.requests)


def test_the_same_answer_of_base_and_adapter_has_one_grade(tmp_path: Path) -> None:
    """A judge that grades it otherwise the second time would make a difference of it."""
    with judging(lambda body, number: verdict(f"[[{4 + number}]]")) as server:
        base, adapter = (
            ratings_of(judge_of(server), side, QUESTIONS[2:3], [["e"]], tmp_path, Tally())
            for side in ("base", "adapter")
        )
        again = ratings_of(judge_of(server), "adapter", QUESTIONS[2:3], [["e"]], tmp_path, Tally())
    assert [rating.score for rating in (*base, *adapter, *again)] == [base[0].score] * 3
    assert len(server.requests) == base[0].usage.requests == 1
    assert adapter[0].usage.requests == 0
    (row,) = (tmp_path / "judgments-adapter.jsonl").read_text().splitlines()
    assert json.loads(row)["model"] == "adapter"


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("http://host/v1", ["http://host/v1/", "HTTP://Host/v1", "http://host:80/v1", "http://host:/v1//"]),
        ("https://me:Key@host/V1", ["https://me:Key@HOST:443/V1/"]),
        ("http://[::1]:8000", ["http://[::1]:8000/"]),
        ("https://host:80/v1", ["https://HOST:80/v1"]),
        ("http://[::80]", ["http://[::80]:80"]),
    ],
)
def test_the_same_endpoint_is_one_however_it_is_written(url: str, same: list[str]) -> None:
    assert {JudgeSettings(one, "m").endpoint for one in (url, *same)} == {url}


def test_other_endpoints_stay_apart() -> None:
    urls = [
        "http://h/v1",
        "https://h/v1",
        "http://h:443/v1",
        "http://h:8000/v1",
        "http://h/V1",
        "http://h",
        "http://a@h",
    ]
    assert [JudgeSettings(url, "m").endpoint for url in urls] == urls


def test_a_judge_whose_address_is_written_otherwise_is_not_paid_again(tmp_path: Path) -> None:
    with judging(graded) as server:
        urls = [server.url, server.url + "/", server.url.replace("http", "HTTP")]
        ratings = [
            ratings_of(judge_of(server, url=url), side, QUESTIONS[2:], [["e"]], tmp_path, Tally())
            for side in ("base", "adapter")
            for url in urls
        ]
    assert [rating.score for (rating,) in ratings] == [4] * 6
    assert len(server.requests) == 1


def test_verdicts_that_earlier_versions_kept_are_found(tmp_path: Path) -> None:
    """Their keys have the URL as it was written."""
    with judging(graded) as server:
        judge = judge_of(server, url=server.url + "/")
        (first,) = ratings_of(judge, "base", QUESTIONS[2:], [["e"]], tmp_path, Tally())
        file = tmp_path / "judgments-base.jsonl"
        row = json.loads(file.read_text())
        asked = json.dumps(server.requests[0][1]["messages"])
        file.write_text(json.dumps({**row, "prompt_key": key_of("strict", server.url + "/", asked)}) + "\n")
        assert ratings_of(judge, "base", QUESTIONS[2:], [["e"]], tmp_path, Tally()) == [first]
        (other,) = ratings_of(judge, "adapter", QUESTIONS[2:], [["e"]], tmp_path, Tally())
    assert (other.score, other.usage) == (first.score, Usage())
    assert json.loads((tmp_path / "judgments-adapter.jsonl").read_text())["prompt_key"] == row["prompt_key"]
    assert len(server.requests) == 1


def test_the_difference_is_that_of_pairs() -> None:
    def rated(*scores: float | None) -> list[Rating]:
        return [Rating(number // 2, "writing", 1 + number % 2, score) for number, score in enumerate(scores)]

    found = scores_of(differences(rated(3, 4, 5, 8, None, 2), rated(4, 6, 5, 7, 9, None)))
    assert found["all"]["score"] == pytest.approx((1.5 - 0.5) / 2)
    assert found["all"]["stderr"] == pytest.approx(statistics.stdev([1.5, -0.5]) / math.sqrt(2))
    assert found["turns"]["2"]["score"] == pytest.approx((2 - 1) / 2)
    assert found["without_grade"] == 2


def test_answers_are_the_model_s_own_and_the_second_turn_knows_the_first(loaded: LoadedModel, tmp_path: Path) -> None:
    with judging(graded) as server:
        run_mt_bench(loaded, QUESTIONS, judge_of(server), tmp_path, Tally(), max_new_tokens=5)
    [file] = tmp_path.glob("answers-adapter-*.jsonl")
    lines = map(json.loads, file.read_text().split("\n")[:-1])
    rows = {row["question_id"]: row["choices"][0]["turns"] for row in lines}
    first = "".join(stream_reply(loaded, [{"role": "user", "content": "Say a."}], max_new_tokens=5))
    conversation = [
        {"role": "user", "content": "Say a."},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Again."},
    ]
    assert rows[1] == [first, "".join(stream_reply(loaded, conversation, max_new_tokens=5))]
    [base] = tmp_path.glob("answers-base-*.jsonl")
    assert base.read_text() != file.read_text()
    seconds = [b["messages"][1]["content"] for _, b in server.requests if "turn 2" in b["messages"][1]["content"]]
    assert any(first in text and rows[1][1] in text for text in seconds)
    assert sum("It is 5." in text for text in seconds) == 2
    [judged] = tmp_path.glob("judgments-adapter.jsonl")
    row = json.loads(judged.read_text().split("\n")[0])
    assert {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"} <= row.keys()


def test_what_is_answered_and_judged_is_not_asked_again(loaded: LoadedModel, tmp_path: Path) -> None:
    with judging(graded) as server:
        first = run_mt_bench(loaded, QUESTIONS, judge_of(server), tmp_path, Tally(), max_new_tokens=5)
        tally = Tally()
        assert run_mt_bench(loaded, QUESTIONS, judge_of(server), tmp_path, tally, max_new_tokens=5) == first
        assert (tally.begun, len(server.requests)) == ([], 10)
        run_mt_bench(loaded, QUESTIONS, judge_of(server, model="other"), tmp_path, tally, max_new_tokens=5)
    assert tally.begun == [("base", 5), ("adapter", 5)]  # another judge's verdicts; the answers stay


def test_a_judge_that_fails_midway_loses_no_verdict(loaded: LoadedModel, tmp_path: Path, waits: list[float]) -> None:
    with judging(lambda body, number: graded(body, number) if number <= 6 else (401, {}, b"out of credit")) as server:
        with pytest.raises(PacaError, match="out of credit"):
            run_mt_bench(loaded, QUESTIONS, judge_of(server), tmp_path, Tally(), max_new_tokens=5)
        kept = judgments(tmp_path)
        assert len(kept) >= 5  # all of the base model's
        with (tmp_path / "judgments-base.jsonl").open("a") as file:
            file.write('{"cut short')
        server.reply = graded
        run_mt_bench(loaded, QUESTIONS, judge_of(server), tmp_path, Tally(), max_new_tokens=5)
    now = judgments(tmp_path)
    assert len(now) == len({row["prompt_key"] for row in now}) == 10
    assert all(row in now for row in kept)


def judgments(folder: Path) -> list[Body]:
    texts = [file.read_text() for file in sorted(folder.glob("judgments-*"))]
    return [json.loads(line) for text in texts for line in text.split("\n") if line]


def test_a_verdict_without_a_grade_is_asked_for_one_then_left_out(loaded: LoadedModel, tmp_path: Path) -> None:
    def reply(body: Body, number: int) -> Reply:
        if "Only this turn." in body["messages"][1]["content"]:
            return verdict("I like it.")
        return verdict("[[8]]") if len(body["messages"]) > 2 else verdict("Hm.")

    with judging(reply) as server:
        results = run_mt_bench(loaded, QUESTIONS, judge_of(server), tmp_path, Tally(), max_new_tokens=5)
    for model in results["models"].values():
        assert model["without_grade"] == 1
        assert model["all"]["score"] == 8.0
    assert len(server.requests) == 2 * (4 * 2 + 3)
    scores = [json.loads(line)["score"] for line in (tmp_path / "judgments-base.jsonl").read_text().split("\n") if line]
    assert sorted(scores) == [-1, 8, 8, 8, 8]


def test_counts_that_can_not_be_are_none(tmp_path: Path) -> None:
    with judging(lambda body, number: verdict("[[5]]", {"prompt_tokens": 10**4000, "completion_tokens": -1})) as server:
        assert judge_of(server).ask(HELLO) == Answer("[[5]]", Usage(0, 0, 1))


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_key": []},
        {"score": "best"},
        {"score": None},
        {"usage": {"prompt_tokens": "many"}},
        {"usage": {"stolen": 1}},
        {"usage": []},
    ],
)
def test_verdicts_that_somebody_else_kept_are_grades_or_an_error(tmp_path: Path, change: Body) -> None:
    arguments = "base", QUESTIONS[2:], [["a"]], tmp_path, Tally()
    with judging(graded) as server:
        first = ratings_of(judge_of(server), *arguments)
        assert ratings_of(judge_of(server), *arguments) == first
        file = tmp_path / "judgments-base.jsonl"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}) + "\n")
        with pytest.raises(PacaError, match=r"judgments-base\.jsonl is damaged: .* Remove it"):
            ratings_of(judge_of(server), *arguments)
        assert len(server.requests) == 1


def test_no_grade_at_all_is_no_score() -> None:
    scores = scores_of([Rating(1, "maths", 1, None)])
    assert scores["all"] == {"score": None, "stderr": None}
    assert scores["without_grade"] == 1


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question_id": 1, "turns": ["a"]}, "line 1: expected question_id, category and turns"),
        ({"question_id": 1, "category": "x", "turns": "a"}, "line 1: turns is 'a'; expected a list of texts"),
        ({"question_id": 1, "category": "x", "turns": []}, "line 1: turns is empty"),
        ({"question_id": [1], "category": "x", "turns": ["a"]}, "line 1: question_id must be a number or a text"),
        ({"question_id": None, "category": "x", "turns": ["a"]}, "line 1: question_id must be a number or a text"),
        ({"question_id": 1, "category": {}, "turns": ["a"]}, "line 1: .* and category a text"),
        ({"question_id": 1, "category": "x", "turns": ["a"], "reference": [1]}, "reference is "),
    ],
)
def test_a_broken_question_is_named(tmp_path: Path, row: Body, expected: str) -> None:
    file = tmp_path / "question.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(PacaError, match=expected):
        read_questions(file)
    with pytest.raises(PacaError, match="There is no file of questions"):
        read_questions(tmp_path / "missing.jsonl")


def test_a_limit_takes_questions_of_every_category(tmp_path: Path) -> None:
    file = tmp_path / "question.jsonl"
    rows = [{"question_id": n, "category": f"kind {n // 10}", "turns": ["a"]} for n in range(80)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [question.category for question in read_questions(file, 8)] == [f"kind {n}" for n in range(8)]
    assert read_questions(file, 80) == read_questions(file, 99) == read_questions(file)


@pytest.mark.skipif(not SHARED.is_file(), reason="the 80 questions are not part of the project")
def test_the_80_questions_of_mt_bench_are_read() -> None:
    questions = read_questions(SHARED)
    assert len(questions) == 80
    assert {len(question.turns) for question in questions} == {2}
    assert len({question.category for question in questions}) == 8
    assert any(question.references for question in questions)


def test_verdicts_that_are_on_their_way_when_a_judge_fails_are_kept(tmp_path: Path) -> None:
    begun, failed = threading.Event(), threading.Event()

    class Failing(Judge):
        def ask(self, messages: list[dict[str, str]]) -> Answer:
            if "2+2" in messages[1]["content"]:
                assert begun.wait(60)
                failed.set()
                raise PacaError("out of credit")
            if "Only" in messages[1]["content"]:
                begun.set()
                assert failed.wait(60)
            return Answer("[[5]]", Usage())

    questions = [Question(row.id, row.category, row.turns[:1], []) for row in QUESTIONS]
    judge = Failing(JudgeSettings("http://localhost:1/v1", "strict"))
    with pytest.raises(PacaError, match="out of credit"):
        ratings_of(judge, "base", questions, [["a"], ["b"], ["c"]], tmp_path, Tally())
    assert {row["question_id"] for row in judgments(tmp_path)} == {1, 3}


def test_a_question_that_leaves_no_room_for_an_answer_has_no_grade_and_harms_no_other() -> None:
    """A server's limit was taken for a setting that it does not know, and every later question was refused."""

    def reply(body: Body, number: int) -> Reply:
        asked = sum(len(message["content"]) for message in body["messages"])
        if asked + body["max_tokens"] > 4096:
            said = f"'max_tokens' or 'max_completion_tokens' is too large: {body['max_tokens']}. This model's maximum "
            return 400, {}, f"{said}context length is 4096 tokens and your request has {asked} input tokens.".encode()
        return verdict("Rating: [[7]]")

    with judging(reply) as server:
        judge = Judge(JudgeSettings(server.url, "judge"))
        said = [judge.ask([{"role": "user", "content": "x" * length}]).text for length in (100, 3500, 5000, 100)]
    assert said == ["Rating: [[7]]", "Rating: [[7]]", "", "Rating: [[7]]"]
    assert all("max_completion_tokens" not in body for _, body in server.requests)


@pytest.mark.parametrize(("key", "told"), [("x", "Max retries exceeded"), ("sk-0123456789", "with url (the key)/v1")])
def test_a_key_is_not_told_and_no_letter_of_a_message_is_taken_for_it(
    key: str, told: str, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local servers take any key, such as x."""
    error = requests.ConnectionError(f"Max retries exceeded with url {key}/v1")
    monkeypatch.setattr(requests, "post", Mock(side_effect=error))
    with pytest.raises(PacaError, match=re.escape(told)) as raised:
        Judge(JudgeSettings("http://127.0.0.1:9/v1", "strict", key=key, tries=1)).ask(HELLO)
    assert f" {key}/" not in str(raised.value)
