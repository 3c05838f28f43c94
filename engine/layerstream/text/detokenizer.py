"""Tokens to text, one at a time, never showing half a character.

A token may hold part of a character, and its text may depend on the token before it (a leading space, in
SentencePiece-like vocabularies). So each new token is decoded behind a few that are out already, and what that adds is
shown once it does not end in a replacement character.

Invariants: ``context`` is text that is out, ``pending`` the tokens after it; both are short, so the cost of a token
does not grow with the answer. ``shown`` is how ``context`` decodes when nothing follows it. The context starts where a
character starts: byte tokens (``<0xE2>``) decode all or nothing, a run of them that starts inside a character is
replacement characters to its end.

``tokenizers.decoders.DecodeStream`` does the same and does not fit: it cannot say what is left at the end, it raises
when a run of byte tokens turns out invalid, and it holds invalid bytes back for ever at a growing cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"
_PROMPT_TOKENS = 8  # of the prompt in front of the answer, more where those are invisible or start inside a character
_MAX_PENDING = 24  # tokens; past that, replacement characters are what the model wrote
_LONGEST_CHARACTER = 4  # bytes, and a byte is a token at worst


class Detokenizer:
    """Incremental text of one answer: the texts of all :meth:`push` and of :meth:`finish` make up the whole.

    That whole is what a decode of prompt and answer adds to a decode of the prompt. One exception: when a run of byte
    tokens becomes invalid, decoding it at once loses its good characters too; here those that were shown stay.

    Args:
        tokenizer: a transformers tokenizer.
        prompt_ids: the tokens before the answer; their text is not shown. A character that they begin is theirs.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Any, *, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context = self._end_of(prompt_ids)
        self._shown = self._text = self._decode(self._context)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Text that *token_id* completes; may be empty."""
        text = self._decode([*self._context, *self._pending, token_id])
        if text == self._text and not self._decode([token_id, token_id]):
            return ""  # special or unknown; doubled, because a space alone at the front would be stripped
        self._pending.append(token_id)
        self._text = text
        if not text.endswith(_REPLACEMENT):
            return self._show()
        return self._show_invalid() if len(self._pending) > _MAX_PENDING else ""

    def finish(self) -> str:
        """Whatever is left, incomplete characters as U+FFFD."""
        return self._show()

    def _show(self) -> str:
        """All text is out: what is new becomes the context of what comes."""
        fresh = self._fresh()
        self._context = self._pending if fresh else [*self._context, *self._pending]
        self._pending = []
        self._shown = self._text = self._decode(self._context)
        return fresh

    def _show_invalid(self) -> str:
        """Bytes that are no text go on and on: show them but for the end, which may still become a character.

        The new context keeps the first tokens, which hold what made a run of byte tokens invalid and go on doing so,
        and the last ones.
        """
        fresh = self._fresh()
        num_open = min(len(fresh) - len(fresh.rstrip(_REPLACEMENT)), _LONGEST_CHARACTER)
        self._context = self._pending[:_LONGEST_CHARACTER] + self._pending[-4 * _LONGEST_CHARACTER :]
        self._pending = []
        self._text = self._decode(self._context)
        self._shown = self._text[: len(self._text) - num_open]
        return fresh[: len(fresh) - num_open]

    def _fresh(self) -> str:
        """What the pending tokens add to what was shown."""
        if self._text.startswith(self._shown) or self._shown.endswith(_REPLACEMENT):
            return self._text[len(self._shown) :]
        return self._decode(self._pending)  # they made a run of byte tokens invalid whose start is out

    def _end_of(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last tokens of the prompt, from a character's start on and with something visible."""
        size = _PROMPT_TOKENS
        while True:
            tokens = list(prompt_ids[-size:])
            text = self._decode(tokens)
            if (text and not text.startswith(_REPLACEMENT)) or size >= len(prompt_ids):
                return tokens
            size *= 4

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
