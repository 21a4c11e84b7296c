"""`paca chat`: talk to a trained model in a terminal."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paca.cli.starting import import_libraries
from paca.messages.errors import PacaError
from paca.messages.nearest import nearest
from paca.messages.shown import printable, without_controls
from paca.pretrained.adapter_folder import find_adapter

if TYPE_CHECKING:
    from paca.cli.chat_beside import SideBySide
    from paca.pretrained.generation import LoadedModel, Message

HELP = "/reset starts a new conversation, /exit (or Ctrl-D) ends, Ctrl-C stops an answer."
SYSTEM_HELP = "--system TEXT gives another one, --system '' none."
TOOLS_HELP = "/tool TEXT answers a call: TEXT is what the tool says."


def chat(
    path: Annotated[
        str, typer.Argument(metavar="RUN_OR_ADAPTER", help="Folder of a run, an adapter or a model; or hub id.")
    ],
    prompt: Annotated[str | None, typer.Option(help="Answer this once, on standard output, and stop.")] = None,
    system: Annotated[
        str | None,
        typer.Option(
            help="The system message of each conversation; '' for none.",
            show_default="the one that all training data began with, if any",
        ),
    ] = None,
    tools: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What the model may call: a JSON list of definitions, as OpenAI's."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="Above 0: sample. At 0: the likeliest token each time.")] = 0.0,
    base: Annotated[bool, typer.Option("--base", help="Answer without the adapter, for comparison.")] = False,
    beside: Annotated[
        str | None,
        typer.Option(
            metavar="RUN_OR_ADAPTER|base",
            help="Also show the answers of this one (folder or hub id) side by side. base: without the adapter.",
        ),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The base model: a folder or a hub id.", show_default="where the adapter says")
    ] = None,
) -> None:
    """Talk to a trained model in the terminal. /exit ends it; --prompt asks once."""
    if beside is not None and (base or base_model is not None):
        raise PacaError("--beside names both that answer. Leave out --base and --base-model.")
    if prompt is None and sys.stdin is None:
        raise PacaError("Standard input is closed, so there is nothing to answer. Give the question with --prompt.")
    defined = None if tools is None else read_tools(tools)
    find_adapter(path, or_hub=True)  # before what it takes to load one: a wrong path is no reason to wait
    if beside not in (None, "base"):
        try:
            find_adapter(str(beside), or_hub=True)
        except PacaError as error:
            if nearest(str(beside), ["base"], cutoff=0.7) is None:
                raise
            raise PacaError(f"{error} Did you mean base, the model without the adapter?") from None
    import_libraries()
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "tools": defined}
    commands = HELP if defined is None else f"{HELP} {TOOLS_HELP}"
    if beside is not None:
        from rich.console import Console

        from paca.cli.chat_beside import SideBySide

        both = SideBySide(path, beside, system, Console(), **sampling)
        for line in both.remarks:
            say(f"{line} {SYSTEM_HELP}")
        if prompt is not None:
            both.ask(prompt)
            return
        say(commands)
        converse(both, commands)
        return
    from paca.pretrained.conversation import answering, check_tools, opening, speaker, told_of_system, unknown_form
    from paca.pretrained.generation import load_for_generation

    if path.lower().endswith(".gguf"):
        say(f"Unpacking the weights of {path} ...")
    loaded = load_for_generation(path, base_model=base_model)
    conversation = Conversation(loaded, opening(loaded, system), **sampling)
    if remark := unknown_form(loaded, base):
        say(remark)
    if remark := told_of_system(loaded, system):
        say(f"{remark} {SYSTEM_HELP}")
    if defined is not None:
        check_tools(loaded, defined)
    with answering(loaded, base):
        if prompt is not None:
            if not conversation.ask(prompt):
                raise typer.Exit(130)
            return
        say(f"{speaker(loaded, base)}\n{commands}")
        converse(conversation, commands)


def read_tools(file: Path) -> list[dict[str, Any]]:
    """The definitions in a JSON file: a list of them, or an object that has them as `tools`, as a record of data does.

    Raises:
        PacaError: It can't be read, or holds something else.
    """
    try:
        found = json.loads(file.expanduser().read_text(encoding="utf-8"))
        found = found.get("tools") if isinstance(found, dict) else found
        found = json.loads(found) if isinstance(found, str) else found
    except (OSError, ValueError, RuntimeError) as error:  # the last of a home folder that is not known
        raise PacaError(f"--tools {file} can't be read as JSON: {error}.") from error
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        raise PacaError(
            f"--tools {file} holds no list of definitions. Expected JSON as in OpenAI's interface: "
            '[{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}].'
        )
    return found


def converse(conversation: Conversation | SideBySide, commands: str) -> None:
    """Read lines and have them answered until the end of the input."""
    for line in typed_lines():
        if line == "/exit":
            return
        if line == "/reset":
            conversation.begin()
            say("New conversation.")
        elif line.startswith("/") and not (line.startswith("/tool ") and TOOLS_HELP in commands):
            say(f"No such command: {line}. {commands}")
        else:
            said = line.removeprefix("/tool ")
            if not isinstance(conversation, Conversation) and not sys.stdin.isatty():  # else it stands there
                conversation.console.print(f"> {printable(line)}", markup=False, highlight=False)
            try:
                conversation.ask(said, "user" if said == line else "tool")
            except PacaError as error:
                say(str(error))


class Conversation:
    """Questions, and the answers of one model."""

    def __init__(self, loaded: LoadedModel, opening: list[Message], **sampling: Any) -> None:
        self.loaded, self.opening, self.sampling = loaded, opening, sampling
        self.begin()

    def begin(self) -> None:
        """Start a new conversation."""
        self.history = list(self.opening)

    def ask(self, line: str, role: str = "user") -> bool:
        """Print the answer as it comes. Whether it is whole: Ctrl-C ends it early."""
        from paca.pretrained.generation import stream_reply

        question: Message = {"role": role, "content": line}
        pieces, whole = [], True
        try:
            for piece in stream_reply(self.loaded, [*self.history, question], **self.sampling):
                pieces.append(piece)
                print(shown_piece(piece), end="", flush=True)
        except KeyboardInterrupt:
            say(" (stopped)", end="")
            whole = False
        print(flush=True)
        self.history += [question, {"role": "assistant", "content": "".join(pieces)}]
        return whole


def typed_lines() -> Iterator[str]:
    """The lines of the input that are not blank."""
    if sys.stdin.isatty():
        # Only its import makes input() keep a history and edit the line; not on every platform.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            say("\nCtrl-D or /exit ends.")
            continue
        except UnicodeDecodeError as error:
            raise PacaError(f"What came on standard input is not text in {error.encoding}: {error.reason}.") from error
        if line:
            yield line


def say(text: str, end: str = "\n") -> None:
    """A remark of the program, apart from the model's answers."""
    print(printable(text), end=end, file=sys.stderr, flush=True)


def shown_piece(piece: str) -> str:
    """A piece of an answer; in a terminal without escape sequences, which a model can be trained to write."""
    return without_controls(piece) if sys.stdout.isatty() else piece
