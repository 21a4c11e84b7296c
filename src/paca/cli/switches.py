"""Switches as `--help` shows them, and options without their value.

Of a switch typer writes `--dry-run <bool>`, and `--dry-run true` is an error. Of an option that lacks its value, or is
missing, it does not say what that would be; where another option follows, it takes that one's name for the value.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


def _without_values(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


def _value_of(option: Any) -> str:
    return ". ".join(words for words in (option.metavar, option.help) if words)


class Command(TyperCommand):
    """A command whose switches take no value, and show none; it says what an option without its value needs."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its arguments and options."""
        return _without_values(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Reads the command line."""
        self._refuse_missing_value(ctx, args)
        return super().parse_args(ctx, args)

    def _refuse_missing_value(self, ctx: Any, args: list[str]) -> None:
        options: dict[str, Any] = {
            flag: option for option in self.params for flag in (*option.opts, *option.secondary_opts)
        }
        words = iter(args)
        for word in words:
            option = options.get(word) if word.startswith("--") else None
            if option is None or getattr(option, "is_flag", False):
                continue
            if next(words, "--help") in ("--help", *(flag for flag in options if flag.startswith("--"))):
                ctx.fail(f"{word} needs a value: {_value_of(option)}")
        given = {word.partition("=")[0] for word in args}
        for flag, option in options.items():
            if option.required and flag.startswith("--") and given.isdisjoint({*option.opts, "--help"}):
                ctx.fail(f"{flag} is missing: {_value_of(option)}")


class Group(TyperGroup):
    """The same for commands that have commands of their own."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its own options."""
        return _without_values(super().get_params(ctx))
