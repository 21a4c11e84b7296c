"""Checks a value read from YAML against the type annotation of the field it is meant for."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from typing import Any, Literal, Union


def matches(value: Any, annotation: Any) -> bool:
    """Whether `value`, as YAML gives it, can be given to a field annotated with `annotation`.

    `int` does not take true/false or 2.0; `float` takes whole numbers; an `Enum` takes its members' values; a dataclass
    takes a mapping; a union that has an `Enum` beside `str` takes only the text that is a member's value.
    """
    if annotation is Any:
        return True
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        enums = [option for option in arguments if _is_enum(option)]
        if enums and isinstance(value, str):
            return any(matches(value, option) for option in enums)
        return any(matches(value, option) for option in arguments)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if origin in (list, tuple, set):
        element = arguments[0] if arguments else Any
        return isinstance(value, list) and all(matches(item, element) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            matches(key, arguments[0]) and matches(item, arguments[1]) for key, item in value.items()
        )
    if annotation is None or annotation is type(None):
        return value is None
    if _is_enum(annotation):
        return isinstance(value, str) and value in [member.value for member in annotation]
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (list, tuple, set):
        return isinstance(value, list)
    return isinstance(value, dict if dataclasses.is_dataclass(annotation) else annotation)


def expected(annotation: Any) -> str:
    """The kind of value an annotation takes, in words: `"a whole number or null"`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        has_enum = any(_is_enum(option) for option in arguments)
        options = [option for option in arguments if not (has_enum and option is str)]
        # null reads best at the end
        options.sort(key=lambda option: option is type(None))
        return " or ".join(dict.fromkeys(expected(option) for option in options))
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(str(option) for option in arguments)
    if origin in (list, tuple, set):
        return f"a list of {_plural(arguments[0])}" if arguments else "a list"
    if origin is dict or annotation is dict or dataclasses.is_dataclass(annotation):
        return "a mapping (key: value)"
    if annotation is None or annotation is type(None):
        return "null"
    if _is_enum(annotation):
        return "one of " + ", ".join(str(member.value) for member in annotation)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}
    return words.get(annotation, getattr(annotation, "__name__", str(annotation)))


def choices(annotation: Any) -> list[str]:
    """The texts that an annotation names one by one: members of enums and literals."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return [str(option) for option in arguments]
    if _is_enum(annotation):
        return [str(member.value) for member in annotation]
    return [choice for option in arguments for choice in choices(option)]


def shown(value: Any) -> str:
    """A value as an error message quotes it: its kind and, cut to a line, its content."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, dict)):
        kind = "a list" if isinstance(value, list) else "a mapping"
        return f"{kind} {_cut(value)}"
    return f"the text {_cut(value)}" if isinstance(value, str) else f"the number {value}"


def _is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, enum.Enum)


def _plural(annotation: Any) -> str:
    return {int: "whole numbers", float: "numbers", str: "texts"}.get(annotation, expected(annotation))


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
