"""Tokens to text, one at a time, never showing half a character.

A token may hold part of a character, and its text may depend on the token before it (a leading space, in
SentencePiece-like vocabularies). So a short window of tokens is decoded twice, with and without the new token, and what
the longer text adds is shown once it does not end in a replacement character. The window starts a few tokens into the
prompt, moves along, and keeps the cost per token constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\ufffd"
_PROMPT_TOKENS = 6  # of the prompt in front of the answer: enough for any multi-token character
_LONGEST_CHARACTER = 8  # tokens; past that, a replacement character is what the model wrote


class Detokenizer:
    """Incremental text of one answer.

    Args:
        tokenizer: a transformers tokenizer.
        prompt_ids: the tokens before the answer; their text is not shown.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Any, *, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = list(prompt_ids[-_PROMPT_TOKENS:])
        self._shown = len(self._window)  # of the window, how many tokens' text is out

    def push(self, token_id: int) -> str:
        """Text that *token_id* completes; may be empty."""
        self._window.append(token_id)
        before, after = self._texts()
        waiting = len(self._window) - self._shown
        if len(after) <= len(before) or (after.endswith(_REPLACEMENT) and waiting < _LONGEST_CHARACTER):
            return ""
        return self._show(before, after)

    def finish(self) -> str:
        """Whatever is left, incomplete characters as U+FFFD."""
        before, after = self._texts()
        return self._show(before, after)

    def _show(self, before: str, after: str) -> str:
        self._window = self._window[max(0, self._shown - 1) :] if self._shown else self._window
        self._shown = len(self._window)
        return after[len(before) :]

    def _texts(self) -> tuple[str, str]:
        return self._decode(self._window[: self._shown]), self._decode(self._window)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
