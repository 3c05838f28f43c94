"""Errors that are LayerStream's and LangChain's at once: either's users catch what they know."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from langchain_core.exceptions import ContextOverflowError, OutputParserException
from layerstream.errors import AnswerCutOff, PromptTooLong


class ContextOverflow(PromptTooLong, ContextOverflowError):
    """A prompt that is too long: what makes LangChain's agents compact their history and try again."""


class OutputCutOff(AnswerCutOff, OutputParserException):
    """A structured answer that ended before it was whole."""


@contextlib.contextmanager
def overflow_as_langchains() -> Iterator[None]:
    """Within it, a prompt that is too long is LangChain's error, too."""
    try:
        yield
    except PromptTooLong as error:
        raise ContextOverflow(str(error), num_tokens=error.num_tokens) from error
