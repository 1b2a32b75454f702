"""A conversation's messages: what data sets write them like, and what chat templates read.

Reads OpenAI's and ShareGPT's forms, tool calls and reasoning included; writes OpenAI's.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torchspec_lib.errors import DataError

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""Role names of OpenAI's and ShareGPT's forms."""
REASONING_END = "</think>"
"""What ends a reasoning inside a content. Templates that know it cut it off in old turns."""
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""What data sets and templates call the reasoning before an answer."""


class CallForm(NamedTuple):
    """How a template is given tool calls, on which templates don't agree."""

    arguments_as_json: bool
    """As a string with JSON, or as an object."""
    no_content: str | None
    """The content of a message that only calls: null or empty."""


CALL_FORMS = tuple(
    CallForm(as_json, content) for content in (None, "") for as_json in (False, True)
)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that an assistant has called: ``ToolCall("weather", {"city": "Rome"}, "call_1")``.

    Arguments that are null are left out unless they come as JSON in a string: Parquet writes null
    for every argument of other calls.
    """

    name: str
    arguments: Mapping[str, Any]
    call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """What one side said: ``Message("user", "What is 2 + 2?")``."""

    role: str
    content: str
    """Empty beside tool calls, in a tool's result, and where the data have nothing."""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    """Of the call whose result this is."""
    name: str | None = None
    """The tool's, with a result."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is said where something should be: a reasoning alone is no answer."""
        said = self.content.rpartition(REASONING_END)[2].strip()
        return not said and not self.tool_calls and self.role != "tool"

    @property
    def thought(self) -> str:
        """The reasoning, wherever the data keep it: in a field, or in the content."""
        in_content, cut, _ = self.content.rpartition(REASONING_END)
        reasoning = self.reasoning or (in_content.rpartition("<think>")[2] if cut else "")
        return reasoning.strip()

    def as_row(self) -> dict[str, Any]:
        """As ``parse_message`` reads it, in OpenAI's form."""
        return {
            "role": self.role,
            "content": self.content,
            **({"reasoning_content": self.reasoning} if self.reasoning else {}),
            **self._tool_fields(arguments_as_json=True),
        }

    def for_template(self, form: "CallForm") -> dict[str, Any]:
        """As chat templates read it. They don't agree on the name of a reasoning."""
        is_bare_call = self.tool_calls and not self.content
        return {
            "role": self.role,
            "content": form.no_content if is_bare_call else self.content,
            **(dict.fromkeys(REASONING_FIELDS, self.reasoning) if self.reasoning else {}),
            **self._tool_fields(form.arguments_as_json),
        }

    def _tool_fields(self, arguments_as_json: bool) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self.tool_calls:
            fields["tool_calls"] = [_call_row(call, arguments_as_json) for call in self.tool_calls]
        if self.tool_call_id is not None:
            fields["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            fields["name"] = self.name
        return fields


def _call_row(call: ToolCall, arguments_as_json: bool) -> dict[str, Any]:
    arguments = dict(call.arguments)
    written = json.dumps(arguments, ensure_ascii=False) if arguments_as_json else arguments
    row = {"type": "function", "function": {"name": call.name, "arguments": written}}
    return row if call.call_id is None else {"id": call.call_id, **row}


def parse_message(turn: Any, where: str) -> Message:
    """A message of a row.

    Raises:
        DataError: It is none, or carries something that would be lost.
    """
    if not isinstance(turn, dict):
        raise DataError(
            where,
            f"is a {type(turn).__name__}, not an object",
            'Write {"role": "user", "content": "..."}',
        )
    name = turn.get("role") or turn.get("from")
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise DataError(where, f"has the unknown role {name!r}", f"Use one of {', '.join(ROLES)}")
    if turn.get("function_call"):
        raise DataError(
            where, "carries 'function_call', which isn't supported", "Write it as 'tool_calls'"
        )
    content = _parse_content(turn.get("content") or turn.get("value"), where)
    given = turn.get("tool_calls") if role == "assistant" else None
    if name == "function_call":  # ShareGPT has calls as a message's text, one or a list
        given, content = content, ""
    calls = _parse_calls(given, where)
    if not calls and not {"content", "value"} & turn.keys():
        raise DataError(where, "has no content", "Write it as 'content', or remove it")
    return Message(
        role,
        content,
        reasoning=_parse_reasoning(turn, where) if role == "assistant" else None,
        tool_calls=calls,
        tool_call_id=_text(turn, "tool_call_id", where),
        name=_text(turn, "name", where),
    )


def parse_tools(tools: Any, where: str) -> tuple[dict[str, Any], ...]:
    """The tools that a conversation offers: JSON schemas, in a list or in a string with one.

    Raises:
        DataError: They are something else.
    """
    tools = _from_json(_without_nulls(tools), f"{where}, tools")
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(where, "has 'tools' that are no list of objects", "Write OpenAI's form")
    return tuple(tools)


def _parse_content(content: Any, where: str) -> str:
    """Text, or OpenAI's list of parts if all are text."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if all(isinstance(part, str) for part in parts):
            return "".join(map(str, parts))
    elif content is None or isinstance(content, str):
        return content or ""
    raise DataError(where, "has content that is no text", "Remove the conversation")


def _parse_reasoning(turn: Mapping[str, Any], where: str) -> str | None:
    given = (_text(turn, field, where) for field in REASONING_FIELDS)
    return next((text for text in given if text and text.strip()), None)


def _parse_calls(calls: Any, where: str) -> tuple[ToolCall, ...]:
    calls = _from_json(calls, f"{where}, tool_calls")
    if not calls:
        return ()
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise DataError(where, "has 'tool_calls' that are no list", "Write OpenAI's form")
    return tuple(_parse_call(call, f"{where}, tool call {i}") for i, call in enumerate(calls))


def _parse_call(call: Any, where: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(where, "names no function", "Write OpenAI's form")
    arguments = _from_json(_without_nulls(function.get("arguments")) or {}, f"{where}, arguments")
    if not isinstance(arguments, dict):
        raise DataError(where, "has arguments that are no object", "Write a JSON object")
    return ToolCall(function["name"], arguments, _text(call, "id", where))


def _from_json(value: Any, where: str) -> Any:
    """What a string holds as JSON; anything else is itself."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(where, f"is not valid JSON: {error}", "Correct or remove it") from error


def _text(turn: Mapping[str, Any], field: str, where: str) -> str | None:
    value = turn.get(field)
    if value is None or isinstance(value, str):
        return value or None
    raise DataError(where, f"has {field!r} that is no text", "Correct or remove it")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
