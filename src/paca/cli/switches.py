"""Switches as `--help` shows them, and options without their value.

Of a switch typer writes `--dry-run <bool>`; `--dry-run true` is an error, which names `true` alone. Of an option that
lacks its value, or is missing, it does not say what that would be; where another option follows, it takes that one's
name for the value. Of an option that there is not it looks for similar ones, in this command alone.
"""

from __future__ import annotations

import re
import shlex
import sys
from typing import Any

from typer import Exit
from typer.core import TyperCommand, TyperGroup

from paca.messages.nearest import did_you_mean


def _without_values(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


def _value_of(option: Any) -> str:
    return ". ".join(words for words in (option.metavar, option.help) if words)


def _takes_no_value(switch: str, word: str, options: dict[str, Any]) -> str:
    longer = [
        flag for flag in options if flag.startswith(f"{switch}-") and not getattr(options[flag], "is_flag", False)
    ]
    instead = "".join(f" For a value there is {flag}: {_value_of(options[flag])}" for flag in longer)
    return f"{switch} takes no value, and {word!r} was given.{instead or ' Leave it out.'}"


def _mend(error: Any, ctx: Any) -> None:
    """Of a choice that there is not typer tells the kind of its own exception, and not which one was meant."""
    if hasattr(error, "option_name") and str(getattr(error, "message", "")).startswith("No such option"):
        _tell_where(error, ctx)
    if str(getattr(error, "message", "")).startswith("Got unexpected extra argument"):
        of_chat = " Give a question with --prompt." if _has("--prompt", ctx) else ""
        error.message += of_chat or (" Give --set again for each key." if _has("--set", ctx) else "")
    told = re.fullmatch(r"Value error, ('(.*)' is not one of (.*)\.)", str(getattr(error, "message", "")))
    if told is not None:
        error.message = told[1] + did_you_mean(told[2], re.findall(r"'([^']*)'", told[3]))


def _tell_where(error: Any, ctx: Any) -> None:
    """Say which other commands have an option, or that it may be a key."""
    siblings = getattr(getattr(ctx.parent, "command", None), "commands", {}).items()
    having = [f"paca {name}" for name, other in siblings if any(error.option_name in p.opts for p in other.params)]
    if having:
        error.message += f", which is one of {', '.join(having)}"
        error.possibilities = None
    if set(error.possibilities or ()) <= {"--set"} and _has("--set", ctx):
        error.possibilities = None
        example = "output.dir=FOLDER" if error.option_name == "--output" else "train.learning_rate=1e-4"
        example = "eval.metric=exact_match" if ctx.info_name == "evaluate" else example
        error.message += f". A key of the YAML is set with --set SECTION.KEY=VALUE, as --set {example}."


def _tell_command(error: Any, given: list[str], commands: Any, ctx: Any) -> None:
    """Say where an option belongs that stands before the command that has it."""
    name = next((word for word in given if word in commands), "")
    if name and any(getattr(error, "option_name", "") in parameter.opts for parameter in commands[name].params):
        given.remove(name)
        error.message += f". It belongs behind {name}: {ctx.command_path} {shlex.join([name, *given])}"
        error.possibilities = None


def _has(option: str, ctx: Any) -> bool:
    return any(option in parameter.opts for parameter in ctx.command.params)


class Command(TyperCommand):
    """A command whose switches take no value, show none and say so; it says what an option without its value needs."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its arguments and options."""
        return _without_values(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Reads the command line."""
        self._refuse_wrong_values(ctx, args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # typer's own, which versions of it keep in different places
            _mend(error, ctx)
            raise

    def _refuse_wrong_values(self, ctx: Any, args: list[str]) -> None:
        options: dict[str, Any] = {
            flag: option for option in self.params for flag in (*option.opts, *option.secondary_opts)
        }
        alone, switch = [], ""  # words that are no option's value, each with the switch that it stands behind
        words = iter(args)
        for word in words:
            name, given, value = word.partition("=")
            option = options.get(name) if word.startswith("--") else None
            if option is None or getattr(option, "is_flag", False):
                if option is not None and given:
                    ctx.fail(_takes_no_value(name, value, options))
                if not word.startswith("-"):
                    alone.append((switch, word))
                switch = name if option is not None else ""
                continue
            switch = ""
            if not given and next(words, "--help") in ("--help", *(one for one in options if one.startswith("--"))):
                ctx.fail(f"{word} needs a value: {_value_of(option)}")
        room = [option.nargs for option in self.params if option.param_type_name == "argument"]
        for switch, word in alone if len(alone) > sum(room) and min(room, default=0) >= 0 else ():
            if switch:
                ctx.fail(_takes_no_value(switch, word, options))
        there = {word.partition("=")[0] for word in args}
        if any(word.startswith("--") and word not in {*options, "--", "--help"} for word in there):
            return  # that there is no such option comes first
        for flag, option in options.items():
            if option.required and flag.startswith("--") and there.isdisjoint({*option.opts, "--help"}):
                ctx.fail(f"{flag} is missing: {_value_of(option)}")


class Group(TyperGroup):
    """The same for commands that have commands of their own; it says where an option belongs that is one of theirs."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its own options."""
        return _without_values(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Reads the command line up to the command."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # as above
            _tell_command(error, given, self.commands, ctx)
            raise

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # before the command minds it, as while libraries load: typer ends without a word
            print("Stopped.", file=sys.stderr)
            raise Exit(130) from None
