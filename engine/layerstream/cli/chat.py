"""``layerstream chat``: questions and answers in turn.

Ctrl-C ends an answer, Ctrl-D the chat. Without a terminal every line of stdin is a question, and what goes wrong ends
the command.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from layerstream.cli.answering import Answer, is_terminal, say
from layerstream.cli.conversation import Composer, Conversation, describe_commands, parse_command, unknown_command
from layerstream.cli.failures import explain
from layerstream.cli.options import EngineOptions, SamplingOptions, with_options
from layerstream.errors import ConfigurationError, DeviceLost, EngineClosed, LayerStreamError, PromptTooLong

if TYPE_CHECKING:
    from layerstream.api.params import SamplingParams
    from layerstream.engine import LayerStream

ANSWER_TOKENS = 256  # kept free for the answer where max_tokens does not say
MORE, ASK = "… ", "> "


@with_options
def chat(
    model: Annotated[
        str | None, typer.Argument(help="A folder, a hub id, a .gguf file; the bundled reader if not given.")
    ] = None,
    named: Annotated[str | None, typer.Option("--model", help="The model, if it is not the first word.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the chat.")] = None,
    *,
    sampling: SamplingOptions,
    engine: EngineOptions,
) -> None:
    """Talk with a model; /help shows what else there is. Answers go to stdout, all else to stderr."""
    from layerstream.handle import default_model

    if model is not None and named is not None:
        raise ConfigurationError(f"the model is named twice, {model!r} and --model {named!r}: leave out one")
    chosen, params = model or named or default_model(), sampling.params()
    with engine.open(chosen) as opened:
        if not opened.has_chat_template:
            raise ConfigurationError(
                f"{chosen} has no chat template, so it cannot be talked with; take an instruct model, or "
                f"'layerstream run {chosen} PROMPT', which continues a text"
            )
        Chat(opened, params, Conversation(system)).hold()


class Chat:
    """A chat on a terminal, or on a pipe."""

    def __init__(self, engine: LayerStream, params: SamplingParams, conversation: Conversation) -> None:
        self._engine = engine
        self._params = params
        self._conversation = conversation
        self._is_interactive = is_terminal(sys.stdin) and is_terminal(sys.stdout)

    def hold(self) -> None:
        """Take messages and answer them, until there are no more."""
        if self._is_interactive:
            say(f"{self._engine.model_name} · {self._engine.context_length:,} tokens of context · /help, Ctrl-D ends")
        for text in self._messages():
            command = parse_command(text)
            if command is None:
                self._answer(text)
            elif command[0] in ("exit", "quit", "bye"):
                return
            else:
                self._obey(*command)

    def _messages(self) -> Iterator[str]:
        return read_terminal() if self._is_interactive else read_pipe()

    def _obey(self, name: str, argument: str) -> None:
        if name == "help":
            for line in describe_commands():
                say(line)
        elif name == "clear":
            self._conversation.exchanges.clear()
            say("forgotten")
        elif name == "system":
            if argument:
                self._conversation.system = None if argument == "-" else argument
            say(f"system: {self._conversation.system or 'nothing'}")
        else:
            say(unknown_command(name))

    def _answer(self, question: str) -> None:
        """One turn. Ctrl-C ends it: what was said so far was said. An error ends it too, and nothing was asked."""
        answer = None
        try:
            self._make_room(question)
            turn = self._engine.turn(self._conversation.messages(question), self._params)
            request = self._engine.submit(turn.prompt, turn.params)
            answer = Answer(turn)
            completion = answer.show(request)
        except KeyboardInterrupt:
            if not self._is_interactive:
                raise
            typer.echo()
            say("stopped")
        except LayerStreamError as error:
            if not self._is_interactive or isinstance(error, EngineClosed | DeviceLost):
                raise
            typer.echo(f"layerstream: {explain(error)}", err=True)
            return
        else:
            if completion.finish_reason == "length":
                say(f"cut off after {completion.usage.completion_tokens} tokens; --max-tokens allows more")
        if answer is not None and answer.text:
            self._conversation.exchanges.append((question, answer.text))

    def _make_room(self, question: str) -> None:
        length = self._engine.context_length
        room = length - min(self._params.max_tokens or ANSWER_TOKENS, length // 2)
        gone = self._conversation.fit(question, room, self._count)
        if gone:
            say(f"the context of {length:,} tokens is full: the oldest {gone} of the chat's exchanges were forgotten")

    def _count(self, messages: list[dict[str, str]]) -> int:
        try:
            return len(self._engine.encode(self._engine.turn(messages, self._params).prompt))
        except PromptTooLong:
            return self._engine.context_length


def read_terminal() -> Iterator[str]:
    """Messages that a person types, with the editing and the history of readline where it is there."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() uses it from now on
    composer = Composer()
    while True:
        try:
            message = composer.push(input(MORE if composer.is_open else ASK))
        except KeyboardInterrupt:
            typer.echo()
            if not composer.is_open:
                say("Ctrl-D or /exit ends the chat")
            composer = Composer()
            continue
        except EOFError:
            typer.echo()
            return
        if message is not None:
            yield message


def read_pipe() -> Iterator[str]:
    """Messages out of the lines of stdin."""
    composer = Composer()
    for line in sys.stdin:
        message = composer.push(line)
        if message is not None:
            yield message
    if (rest := composer.finish()) is not None:
        yield rest
