"""Encodes what a chat template wrote, so that nothing that was said to it becomes a control token.

Control tokens are the tokenizer's special tokens, and those added tokens that the chat template writes itself: in its
own words (``<tool_call>``, ``<think>``), or put together, as in ``'<|' + role + '|>'``. Whitespace is none of them. In
what a template wrote they are tokens; in what was said to it (contents, names, tools, documents) their letters are
ordinary text. transformers' ``sanitize_control_tokens`` marks whole tokens in the messages: it does not know of tokens
that come about in the template, the marks change what templates do, and the text is encoded in pieces.

A text is encoded as a whole, as transformers encodes it. Only if that made a control token of something that was said,
it is encoded again by a copy of the tokenizer, for which control tokens are spelt in private characters, and so are
those that the template wrote. All else is as it was, in one pass over the whole text, and what was said is letters to
the copy, however it normalises and merges. If the vocabulary itself has a control token's letters for a piece, as that
of Unigram models does, they are taken apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from tokenizers import AddedToken, Tokenizer

from layerstream.text.traced import SAID, WRITTEN, Traced, origin_of

_LEAD = "\U00100000"  # begins every private spelling
_BREAK = _LEAD + "\U00100001"
_FIRST = 0x100002
_MOST_COPIES = 4


class ControlTokens:
    """The control tokens of one tokenizer and its chat templates. Any thread may encode.

    Args:
        tokenizer: a transformers tokenizer.
        literals: texts that its templates can write by themselves.
    """

    def __init__(self, tokenizer: Any, literals: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._added: dict[str, int] = dict(tokenizer.added_tokens_encoder)
        self._unknown: int | None = tokenizer.unk_token_id
        known, texts = tokenizer.added_tokens_decoder, "\0".join(literals)
        self._control = frozenset(
            token
            for token, number in self._added.items()
            if known[number].special or (token in texts and not token.isspace())
        )
        self._copies: dict[frozenset[str], _Respelt | None] = {}
        self._pattern = re.compile(
            "|".join(
                rf"(?<!\w){re.escape(token)}(?!\w)" if known[self._added[token]].single_word else re.escape(token)
                for token in sorted(self._added, key=len, reverse=True)
            )
            or "(?!)"
        )

    def encode(self, text: Traced) -> list[int]:
        """The token ids of *text*."""
        batch = self._tokenizer(text, add_special_tokens=False, verbose=False)
        origin = origin_of(text)
        if SAID not in origin:
            return batch["input_ids"]
        parts = list(self._parts(text, origin))
        control = self._control | {part for part, is_token in parts if is_token}
        if not self._is_forged(text, origin, control, batch):
            return batch["input_ids"]
        if batch.is_fast and (copy := self._copy(control)) is not None:
            return copy.encode(parts)
        return list(self._encode_apart(parts, control))

    def _parts(self, text: str, origin: str) -> Iterator[tuple[str, bool]]:
        """The control tokens that the template wrote in *text*, and what is between them; which of both it is."""
        done = 0
        for written in re.finditer(f"{WRITTEN}+", origin):
            for match in self._pattern.finditer(text, *written.span()):
                if not match[0].isspace():
                    yield text[done : match.start()], False
                    yield match[0], True
                    done = match.end()
        yield text[done:], False

    def _is_forged(self, text: str, origin: str, control: frozenset[str], batch: Any) -> bool:
        """Whether one of the *control* tokens in *batch* is there because of what was said."""
        if not batch.is_fast:
            return any(
                token in text[said.start() : said.end()]
                for said in re.finditer(f"{SAID}+", origin)
                for token in control
            )
        tokens = {self._added[token]: token for token in control}
        for position, number in enumerate(batch["input_ids"]):
            if number in tokens:
                start, end = batch.token_to_chars(position) or (0, len(text))
                own = text.find(tokens[number], start, end)  # it may take the space before it along
                is_said = SAID in (origin[start:end] if own < 0 else origin[own : own + len(tokens[number])])
                if is_said and (number != self._unknown or tokens[number] in text[start:end]):
                    return True
        return False

    def _copy(self, control: frozenset[str]) -> _Respelt | None:
        """A copy of the tokenizer with *control* respelt; ``None``: it cannot be copied."""
        if control not in self._copies:
            if len(self._copies) >= _MOST_COPIES:
                self._copies.clear()
            numbers = {token: self._added[token] for token in control}
            copy = _Respelt(self._tokenizer.backend_tokenizer, numbers, self._unknown)
            self._copies[control] = copy if copy.is_exact else None
        return self._copies[control]

    def _encode_apart(self, parts: Iterable[tuple[str, bool]], control: frozenset[str]) -> Iterator[int]:
        """Piece by piece: for tokenizers that are Python."""
        numbers = {self._added[token] for token in control} - {self._unknown}
        for part, is_token in parts:
            if is_token:
                yield self._added[part]
                continue
            ids = self._encode_plain(part)
            if numbers.isdisjoint(ids):
                yield from ids
                continue
            cuts = [match.start() + 1 for match in self._pattern.finditer(part) if match[0] in control]
            for start, end in pairwise([0, *cuts, len(part)]):
                yield from self._encode_plain(part[start:end])

    def _encode_plain(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []


class _Respelt:
    """A copy of a tokenizer in which some added tokens have private names.

    Attributes:
        is_exact: whether its ids can be told from the original's.
    """

    def __init__(self, tokenizer: Tokenizer, numbers: Mapping[str, int], unknown: int | None) -> None:
        content = json.loads(tokenizer.to_str())
        content.update(post_processor=None, truncation=None, padding=None)
        self._names = {token: _LEAD + chr(_FIRST + position) for position, token in enumerate(sorted(numbers))}
        originals: dict[str, int] = {}
        for added in content["added_tokens"]:
            if (token := added["content"]) in self._names:
                added.update(content=self._names[token], normalized=False)
            originals[added["content"]] = added["id"]
        self._tokenizer = Tokenizer.from_str(json.dumps(content))
        self._tokenizer.add_tokens([AddedToken(_BREAK, normalized=False)])
        own = self._tokenizer.token_to_id
        self._originals = {own(name): number for name, number in originals.items()}
        self._break = own(_BREAK)
        self._forbidden = set(numbers.values()) - {unknown}
        new = {own(name) for name in (*self._names.values(), _BREAK)}
        self.is_exact = new.isdisjoint(tokenizer.get_vocab(with_added_tokens=False).values())

    def encode(self, parts: Iterable[tuple[str, bool]]) -> list[int]:
        """The original's ids of *parts*: texts, and tokens by name."""
        text = "".join(
            self._names[part] if is_token else part.replace(_LEAD, _LEAD + _BREAK) for part, is_token in parts
        )
        while True:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            pieces = [
                span for number, span in zip(encoding.ids, encoding.offsets, strict=True) if self._is_token(number)
            ]
            cuts = [start + 1 for start, end in pieces if end - start > 1]
            if not cuts:
                break
            text = _BREAK.join(text[start:end] for start, end in pairwise([0, *cuts, len(text)]))
        return [self._originals.get(number, number) for number in encoding.ids if number != self._break]

    def _is_token(self, number: int) -> bool:
        """Whether letters became a control token, because the vocabulary has them for a piece."""
        return number in self._forbidden and number not in self._originals
