"""An answer as it comes: its text on stdout, the model's thoughts on stderr.

A terminal obeys control characters, and an answer is not to be obeyed: there they are shown, not sent.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

import typer

if TYPE_CHECKING:
    from layerstream.api.completion import Completion
    from layerstream.api.request import Request
    from layerstream.chat.reader import Piece
    from layerstream.chat.turn import Turn

_KEPT = "\t\n"
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in _KEPT} | dict.fromkeys(
    range(127, 160), 0xFFFD
)


class Answer:
    """What was shown of an answer.

    Args:
        turn: reads the text where it is more than text: thoughts are told apart.

    Attributes:
        text: so far, without thoughts.
    """

    def __init__(self, turn: Turn | None = None) -> None:
        self.text = ""
        self._reader = None if turn is None else turn.reader()
        self._is_thinking = False

    def show(self, request: Request) -> Completion:
        """Print the answer to *request* as it comes; whatever breaks that off cancels it."""
        try:
            for delta in request:
                self._take(delta.text)
            if self._reader is not None:
                self._print(self._reader.finish())
        except BaseException:
            request.cancel()
            raise
        typer.echo()
        return request.result()

    def _take(self, text: str) -> None:
        if self._reader is None:
            self._write(text)
        else:
            self._print(self._reader.push(text))

    def _print(self, pieces: list[Piece]) -> None:
        from layerstream.chat.reader import Text, Thought

        for piece in pieces:
            if isinstance(piece, Text):
                self._write(piece.text)
            elif isinstance(piece, Thought) and is_terminal(sys.stderr):
                typer.secho(printable(piece.text, sys.stderr), nl=False, err=True, dim=True)
                self._is_thinking = True

    def _write(self, text: str) -> None:
        """White space before the first word is left out."""
        text = text if self.text else text.lstrip()
        if not text:
            return
        if self._is_thinking:
            typer.echo("\n", err=True)
            self._is_thinking = False
        self.text += text
        typer.echo(printable(text, sys.stdout), nl=False)


def printable(text: str, stream: TextIO) -> str:
    """*text* as it can be written to *stream*."""
    return text.translate(_VISIBLE) if is_terminal(stream) else text


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person looks at *stream*."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def say(text: str) -> None:
    """A line beside the answer, on stderr."""
    typer.secho(text, err=True, dim=True)
