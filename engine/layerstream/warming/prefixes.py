"""What questions about a document share: the beginning of their prompts, in whole pages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, Protocol

from layerstream.api.request import Request
from layerstream.errors import ConfigurationError, PromptTooLong
from layerstream.kv.keys import page_keys
from layerstream.planner import Plan
from layerstream.text.prompt import QUESTION_PROMPT, Prompt

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """What warming needs of an engine."""

    @property
    def plan(self) -> Plan:
        """What fits where."""
        ...

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts may be messages."""
        ...

    @property
    def compute_seconds_per_token(self) -> float | None:
        """What a prompt's token took so far."""
        ...

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of *prompt*."""
        ...


Submit = Callable[[Sequence[Prompt]], list[Request] | None]
"""Hands prompts in, to answer with one token; ``None``: not now, somebody asks."""

PromptTemplate = str | Callable[[str, str], Prompt]
"""A text with ``{context}`` and ``{question}``, or a function of both that returns a prompt."""

_QUESTIONS = ("Who?", "1. When was it that")  # they share no first token
MOST_REMEMBERED = 1024  # prefixes: a forecast has made those that the run begins with


@dataclass(frozen=True, slots=True)
class Prefix:
    """Token ids (one more than whole pages: a prompt's last token is never stored) and the keys of their pages."""

    token_ids: list[int]
    keys: list[bytes]


class Prefixes:
    """Finds the prefix that questions about a document share.

    Args:
        prompt: the template that questions use; ``None``: LangChain's and LlamaIndex's usual one.
        chat: put a text as a user message through the chat template.
        tenant: whose questions they are.

    Attributes:
        too_long: documents that the context does not hold; they are left out.

    Raises:
        ConfigurationError: a template without both fields.
    """

    def __init__(
        self, engine: Engine, prompt: PromptTemplate | None, chat: Literal["auto"] | bool, tenant: str = ""
    ) -> None:
        template = QUESTION_PROMPT if prompt is None else prompt
        if isinstance(template, str) and not ("{context}" in template and "{question}" in template):
            raise ConfigurationError(
                f"the prompt {template!r:.60} has no {{context}} and {{question}}; pass the template that questions use"
            )
        self.page_tokens = engine.plan.page_tokens
        self.too_long: dict[str, PromptTooLong] = {}
        self._engine = engine
        self._template = template
        self._chat = chat
        self._tenant = tenant
        self._found: dict[str, Prefix | None] = {}

    def of(self, document: str) -> Prefix | None:
        """The prefix of *document*; ``None``: it has not one whole page, or the context does not hold it."""
        if document not in self._found:
            found = self._find(document)
            if len(self._found) >= MOST_REMEMBERED:
                return found
            self._found[document] = found
        return self._found[document]

    def check(self, documents: Sequence[str]) -> None:
        """Return, if one of *documents* has a prefix.

        Raises:
            PromptTooLong: the context holds none of them.
            ConfigurationError: they are shorter than a page, or the prompt puts the question before the context.
        """
        if not documents:
            return
        found = next((document for document in documents if self.of(document) is not None), None)
        if found is not None and self._reaches(found):
            return
        if found is None and self.too_long:
            raise next(iter(self.too_long.values()))
        raise ConfigurationError(
            "no document has a prefix of a whole page: they are shorter than "
            f"{self.page_tokens} tokens, or the prompt puts the question before the context"
            if found is None
            else "the prompt puts the question before the context, so questions share no document: move it behind "
            "(context_first(prompt), or prompt_layout='context_first' of a wrapper)"
        )

    def _reaches(self, document: str) -> bool:
        """Whether what questions about *document* share goes beyond what all prompts share."""
        asked = [self._engine.encode(self._render(document, question)) for question in _QUESTIONS]
        head = _common(asked[0], self._engine.encode(self._render("?", _QUESTIONS[0])))
        return len(_common(*asked)) > len(head)

    def _find(self, document: str) -> Prefix | None:
        try:
            ids = _common(*(self._engine.encode(self._render(document, question)) for question in _QUESTIONS))
        except PromptTooLong as error:
            if not self.too_long:
                logger.warning("a document that is too long is not warmed, nor are others like it: %s", error)
            self.too_long[document] = error
            return None
        whole = len(ids) // self.page_tokens * self.page_tokens
        if not whole:
            return None
        token_ids = [*ids[:whole], ids[0]]
        return Prefix(token_ids, page_keys(token_ids, self.page_tokens, self._tenant))

    def _render(self, context: str, question: str) -> Prompt:
        template = self._template
        if not isinstance(template, str):
            return template(context, question)
        text = template.replace("{context}", context).replace("{question}", question)
        if self._chat is False or (self._chat == "auto" and not self._engine.has_chat_template):
            return text
        return [{"role": "user", "content": text}]


def _common(first: list[int], second: list[int]) -> list[Any]:
    return [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))]
