"""The page of `paca runs`, and Trackio's own, in a real headless browser: `make browser`.

It installs playwright and Gradio, 250 MB that `make test` does not need. Without them these tests are skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from paca.pretrained.claims import Claim
from tiny_checkpoint import save_adapter, save_run
from training.chat_answers import chats
from training.tiny_run import save_workspace
from training.written_run import write_run

# A job in the background of a shell is started with Ctrl-C ignored, and so are its children.
CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
MAIN = f"{CTRL_C}from paca_command import main; main()"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WAIT = 120_000  # ms, at most
pytestmark = pytest.mark.slow(reason="drives a browser")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    how = "to run it: apt install chromium, make browser"
    for package in ("trackio", "gradio"):
        pytest.importorskip(package, reason=f"{package} is not installed; {how}")
    playwright = pytest.importorskip("playwright.sync_api", reason=f"playwright is not installed; {how}")
    if CHROMIUM is None:
        pytest.skip(f"there is no chromium here; {how}")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def served(command: list[str], folder: Path, address: Callable[[str], bool]) -> Iterator[tuple[str, Popen[str]]]:
    """A server as a process, until it is interrupted; gives the line that says where it is, and the process."""
    environment = os.environ | {"TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    process = Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert process.stdout is not None
    try:
        yield next(line for line in process.stdout if address(line)), process
    finally:
        process.send_signal(signal.SIGINT)
        print(process.communicate(timeout=60)[0])


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def choose(page: Any, side: str, choice: str) -> None:
    page.get_by_label(side, exact=True).click()
    option = page.get_by_role("option", name=choice, exact=True)
    option.click()
    option.wait_for(state="detached")  # the list is open for a moment longer, and the other one holds the same


def asked(page: Any) -> tuple[str, str]:
    """What both sides answer, in full."""
    from playwright.sync_api import expect

    note = page.get_by_label("Right note")
    note.evaluate("note => { note.value = '' }")  # of the prompt before
    page.get_by_label("Prompt").fill("Hello")
    page.get_by_role("button", name="Ask").click()
    expect(note).to_have_value(re.compile(r"^(?!.*\.\.\.$).+", re.DOTALL), timeout=WAIT)
    left, right = (page.locator(f"#{side}-answer textarea").input_value() for side in ("Left", "Right"))
    return left, right


def test_the_page_of_runs_shows_curves_of_one_that_is_going_and_answers_side_by_side(
    browser: Any, tmp_path: Path
) -> None:
    """Slow: a process that imports all of it, and a browser."""
    folder = tmp_path / "runs"
    going = write_run(folder / "going", steps=4)
    finished = {
        "choice": 1.0,
        "choice_stderr": 0.1,
        "samples": [{"question": "Is it?", "reference": "y", "answer": "n"}],
    }
    for name in ("other", "done"):
        write_run(folder / name, steps=7, scores={"after": finished})
    save_run(folder / "done")
    save_adapter(folder / "other" / "adapter", folder / "done" / "base", seed=2)
    port = free_port()
    command = [sys.executable, "-c", MAIN, "runs", str(folder), "--no-browser", "--port", str(port)]
    with (
        Claim(going / ".lock") as claim,
        served(command, tmp_path / "none", lambda line: "Ctrl-C" in line) as (line, server),
    ):
        assert claim.take()
        assert line.startswith(f"3 runs: http://127.0.0.1:{port}/paca/ ")
        page = browser.new_page(viewport={"width": 1500, "height": 1600})
        page.goto(line.split()[2])
        curves = page.frame_locator("iframe[title=Curves]")
        for curve in ("tokens_per_second", "peak_memory_gib", "choice_after"):
            curves.get_by_text(curve, exact=True).first.wait_for(timeout=WAIT)
        curves.get_by_role("button", name="Media & Tables").click()
        curves.get_by_text("Is it?").first.wait_for(timeout=WAIT)
        write_run(going, steps=9)
        last_step = curves.get_by_role("row", name="going").get_by_role("cell", name="9", exact=True)
        for _ in range(WAIT // 1000):  # the page is filled every two seconds, and this list when it is opened
            curves.get_by_role("button", name="Metrics", exact=True).click()
            curves.get_by_role("button", name="Runs", exact=True).click()
            curves.get_by_role("row", name="going").wait_for(timeout=WAIT)
            if last_step.count():
                break
            page.wait_for_timeout(1000)
        assert last_step.count() == 1

        page.get_by_role("tab", name="Answers").click()
        assert asked(page) == (chats(folder / "other"), chats(folder / "other", base=True))  # the newest, and its base
        choose(page, "Left", "done")
        choose(page, "Right", "going (still in training)")
        assert asked(page) == (chats(folder / "done"), "")
        assert "is still going" in page.get_by_label("Right note").input_value()
    assert server.returncode == 0
    assert not (tmp_path / "none").exists()  # the user's own Trackio


def test_trackios_page_shows_a_run_that_reports_to_it(browser: Any, tmp_path: Path) -> None:
    """Slow: a training, a server and a browser start."""
    config = save_workspace(tmp_path)
    settings = [
        "train.report_to=trackio",
        "train.run_name=reported",
        "train.max_steps=2",
        f"output.dir={tmp_path / 'run'}",
    ]
    command = [sys.executable, "-c", MAIN, "train", str(config), *(part for one in settings for part in ("--set", one))]
    folder = tmp_path / "trackio"
    subprocess.run(command, check=True, env=os.environ | {"TRACKIO_DIR": str(folder)}, timeout=600)
    show = [sys.executable, "-c", f"{CTRL_C}from trackio.cli import main; main()", "show", "--project", "paca"]
    with served([*show, "--host", "127.0.0.1"], folder, lambda line: "launched at" in line) as (line, _):
        page = browser.new_page(viewport={"width": 1500, "height": 1600})
        page.goto(line[line.index("http") :].split("\x1b")[0].strip())
        for text in ("reported", "tokens_per_second", "peak_memory_gib"):
            page.get_by_text(text, exact=True).first.wait_for(timeout=WAIT)
