"""What a chat is made of, without a terminal and without an engine: exchanges, and the lines that are commands."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field

COMMANDS = {
    "help": "show this",
    "clear": "forget what was said",
    "system": "/system TEXT: what the model is told first; without a text: show it, with -: nothing",
    "exit": "end the chat, as Ctrl-D does",
}
FENCE = '"""'
KEPT_SHARE = 0.75  # of the room, once it was full: what follows a change is computed anew, so not at every turn
_COMMAND = re.compile(r"/([A-Za-z]+)(?:\s+(.*))?", re.DOTALL)


@dataclass
class Conversation:
    """A system message, and questions with their answers."""

    system: str | None = None
    exchanges: list[tuple[str, str]] = field(default_factory=list)

    def messages(self, question: str) -> list[dict[str, str]]:
        """The chat with *question* at its end."""
        found = [] if self.system is None else [{"role": "system", "content": self.system}]
        for asked, answered in self.exchanges:
            found += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return [*found, {"role": "user", "content": question}]

    def fit(self, question: str, room: int, count: Callable[[list[dict[str, str]]], int]) -> int:
        """Forget the oldest exchanges if the chat with *question* has more than *room* tokens; how many went.

        Args:
            count: the tokens of messages.
        """
        before, most = len(self.exchanges), room
        while self.exchanges and count(self.messages(question)) > most:
            del self.exchanges[0]
            most = int(KEPT_SHARE * room)
        return before - len(self.exchanges)


def parse_command(text: str) -> tuple[str, str] | None:
    """The command that *text* is, and what follows it; ``None``: a message. A path is none: it has more slashes.

    >>> parse_command("/system Be brief."), parse_command("/etc/passwd?")
    (('system', 'Be brief.'), None)
    """
    match = _COMMAND.fullmatch(text.strip())
    return None if match is None else (match[1].lower(), (match[2] or "").strip())


def describe_commands() -> list[str]:
    """A line for each."""
    lines = [f"/{name:<8}{text}" for name, text in COMMANDS.items()]
    return [*lines, f"{FENCE}      begins and ends a message of several lines; a \\ at a line's end goes on as well"]


def unknown_command(name: str) -> str:
    """What to say about a command that is none."""
    close = difflib.get_close_matches(name, COMMANDS, 1)
    return f"no command /{name}" + (f"; did you mean /{close[0]}?" if close else "; /help shows them")


class Composer:
    """Messages out of lines: one each, but for those that go on, and those between fences. Empty ones are none."""

    def __init__(self) -> None:
        self._waiting: list[str] = []
        self._is_fenced = False

    @property
    def is_open(self) -> bool:
        """Whether a message was begun, and more of it is to come."""
        return self._is_fenced or bool(self._waiting)

    def push(self, line: str) -> str | None:
        """The message that *line* completes, if it does."""
        text = line.rstrip("\r\n")
        if not self.is_open and text.lstrip().startswith(FENCE):
            self._is_fenced, text = True, text.lstrip().removeprefix(FENCE)
            if not text:
                return None
        if self._is_fenced:
            is_end = text.rstrip().endswith(FENCE)
            self._waiting.append(text.rstrip().removesuffix(FENCE) if is_end else text)
            return self.finish() if is_end else None
        if text.endswith("\\"):
            self._waiting.append(text[:-1])
            return None
        self._waiting.append(text)
        return self.finish()

    def finish(self) -> str | None:
        """What was begun, as it is."""
        text = "\n".join(self._waiting)
        self._waiting, self._is_fenced = [], False
        return text if text.strip() else None
