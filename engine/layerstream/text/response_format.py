"""Grammars for answers: JSON schemas, regular expressions, choices and EBNF, compiled by llguidance.

A compiled grammar says which tokens may come next, and which must: those enter a sequence without being sampled, and so
without a sweep of their own. Whitespace between JSON tokens is not flexible, or a model could write blanks for ever.
"""

from __future__ import annotations

import json
import textwrap
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from layerstream.errors import GrammarError, MissingExtra

MOST_COMPILED = 64
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as most models write it


class Grammars:
    """Compiles response formats for one tokenizer; safe to use from several threads.

    Args:
        tokenizer: a fast transformers tokenizer.
        vocab_size: tokens that logits are for; at least the tokenizer's.
        end_token_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_token_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_token_ids = sorted(end_token_ids)
        self._wrapped: Any = None
        self._special_tokens: dict[str, int] | None = None
        self._compiled: OrderedDict[str, GrammarConstraint] = OrderedDict()

    def compile(self, response_format: Mapping[str, Any]) -> GrammarConstraint:
        """The constraint at its beginning, for one sequence.

        Args:
            response_format: as :class:`~layerstream.api.params.SamplingParams` has it.

        Raises:
            GrammarError: it cannot be read, or no text can ever meet it; says why.
            MissingExtra: llguidance is not installed.
        """
        try:
            key = json.dumps(response_format, sort_keys=True)
        except (TypeError, ValueError, RecursionError) as error:
            raise GrammarError(f"response_format is nothing that JSON can say: {error}") from error
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compiled[key] = self._compile(response_format)
            while len(self._compiled) > MOST_COMPILED:
                self._compiled.popitem(last=False)
        return compiled.fork()

    def special_tokens(self) -> dict[str, int]:
        """The tokens that a grammar must name by their ids, ``<[128010]>``: written as text they would be others.

        Raises:
            MissingExtra, GrammarError: as :meth:`compile`.
        """
        if self._special_tokens is None:
            wrapped = self._wrap()
            added = self._tokenizer.get_added_vocab()
            self._special_tokens = {text: index for text, index in added.items() if wrapped.is_special_token(index)}
        return self._special_tokens

    def _wrap(self) -> Any:
        """The tokenizer as llguidance sees it."""
        if self._wrapped is None:
            try:
                from llguidance.hf import from_tokenizer
            except ImportError as error:
                raise MissingExtra("llguidance", "guided") from error
            try:
                self._wrapped = from_tokenizer(self._tokenizer, self._vocab_size, self._end_token_ids or None)
            except ValueError as error:
                raise GrammarError(f"response_format does not work with this model's tokenizer: {error}") from error
        return self._wrapped

    def _compile(self, response_format: Mapping[str, Any]) -> GrammarConstraint:
        wrapped = self._wrap()
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(wrapped, _grammar(response_format), log_level=0)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise GrammarError(f"response_format cannot be used: {error}") from error
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())
            raise GrammarError(f"response_format cannot be used: {textwrap.shorten(reason, 300)}")
        constraint = GrammarConstraint(matcher, self._vocab_size, frozenset(self._end_token_ids))
        if not constraint.mask_without_ends().any() and not matcher.is_accepting():
            raise GrammarError("response_format can never be met: no text matches it")
        return constraint


class GrammarConstraint:
    """One sequence's place in a grammar; see :class:`~layerstream.core.constraint.Constraint`."""

    def __init__(self, matcher: Any, vocab_size: int, end_token_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._end_token_ids = end_token_ids

    @property
    def is_over(self) -> bool:
        """Whether the text is complete and nothing may follow."""
        return self._matcher.is_stopped()

    def mask(self) -> np.ndarray:
        """Which tokens may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        mask = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
        if len(mask) < self._vocab_size:
            mask = np.pad(mask, (0, self._vocab_size - len(mask)))
        if self._matcher.is_error() or not mask.any():
            raise GrammarError(f"the answer cannot go on within its response_format: {self._matcher.get_error()}")
        return mask

    def mask_without_ends(self) -> np.ndarray:
        """:meth:`mask`, the tokens that end an answer left out."""
        mask = self.mask()
        mask[[token for token in self._end_token_ids if token < self._vocab_size]] = False
        return mask

    def accept(self, token_id: int) -> None:
        """The sequence went on with *token_id*."""
        if not self.is_over and not self._matcher.consume_token(token_id):
            raise GrammarError(f"token {token_id} is not within the response_format: {self._matcher.get_error()}")

    def forced(self) -> list[int]:
        """The tokens that must come next."""
        return [] if self.is_over else list(self._matcher.compute_ff_tokens())

    def admits(self, token_ids: Sequence[int]) -> bool:
        """Whether the sequence may go on with *token_ids*."""
        return self._matcher.validate_tokens(list(token_ids)) == len(token_ids)

    def fork(self) -> GrammarConstraint:
        """A copy that goes its own way."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocab_size, self._end_token_ids)


def _grammar(response_format: Mapping[str, Any]) -> str:
    from llguidance import LLMatcher, grammar_from

    match response_format["type"]:
        case "json_object":
            return LLMatcher.grammar_from_json_schema({"type": "object"}, defaults=JSON_STYLE)  # pyright: ignore[reportArgumentType]
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(response_format["schema"], defaults=JSON_STYLE)  # pyright: ignore[reportArgumentType]
        case "regex":
            return LLMatcher.grammar_from_regex(response_format["regex"])
        case "choice":
            return grammar_from("choice", json.dumps(response_format["choices"]))
        case _:
            return grammar_from("grammar", response_format["grammar"])
