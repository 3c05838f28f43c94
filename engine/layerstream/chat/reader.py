"""From what a model says to what it means, as it comes: text, thoughts and tool calls.

transformers' response parser splits the stream by a template: the tokenizer's own where it has one for a family that
:mod:`~layerstream.chat.formats` does not know, else one made from the family's row. Within the calls, a scanner follows
the JSON, so that a call's name is known before its arguments are complete, and the arguments pass on piece by piece.

What is no call is text: an answer that begins as a call does, and goes on otherwise, or names what cannot be called,
loses nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from layerstream.chat.formats import ToolFormat

_THOUGHTS = ("thinking", "reasoning_content", "reasoning")


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """A piece of what the model thought before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class CallPart:
    """A piece of the *index*-th call: the first brings its id and name, all of them parts of its JSON arguments."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


Piece: TypeAlias = Text | Thought | CallPart


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asks for; ``arguments`` is ``None`` where its JSON (``text``) is not complete."""

    id: str
    name: str
    text: str

    @property
    def arguments(self) -> dict[str, Any] | None:
        """The arguments by name."""
        try:
            value = json.loads(self.text)
        except ValueError:
            return None
        return value if isinstance(value, dict) else None


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer, read."""

    text: str
    thought: str = ""
    calls: tuple[ToolCall, ...] = ()


def response_template(form: ToolFormat, *, thinks: bool, has_tools: bool) -> dict[str, Any]:
    """What transformers' parser needs to know of *form*."""
    fields: dict[str, Any] = {"content": {"content_args": {"strip": False}}}
    if form.answer_open:
        fields["content"]["open"] = form.answer_open
    if thinks:
        close = form.thought_close.split("<|start|>")[0]
        fields["thinking"] = {"open": form.thought_open, "close": close, "repeats": True, "join": "\n"}
    if has_tools:
        opens = {"open": form.trigger} if form.trigger else {"open_pattern": r"^\s*(?:<\|python_tag\|>\s*)?(?=\{)"}
        fields["tool_calls"] = {**opens, "content_args": {"strip": False}}
    return {"start_anchor_pattern": "^", "fields": fields}


@dataclass
class ReplyReader:
    """Reads one answer.

    Args:
        template: of transformers' response parser.
        form: how calls are written; ``None``: as the template says, whole.
        prefix: what of the prompt belongs to the answer.
        names: what can be called; ``None``: that is not known.
        salt: makes the ids of calls. The same prompt has the same ids, or no prefix with a call in it would be found
            again; nine letters and digits, as Mistral's templates want them.
    """

    template: Mapping[str, Any]
    form: ToolFormat | None
    prefix: str = ""
    salt: str = ""
    names: Container[str] | None = None
    _num_calls: int = field(default=0, init=False)
    _is_content_begun: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        from transformers.utils.chat_parsing import ResponseParser

        self._parser = ResponseParser(dict(self.template), prefix=self.prefix)
        self._scanner = CallScanner(self.form, self.names) if self.form is not None else None
        self._unread = ""

    @property
    def has_calls(self) -> bool:
        """Whether a call has begun."""
        return self._num_calls > 0

    def push(self, text: str) -> list[Piece]:
        """What *text* adds."""
        return join_pieces(self._pieces(self._parser.feed(text)))

    def finish(self) -> list[Piece]:
        """What was held back."""
        try:
            _, events = self._parser.finalize()
        except ValueError:  # a template's own JSON, cut off
            return [Text(self._unread)] if self._unread else []
        return join_pieces(self._pieces(events))

    def _pieces(self, events: Sequence[Mapping[str, Any]]) -> Iterator[Piece]:
        for event in events:
            name, kind = event["field"], event["type"]
            if name == "content" and kind == "region_chunk":
                yield from self._text(event["text"])
            elif name in _THOUGHTS and kind == "region_chunk":
                yield Thought(event["text"])
            elif name == "tool_calls" and kind == "region_chunk":
                if self._scanner is None:
                    self._unread += event["text"]
                else:
                    yield from self._scanned(self._scanner, event["text"])
            elif name == "tool_calls" and kind == "region_close":
                if self._scanner is None:
                    yield from list(self._whole_calls(event["value"])) or self._text(self._unread)
                    self._unread = ""
                else:
                    yield from self._text(self._scanner.finish())

    def _scanned(self, scanner: CallScanner, text: str) -> Iterator[Piece]:
        for start, arguments in scanner.push(text):
            yield self._call(start, arguments)
        yield from self._text(scanner.take_text())

    def _text(self, text: str) -> Iterator[Text]:
        text = text if self._is_content_begun else text.lstrip("\n")
        if text:
            self._is_content_begun = True
            yield Text(text)

    def _whole_calls(self, value: Any) -> Iterator[CallPart]:
        for item in value if isinstance(value, list) else [value]:
            function = item.get("function", item) if isinstance(item, Mapping) else {}
            if isinstance(function.get("name"), str):
                arguments = function.get("arguments") or {}
                text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
                yield self._call(function["name"], text)

    def _call(self, name: str | None, arguments: str) -> CallPart:
        if name is None:
            return CallPart(self._num_calls - 1, arguments)
        self._num_calls += 1
        digest = hashlib.sha256(f"{self.salt}{self._num_calls}".encode()).hexdigest()
        return CallPart(self._num_calls - 1, arguments, digest[:9], name)


class CallScanner:
    """Finds calls in the text of a format, and where their arguments end.

    Invariant: until the first call is found, all that was pushed is waiting, or taken as text.
    """

    def __init__(self, form: ToolFormat, names: Container[str] | None = None) -> None:
        self._header = form.header
        self._trigger = form.trigger
        self._names = names
        self._waiting = ""
        self._is_text = self._has_calls = False
        self._json: _JsonValue | None = None

    def push(self, text: str) -> list[tuple[str | None, str]]:
        """``(name, arguments)`` for each call that begins, ``(None, arguments)`` for more of the last one."""
        found: list[tuple[str | None, str]] = []
        while text:
            if self._json is None:
                self._waiting += text
                match = None if self._is_text else self._header.search(self._waiting)
                if match is None or not self._is_known(match["name"]):
                    return found
                text, self._waiting = self._waiting[match.end() :], ""
                self._json, self._has_calls = _JsonValue(), True
                found.append((match["name"], ""))
            value, text = self._json.take(text)
            if value:
                found.append((None, value))
            if self._json.is_over:
                self._json = None
        return found

    def take_text(self) -> str:
        """What cannot become a call any more, where calls are told by how they begin."""
        if self._has_calls or self._trigger:
            return ""
        self._is_text = self._is_text or not self._may_be_call()
        return self.finish() if self._is_text else ""

    def finish(self) -> str:
        """The text is over: all of it, if there was no call in it."""
        text, self._waiting = self._waiting, ""
        return "" if self._has_calls else (self._trigger if not self._is_text else "") + text

    def _may_be_call(self) -> bool:
        """Whether what waits begins as a call of something that can be called."""
        match = self._header.match(self._waiting, partial=True)
        return match is not None and (match.partial or self._is_known(match["name"]))

    def _is_known(self, name: str) -> bool:
        return self._names is None or name in self._names


class _JsonValue:
    """Follows one JSON object to its last brace."""

    def __init__(self) -> None:
        self.is_over = False
        self._depth = 0
        self._is_in_string = self._is_escaped = False

    def take(self, text: str) -> tuple[str, str]:
        """What of *text* belongs to the object, and the rest."""
        for position, character in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_in_string:
                self._is_escaped = character == "\\"
                self._is_in_string = character != '"'
            elif character == '"':
                self._is_in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.is_over = True
                    return text[: position + 1], text[position + 1 :]
        return text, ""


def join_pieces(pieces: Iterable[Piece]) -> list[Piece]:
    """*pieces*, neighbours that belong together as one."""
    result: list[Piece] = []
    for piece in pieces:
        last = result[-1] if result else None
        if isinstance(piece, CallPart) and isinstance(last, CallPart) and last.index == piece.index:
            result[-1] = CallPart(last.index, last.arguments + piece.arguments, last.id, last.name)
        elif isinstance(piece, Text) and isinstance(last, Text):
            result[-1] = Text(last.text + piece.text)
        elif isinstance(piece, Thought) and isinstance(last, Thought):
            result[-1] = Thought(last.text + piece.text)
        else:
            result.append(piece)
    return result


def gather(pieces: Sequence[Piece]) -> Reply:
    """All pieces of an answer as one."""
    calls: dict[int, list[CallPart]] = {}
    for piece in pieces:
        if isinstance(piece, CallPart):
            calls.setdefault(piece.index, []).append(piece)
    return Reply(
        text="".join(piece.text for piece in pieces if isinstance(piece, Text)),
        thought="".join(piece.text for piece in pieces if isinstance(piece, Thought)).strip(),
        calls=tuple(
            ToolCall(parts[0].id or "", parts[0].name or "", "".join(part.arguments for part in parts))
            for parts in calls.values()
        ),
    )
