"""``layerstream run``: a prompt, answered."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerstream.cli.answering import Answer, is_terminal, say
from layerstream.cli.failures import FAILED
from layerstream.cli.options import EngineOptions, SamplingOptions, with_options
from layerstream.errors import ConfigurationError, EmptyPrompt, PromptError

if TYPE_CHECKING:
    from layerstream.api.completion import Completion
    from layerstream.api.params import SamplingParams
    from layerstream.chat.turn import Turn
    from layerstream.engine import LayerStream

STDIN = "-"
_MODEL = re.compile(r"demo|[.~/]\S*|[\w.-]+/[\w.-]+|\S+\.gguf")


@with_options
def run(
    model: Annotated[
        str | None, typer.Argument(help="A folder, a hub id, a .gguf file; the bundled reader if not given.")
    ] = None,
    prompt: Annotated[str | None, typer.Argument(help="What to answer; '-' or nothing: what stdin has.")] = None,
    named: Annotated[str | None, typer.Option("--model", help="The model, if it is not the first word.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the prompt.")] = None,
    json_schema: Annotated[
        str | None, typer.Option(help="The answer is JSON of this schema: a file, or the schema itself.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is: no chat template.")] = False,
    *,
    sampling: SamplingOptions,
    engine: EngineOptions,
) -> None:
    """Answer a prompt. The answer goes to stdout as it comes, all else to stderr."""
    chosen, text = choose([word for word in (model, prompt) if word is not None], named)
    if raw and system is not None:
        raise ConfigurationError("--raw continues the prompt alone: leave out --system, or put it into the prompt")
    schema = None if json_schema is None else load_schema(json_schema)
    params = sampling.params(response_format=None if schema is None else {"type": "json_schema", "schema": schema})
    text = check_text(read_stdin() if text in (None, STDIN) else text)
    with engine.open(chosen) as opened:
        turn = None if raw else make_turn(opened, text, system, params)
        before = opened.stats()
        request = opened.submit(text, params) if turn is None else opened.submit(turn.prompt, turn.params)
        completion = Answer(turn).show(request)
        if is_terminal(sys.stderr):
            from layerstream.cli.report import describe_work

            say(f"{completion.metrics.seconds:.1f} s · {describe_work(before, opened.stats())}")
    conclude(completion, must_be_whole=schema is not None)


def choose(words: list[str], named: str | None) -> tuple[str, str | None]:
    """The model, and the prompt if it is there: *words* are both, or one of the two.

    Raises:
        ConfigurationError: two words, and the model is *named* besides.
    """
    from layerstream.handle import default_model

    if named is not None:
        if len(words) > 1:
            raise ConfigurationError(f"the model is named twice, {words[0]!r} and --model {named!r}: leave out one")
        return named, words[0] if words else None
    if len(words) == 2:
        return words[0], words[1]
    if words and is_model(words[0]):
        return words[0], None
    return default_model(), words[0] if words else None


def is_model(word: str) -> bool:
    """Whether a single word is rather a model than a prompt: it is written like one, or lies here."""
    return word not in ("", STDIN) and (_MODEL.fullmatch(word) is not None or (len(word) < 256 and Path(word).exists()))


def load_schema(text: str) -> Any:
    """The JSON schema in *text*, or in the file that it names.

    Raises:
        ConfigurationError: no such file, or no JSON.
    """
    is_itself = text.lstrip().startswith("{")
    try:
        return json.loads(text if is_itself else Path(text).read_text("utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"--json-schema {text}: {error.strerror or error}; expected a file, or a schema such as "
            '{"type": "object"}'
        ) from error
    except (ValueError, RecursionError) as error:
        where = "--json-schema" if is_itself else text
        raise ConfigurationError(f"{where} is no JSON: {error}") from error


def read_stdin() -> str:
    """All that stdin has, without the new line at its end."""
    if is_terminal(sys.stdin):
        say("the prompt, please; Ctrl-D on a line of its own ends it")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"stdin is no UTF-8 text (byte {error.start}); convert it, with iconv for instance"
        ) from error


def check_text(text: str | None) -> str:
    """*text*, if it is one.

    Raises:
        PromptError: nothing, or bytes that are no text.
    """
    if not text or not text.strip():
        raise EmptyPrompt('there is no prompt; pass one: layerstream run MODEL "prompt", or pipe it in')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"the prompt is no UTF-8 text, at character {error.start}") from error
    return text


def make_turn(engine: LayerStream, text: str, system: str | None, params: SamplingParams) -> Turn | None:
    """The prompt in the model's chat template; ``None``: the model has none, and continues the prompt.

    Raises:
        ConfigurationError: a system message, and no template for it.
    """
    if not engine.has_chat_template:
        if system is not None:
            raise ConfigurationError(
                f"{engine.model_name} has no chat template, so there is no place for --system: put it into the prompt"
            )
        return None
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": text})
    return engine.turn(messages, params, explain_format=params.response_format is not None)


def conclude(completion: Completion, *, must_be_whole: bool) -> None:
    """Say it if the answer was cut off; half a JSON is a failure."""
    if completion.finish_reason != "length":
        return
    count = completion.usage.completion_tokens
    if must_be_whole:
        typer.echo(
            f"layerstream: the JSON was cut off after {count} tokens and is not whole: raise --max-tokens", err=True
        )
        raise typer.Exit(FAILED)
    say(f"layerstream: cut off after {count} tokens; --max-tokens allows more")
