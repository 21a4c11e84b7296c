"""Switches as `--help` shows them: typer writes `--dry-run <bool>`, and `--dry-run true` is an error."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


def _without_values(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


class Command(TyperCommand):
    """A command whose switches take no value, and show none."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its arguments and options."""
        return _without_values(super().get_params(ctx))


class Group(TyperGroup):
    """The same for commands that have commands of their own."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Its own options."""
        return _without_values(super().get_params(ctx))
