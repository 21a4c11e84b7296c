"""Calls of tools in messages: their arguments as an object, or as the text of one."""

from __future__ import annotations

import json
from typing import Any


def with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A call of a tool with its arguments as an object, as templates read them: in OpenAI's interface they are text."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": with_arguments(call["function"])}
    try:
        arguments = json.loads(call["arguments"]) if isinstance(call.get("arguments"), str) else None
    except json.JSONDecodeError:
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def with_text_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The messages with the arguments of calls as JSON text, as some templates want them; None if they call nothing."""

    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        if isinstance(call.get("function"), dict):
            return {**call, "function": as_text(call["function"])}
        arguments = call.get("arguments")
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)} if isinstance(arguments, dict) else call

    if not any(message.get("tool_calls") for message in messages):
        return None
    return [
        {**message, "tool_calls": [as_text(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]
