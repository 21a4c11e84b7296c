"""`paca chat` and `paca merge`, each run as a process."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from cli.paca_process import PACA, forked_paca
from paca.cli.chat import read_tools
from paca.cli.chat_beside import SideBySide
from paca.messages.errors import PacaError
from paca.pretrained.generation import load_for_generation, stream_reply
from tiny_checkpoint import byte_tokenizer, save_adapter, save_run
from training.chat_answers import chats


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A context so long that an answer in the terminal lasts until it is interrupted.
    return save_run(tmp_path_factory.mktemp("runs") / "tiny", context=100_000)


def expected_reply(run: Path, *turns: str, base: bool = False, system: str | None = None) -> str:
    loaded = load_for_generation(run / "base" if base else run)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for number, turn in enumerate(turns):
        messages.append({"role": "assistant" if number % 2 else "user", "content": turn})
    return "".join(stream_reply(loaded, messages, max_new_tokens=20))


def test_one_shot_prints_the_answer_alone(run: Path) -> None:
    answers = {}
    for base in (False, True):
        done = forked_paca("chat", run, "--prompt", "Hello", "--max-new-tokens", 20, *(["--base"] if base else []))
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert done.stdout == expected_reply(run, "Hello", base=base) + "\n"
        answers[base] = done.stdout
    assert answers[False] != answers[True]


def test_piped_turns_share_a_history_until_reset(run: Path) -> None:
    typed = "Hello\n\n/unknown\nAgain\n/reset\nAgain\n/exit\nnever asked\n"
    done = forked_paca("chat", run, "--system", "Be brief.", "--max-new-tokens", 20, typed=typed)
    assert done.returncode == 0, done.stderr
    first = expected_reply(run, "Hello", system="Be brief.")
    second = expected_reply(run, "Hello", first, "Again", system="Be brief.")
    fresh = expected_reply(run, "Again", system="Be brief.")
    assert second != fresh
    assert done.stdout == f"{first}\n{second}\n{fresh}\n"
    assert "No such command: /unknown" in done.stderr
    assert "New conversation." in done.stderr


@pytest.mark.slow(reason="starts the program anew")
def test_the_system_message_that_all_training_data_began_with_is_given(run: Path, tmp_path: Path) -> None:
    """A model that was trained below one and is asked without it answers as if it had hardly been trained."""
    own = shutil.copytree(run, tmp_path / "own")
    (own / "summary.json").write_text(json.dumps({"data": {"system": "Be brief."}}))
    asked = ("--prompt", "Hello", "--max-new-tokens", 20)
    told = "Asked with the system message of the training data ('Be brief.'). --system TEXT gives another one, "
    for base in (False, True):
        done = forked_paca("chat", own, *asked, *(["--base"] if base else []))
        assert done.stdout == expected_reply(run, "Hello", base=base, system="Be brief.") + "\n"
        assert done.stderr.startswith(told)
    for given in ("", "Shout."):
        done = forked_paca("chat", own, *asked, "--system", given)
        assert (done.stdout, done.stderr) == (expected_reply(run, "Hello", system=given or None) + "\n", "")
    done = forked_paca("chat", run, *asked, "--beside", own)
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"{own}: {told}--system '' none.\n"
    both = SideBySide(str(own), "base", None, Console(quiet=True), max_new_tokens=20)
    assert both.remarks == ["Both: Asked with the system message of the training data ('Be brief.')."]


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


@pytest.mark.slow(reason="starts the program anew")
def test_tools_are_told_to_the_model_and_what_they_say_is_answered(run: Path, tmp_path: Path) -> None:
    own = shutil.copytree(run, tmp_path / "own")
    template = own / "adapter" / "chat_template.jinja"
    template.write_text("{% if tools %}{{ tools | tojson }}{% endif %}" + template.read_text())
    (tmp_path / "tools.json").write_text(json.dumps({"tools": json.dumps(TOOLS)}))  # as in a record of data
    options = ("--tools", tmp_path / "tools.json", "--max-new-tokens", 20)
    done = forked_paca("chat", own, *options, typed="Hello\n/tool 7 degrees\n")
    assert done.returncode == 0, done.stderr
    assert "/tool TEXT answers a call" in done.stderr
    loaded = load_for_generation(own)
    messages = [{"role": "user", "content": "Hello"}]
    first = "".join(stream_reply(loaded, messages, max_new_tokens=20, tools=TOOLS))
    messages += [{"role": "assistant", "content": first}, {"role": "tool", "content": "7 degrees"}]
    second = "".join(stream_reply(loaded, messages, max_new_tokens=20, tools=TOOLS))
    assert done.stdout == f"{first}\n{second}\n"
    assert first != expected_reply(run, "Hello")
    unasked = forked_paca("chat", run, "--max-new-tokens", 20, typed="/tool 7 degrees\n")
    assert "No such command: /tool 7 degrees" in unasked.stderr
    beside = forked_paca("chat", own, *options, "--beside", "base", "--prompt", "Hello")
    assert beside.returncode == 0, beside.stderr
    for others in ((), ("--beside", "base")):
        done = forked_paca("chat", run, *options, "--prompt", "Hello", *others)
        assert done.returncode == 1
        assert "This model has a chat template that writes no tools, so it would not be told of --tools" in done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "can't be read as JSON: .*No such file"), ("{", "can't be read as JSON"), ("[]", "no list of definitions")],
)
def test_tools_that_are_none_are_refused(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "tools.json").write_text(content)
    with pytest.raises(PacaError, match=rf"--tools .*tools.json .*{said}"):
        read_tools(tmp_path / "tools.json")


def test_special_tokens_that_mark_a_call_are_shown_and_ends_are_not(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_for_generation(run)
    tokenizer = loaded.tokenizer
    tokenizer.chat_template = "{{ tools | tojson if tools }}" + str(tokenizer.chat_template)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    said = [start, *tokenizer("call", add_special_tokens=False)["input_ids"], end]
    tokenizer.bos_token = None  # which is <|im_start|>

    def generate(input_ids: torch.Tensor, streamer: Any, **options: Any) -> None:
        assert end in options["eos_token_id"]
        for token in (input_ids, *(torch.tensor([one]) for one in said)):
            streamer.put(token)
        streamer.end()

    monkeypatch.setattr(loaded.model, "generate", generate)
    asked = [{"role": "user", "content": "Hello"}]
    assert "".join(stream_reply(loaded, asked, tools=TOOLS)) == "<|im_start|>call"
    assert "".join(stream_reply(loaded, asked)) == "call"


def test_two_answer_side_by_side_and_share_their_base_model(run: Path, tmp_path: Path) -> None:
    other = save_adapter(tmp_path / "other", run / "base", seed=2)
    for beside, expected in ((str(other), chats(other, length=20)), ("base", chats(run, length=20, base=True))):
        console = Console(file=io.StringIO(), width=600, height=3)  # less than the answers take
        both = SideBySide(str(run), beside, None, console, max_new_tokens=20)
        both.ask("Hello")
        assert [history[1]["content"] for history in both.histories] == [chats(run, length=20), expected]
        assert expected != chats(run, length=20)
        shown: Any = console.file
        assert all(title.splitlines()[0] in shown.getvalue() for title in both.titles)
        assert shown.getvalue().endswith("┘\n")
        assert "…" not in shown.getvalue()
        assert len(both._models._held) == 1  # of what is in memory
    first = both.histories
    both.begin()
    both.ask("Hello")
    assert both.histories == first
    done = forked_paca("chat", run, "--beside", "base", "--base", "--prompt", "Hello")
    assert "Leave out --base and --base-model" in done.stderr
    done = forked_paca("chat", run, "--beside", "base", "--max-new-tokens", 4, typed="[b] Hello\nAgain\n")
    assert [line for line in done.stdout.splitlines() if line.startswith("> ")] == ["> [b] Hello", "> Again"]


class Terminal:
    """A pseudo-terminal with a process in it."""

    def __init__(self, *arguments: object) -> None:
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job, such as a CI run, ignores it
            os.execv(PACA[0], [*PACA, *map(str, arguments)])
        self.shown = b""

    def wait_for(self, text: bytes, seconds: float = 240) -> bytes:
        """What appeared up to `text`, which is taken away."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            ready, _, _ = select.select([self.file], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not appear within {seconds} s; there is {self.shown!r}"
            try:
                self.shown += os.read(self.file, 65536)
            except OSError as error:  # the process is gone
                raise AssertionError(f"ended without {text!r}; there is {self.shown!r}") from error
        before, _, self.shown = self.shown.partition(text)
        return before

    def wait_for_output(self, count: int) -> None:
        """Until `count` bytes are there that nothing waited for."""
        while len(self.shown) < count:
            assert select.select([self.file], [], [], 240)[0], f"there is only {self.shown!r}"
            self.shown += os.read(self.file, 65536)

    def type(self, keys: bytes) -> None:
        os.write(self.file, keys)

    def interrupt_until(self, text: bytes) -> None:
        """Press Ctrl-C, as often as a person would: readline loses a signal that comes just after its prompt."""
        for _ in range(12):
            self.type(b"\x03")
            deadline = time.monotonic() + 10
            while text not in self.shown and select.select([self.file], [], [], max(0, deadline - time.monotonic()))[0]:
                self.shown += os.read(self.file, 65536)
            if text in self.shown:
                break
        self.wait_for(text, 0)

    def exit_status(self) -> int:
        try:
            while os.read(self.file, 65536):
                pass
        except OSError:  # how Linux reports the end of a pseudo-terminal
            pass
        os.close(self.file)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.slow(reason="starts the program anew")
def test_ctrl_c_stops_an_answer_and_ctrl_d_ends_the_session(run: Path) -> None:
    terminal = Terminal("chat", run, "--max-new-tokens", 90_000)
    shown = re.sub(r"\x1b\[[?\d]*[a-zA-Z]", "", terminal.wait_for(b"Ctrl-D").decode())
    # It is started from nothing: no library writes a line of its own while it is imported.
    shown = re.sub(r"[\u2800-\u28ff] Loading libraries \.\.\.\s+", "", shown)
    assert shown == f"{run / 'base'} with {run / 'adapter'}\r\n/reset starts a new conversation, /exit (or "
    terminal.wait_for(b"> ")
    terminal.type(b"Hello\n")
    terminal.wait_for(b"Hello\r\n")
    terminal.wait_for_output(100)  # more than readline's control sequences: the answer has begun
    terminal.interrupt_until(b"(stopped)")
    terminal.wait_for(b"> ")
    terminal.interrupt_until(b"Ctrl-D or /exit ends.")
    terminal.wait_for(b"> ")
    terminal.type(b"\x04")
    assert terminal.exit_status() == 0


def test_merge_writes_a_checkpoint_and_says_so(run: Path, tmp_path: Path) -> None:
    done = forked_paca("merge", run, "--output", tmp_path / "merged", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert str(tmp_path / "merged") in done.stdout
    assert "compared with the adapted model: the logits" in done.stdout
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    assert load_for_generation(tmp_path / "merged").tokenizer.chat_template == byte_tokenizer().chat_template


def test_wrong_input_is_one_message_and_a_failure(run: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("x")
    for arguments, message in (
        (["chat", tmp_path / "nowhere"], "No such folder"),
        (["merge", run, "--output", tmp_path / "taken"], "not empty"),
    ):
        done = forked_paca(*arguments)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
