"""What a chat is made of: exchanges that fit the context, messages of several lines, commands."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layerstream.cli.answering import printable
from layerstream.cli.conversation import Composer, Conversation, parse_command, unknown_command


def compose(lines: list[str]) -> list[str]:
    composer = Composer()
    found = [composer.push(line + "\n") for line in lines]
    return [message for message in [*found, composer.finish()] if message is not None]


@pytest.mark.parametrize(
    ("lines", "messages"),
    [
        (["a", "", "  ", "b"], ["a", "b"]),
        (["a \\", "b\\", "c", "d"], ["a \nb\nc", "d"]),
        (['"""', "a", "", "  b", '"""', "c"], ["a\n\n  b\n", "c"]),
        (['"""a', 'b"""', "c"], ["a\nb", "c"]),
        (['"""a b"""', "c"], ["a b", "c"]),
        (['"""', "/clear", '"""'], ["/clear\n"]),
        (['"""', "left open"], ["left open"]),
        (["left open\\"], ["left open"]),
        (['say """ here'], ['say """ here']),
        (['""""""', "x"], ["x"]),
    ],
)
def test_messages_of_lines(lines: list[str], messages: list[str]) -> None:
    assert compose(lines) == messages


@given(st.lists(st.text(st.characters(exclude_characters='\\"\r\n'), max_size=8)))
def test_a_plain_line_is_a_message(lines: list[str]) -> None:
    assert compose(lines) == [line for line in lines if line.strip()]


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("/help", ("help", "")), (" /CLEAR ", ("clear", "")), ("/system  Be brief. ", ("system", "Be brief.")),
        ("/system a\nb", ("system", "a\nb")), ("/etc/passwd?", None), ("/", None), ("1/2", None), ("// x", None),
        ("/tmp is full", ("tmp", "is full")),
    ],
)  # fmt: skip
def test_commands(text: str, command: tuple[str, str] | None) -> None:
    assert parse_command(text) == command


def test_a_mistyped_command_is_not_sent_to_the_model() -> None:
    assert unknown_command("sytem") == "no command /sytem; did you mean /system?"
    assert unknown_command("zzz") == "no command /zzz; /help shows them"


@given(st.lists(st.integers(1, 40), max_size=20), st.integers(1, 40), st.integers(1, 200))
def test_a_chat_fits_or_has_forgotten_all(lengths: list[int], asked: int, room: int) -> None:
    chat = Conversation("s", [("q" * length, str(number)) for number, length in enumerate(lengths)])

    def count(messages: list[dict[str, str]]) -> int:
        return sum(len(message["content"]) for message in messages)

    before, fitted = list(chat.exchanges), count(chat.messages("x" * asked)) <= room
    gone = chat.fit("x" * asked, room, count)
    assert chat.exchanges == before[gone:], "the oldest go"
    assert not chat.exchanges or count(chat.messages("x" * asked)) <= room
    assert (gone == 0) == (fitted or not before)
    assert chat.messages("x")[0] == {"role": "system", "content": "s"}
    assert [m["role"] for m in chat.messages("x")[1:]] == ["user", "assistant"] * len(chat.exchanges) + ["user"]


def test_a_terminal_is_sent_nothing_that_it_would_obey() -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    text = "a\x1b[2J\x1b]0;title\x07\r\x9b31m\tb\nç\u4e00"
    shown = printable(text, Terminal())  # type: ignore[arg-type]
    assert shown == "a␛[2J␛]0;title␇␍\ufffd31m\tb\nç\u4e00"
