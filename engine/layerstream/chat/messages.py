"""Messages as chat templates take them: texts, roles that alternate, tools' parts in words where need be.

The canonical form is OpenAI's: ``{"role": "system" | "user" | "assistant" | "tool", "content": str}``; an assistant's
``tool_calls`` are ``{"id", "type": "function", "function": {"name", "arguments": {...}}}``, a tool's message has the
``tool_call_id`` and the ``name``. Ids become nine letters and digits, the only ones that every template takes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from layerstream.chat.tools import Tool
from layerstream.errors import PromptError
from layerstream.text.prompt import Message

_ROLES = {
    "developer": "system",
    "human": "user",
    "ai": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "function": "tool",
}

TOOLS_PROMPT = """You may call functions to help with the user's request. The functions are:
<tools>
{tools}
</tools>
To call one, answer with a JSON object of its name and arguments within <tool_call></tool_call>:
<tool_call>
{{"name": "function-name", "arguments": {{"argument": "value"}}}}
</tool_call>"""

SCHEMA_PROMPT = "\n\nAnswer with a JSON object that follows this schema, and nothing else:\n{schema}"


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """*messages* with texts for contents, known roles, arguments as mappings; neighbours of one role are one message.

    Raises:
        PromptError: contents that are no text (images, say), or a message that is none.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise PromptError(
            f"a chat is a list of messages such as [{{'role': 'user', 'content': 'Hi'}}], not {messages!r:.80}"
        )
    result: list[dict[str, Any]] = []
    for given in messages:
        role = given.get("role") if isinstance(given, Mapping) else None
        if not isinstance(role, str):
            raise PromptError(f"a chat message has a 'role' such as 'user'; this one has none: {given!r:.80}")
        message = {**given, "role": _ROLES.get(role, role), "content": plain_text(given.get("content"))}
        if "tool_call_id" in message:
            message["tool_call_id"] = _plain_id(message["tool_call_id"])
        if calls := given.get("tool_calls"):
            message["tool_calls"] = [_plain_call(call) for call in calls]
        else:
            message.pop("tool_calls", None)
        if result and _can_join(result[-1], message):
            result[-1]["content"] = "\n".join(filter(None, (result[-1]["content"], message["content"])))
            if calls:
                result[-1].setdefault("tool_calls", []).extend(message["tool_calls"])
        else:
            result.append(message)
    return result


def plain_text(content: Any) -> str:
    """The text of a message's content: text, parts of text, or nothing.

    Raises:
        PromptError: there is something else in it.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise PromptError(f"a message's content is text or a list of text parts, not {content!r:.80}")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, Mapping) and part.get("type") in ("tool_use", "tool_call", "reasoning", "thinking"):
            continue  # said elsewhere in the message, or not to be said again
        else:
            kind = part.get("type", "?") if isinstance(part, Mapping) else type(part).__name__
            raise PromptError(
                f"this version reads text only, and a message has a part of type {kind!r}: leave it out, or say in "
                "words what it shows"
            )
    return "\n".join(texts)


def explain_tools(messages: Sequence[Message], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """*messages* for a template that knows no tools: what they are, were asked and answered, in words."""
    result: list[dict[str, Any]] = []
    for message in messages:
        content = message["content"]
        if calls := message.get("tool_calls"):
            spoken = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
            texts = [f"<tool_call>\n{call}\n</tool_call>" for call in spoken]
            content = "\n".join(filter(None, [content, *texts]))
        if message["role"] == "tool":
            result.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
        else:
            result.append({"role": message["role"], "content": content})
    if tools:
        lines = "\n".join(json.dumps(tool.as_dict(), ensure_ascii=False) for tool in tools)
        result.insert(0, {"role": "system", "content": TOOLS_PROMPT.format(tools=lines)})
    return plain_messages(result)


def without_system(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """*messages* for a template that knows no system role: what it said opens the user's first message."""
    said = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    others = [dict(message) for message in messages if message["role"] != "system"]
    first = next((message for message in others if message["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": said}, *others]
    first["content"] = f"{said}\n\n{first['content']}"
    return others


def explain_schema(messages: Sequence[Message], schema: Any) -> list[dict[str, Any]]:
    """*messages* with the schema of the answer at the end of the user's last one: what is before it keeps its KV."""
    result = [dict(message) for message in messages]
    last = next((message for message in reversed(result) if message["role"] == "user"), None)
    if last is not None:
        last["content"] += SCHEMA_PROMPT.format(schema=json.dumps(schema, ensure_ascii=False))
    return result


def _can_join(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return first["role"] == second["role"] != "tool" and first.get("name") == second.get("name")


def _plain_id(given: Any) -> str:
    """Nine letters and digits, as Mistral's templates insist; the same ones for the same id."""
    text = str(given or "")
    return text if re.fullmatch(r"[A-Za-z0-9]{9}", text) else hashlib.sha256(text.encode()).hexdigest()[:9]


def _plain_call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PromptError(
            f"a tool call is {{'id': ..., 'type': 'function', 'function': {{'name': ..., 'arguments': {{...}}}}}}, "
            f"not {call!r:.80}"
        )
    return {
        "id": _plain_id(call.get("id")),
        "type": "function",
        "function": {"name": function["name"], "arguments": _plain_arguments(function.get("arguments") or {})},
    }


def _plain_arguments(given: Any) -> Any:
    """Arguments as a mapping, the only form that every template takes; those of a call that was cut off as they are."""
    if not isinstance(given, str):
        return given
    try:
        value = json.loads(given)
    except ValueError:
        value = None
    return value if isinstance(value, Mapping) else {"invalid": given}
