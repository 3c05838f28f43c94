"""Prompts to tokens: text, token ids or chat messages, with exactly one BOS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from layerstream.errors import ConfigurationError, EmptyPrompt, PromptError, PromptTooLong

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]


def is_chat(prompt: object) -> bool:
    """Whether *prompt* is a list of chat messages (mappings with a role)."""
    return _is_list(prompt) and len(prompt) > 0 and all(isinstance(item, Mapping) for item in prompt)  # type: ignore[arg-type]


def is_token_ids(prompt: object) -> bool:
    """Whether *prompt* is a list of token ids."""
    return _is_list(prompt) and len(prompt) > 0 and all(_is_int(item) for item in prompt)  # type: ignore[arg-type]


def split_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """The prompts in *prompts*: text, one list of ids or one list of messages is a single prompt."""
    if isinstance(prompts, str) or is_chat(prompts) or is_token_ids(prompts):
        return [prompts]  # type: ignore[list-item]
    if not _is_list(prompts):
        raise PromptError(f"a prompt is text, a list of token ids or a list of messages, not {type(prompts).__name__}")
    return list(prompts)  # type: ignore[arg-type]


class PromptEncoder:
    """Encodes prompts for one model.

    Args:
        tokenizer: a transformers tokenizer.
        max_context: tokens that prompt and answer may have together.
        vocab_size: rows of the model's embedding, which may be more than the tokenizer has tokens.
    """

    def __init__(self, tokenizer: Any, *, max_context: int, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._max_context = max_context
        self._vocab_size = vocab_size

    @property
    def has_chat_template(self) -> bool:
        """Whether chat messages are understood."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of *prompt*.

        Text is encoded as the tokenizer does by default (with BOS where the model has one), unless it starts with the
        BOS already, as text from a chat template does. Messages go through the chat template.

        Raises:
            EmptyPrompt, PromptTooLong, PromptError: nothing in it, too much, or not a prompt.
        """
        if isinstance(prompt, str):
            ids = self._encode_text(prompt)
        elif is_chat(prompt):
            text = self.apply_chat_template(prompt)  # type: ignore[arg-type]
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        elif is_token_ids(prompt):
            ids = [int(item) for item in prompt]  # type: ignore[arg-type]
            self._check_ids(ids)
        elif _is_list(prompt) and not prompt:
            ids = []
        else:
            raise PromptError(f"a prompt is text, a list of token ids or a list of messages, not {prompt!r:.80}")
        if not ids:
            raise EmptyPrompt("the prompt has no tokens; there is nothing to continue")
        if len(ids) >= self._max_context:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens; the context has {self._max_context}, and an answer needs one more: "
                "shorten the prompt, or retrieve fewer documents"
            )
        return ids

    def apply_chat_template(
        self, messages: Sequence[Message], *, tools: Any = None, add_generation_prompt: bool = True, **options: Any
    ) -> str:
        """The prompt text that the model's chat template makes of *messages*.

        Raises:
            ConfigurationError: the model has no chat template.
            PromptError: the template refuses the messages (an unknown role, say).
        """
        if not self.has_chat_template:
            raise ConfigurationError(
                "this model's tokenizer has no chat template, so it cannot be given messages; pass plain text, "
                "or use an instruct model"
            )
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False, **options
            )
        except (ValueError, TypeError, KeyError, _template_error()) as error:
            raise PromptError(f"the model's chat template refuses these messages: {error}") from error

    def _encode_text(self, text: str) -> list[int]:
        bos = self._tokenizer.bos_token
        has_bos = bool(bos) and text.startswith(bos)
        return self._tokenizer(text, add_special_tokens=not has_bos)["input_ids"]

    def _check_ids(self, ids: list[int]) -> None:
        wrong = next((item for item in ids if not 0 <= item < self._vocab_size), None)
        if wrong is not None:
            raise PromptError(f"token id {wrong} is not in the vocabulary of {self._vocab_size} tokens")


def _template_error() -> type[Exception]:
    from jinja2 import TemplateError

    return TemplateError


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_int(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
