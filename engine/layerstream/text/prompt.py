"""Prompts to tokens: text, token ids or chat messages, with the tokens that open a text exactly once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from numbers import Integral
from typing import Any, TypeAlias, TypeGuard

from layerstream.errors import ConfigurationError, EmptyPrompt, PromptError, PromptTooLong, shown
from layerstream.text.control import ControlTokens
from layerstream.text.rendering import render_chat
from layerstream.text.template import template_literals
from layerstream.text.traced import Traced

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]

QUESTION_PROMPT = (
    "Use the following pieces of context to answer the question at the end. If you don't know the answer, just say "
    "that you don't know, don't try to make up an answer.\n\n{context}\n\nQuestion: {question}\nHelpful Answer:"
)
"""The question after the context: documents that are retrieved again begin with the same tokens."""


def is_chat_messages(prompt: object) -> TypeGuard[Sequence[Message]]:
    """Whether *prompt* is a list of chat messages (mappings); an empty list is not."""
    return _is_list(prompt) and len(prompt) > 0 and all(isinstance(item, Mapping) for item in prompt)


def is_token_ids(prompt: object) -> TypeGuard[Sequence[int]]:
    """Whether *prompt* is a list of token ids; an empty list is not."""
    return _is_list(prompt) and len(prompt) > 0 and all(_is_int(item) for item in prompt)


def split_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """The prompts in *prompts*: text, one list of token ids or one list of messages is a single prompt.

    An empty list holds no prompts. What the items of other lists are is for :meth:`PromptEncoder.encode` to judge.

    Raises:
        PromptError: neither a prompt nor a list.
    """
    if isinstance(prompts, str) or is_chat_messages(prompts) or is_token_ids(prompts):
        return [prompts]
    if not _is_list(prompts):
        raise _not_a_prompt(prompts)
    return list(prompts)


class PromptEncoder:
    """Encodes prompts for one model.

    Args:
        tokenizer: a transformers tokenizer.
        max_context: tokens that prompt and answer may have together; ``None``: no limit.
        vocab_size: token ids are below this; ``None``: those that the tokenizer has.
        allow_control_tokens: let control tokens in messages be what they look like.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_context: int | None,
        vocab_size: int | None = None,
        allow_control_tokens: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._allow_control_tokens = allow_control_tokens
        self._max_context = max_context
        self._given_vocab_size = vocab_size

    @property
    def chat_template(self) -> str | Mapping[str, str] | None:
        """The tokenizer's: Jinja, or several by name."""
        return getattr(self._tokenizer, "chat_template", None) or None

    @property
    def has_chat_template(self) -> bool:
        """Whether chat messages are understood."""
        return self.chat_template is not None

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of *prompt*.

        Text is encoded as the tokenizer does by default (with BOS where the model has one), unless it begins with the
        opening tokens already. Messages go through the chat template, which writes all special tokens itself: nothing
        is added, and what the messages say becomes none (:mod:`layerstream.text.control`). So it is with the text that
        :meth:`apply_chat_template` returned, as long as it is not made anew of plain text. Token ids are taken as they
        are.

        Raises:
            EmptyPrompt: no tokens (whitespace has some).
            PromptTooLong: no room in the context for one more token.
            PromptError: not a prompt, or a token id outside the vocabulary, the tokenizer's own too.
            ConfigurationError: messages, and the model has no chat template.
        """
        ids = self._encode(prompt)
        if not ids:
            raise EmptyPrompt("the prompt has no tokens; there is nothing to continue")
        self._check_ids(ids)
        if self._max_context is not None and len(ids) >= self._max_context:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens; the context has {self._max_context}, and an answer needs one more: "
                "shorten the prompt, or retrieve fewer documents",
                num_tokens=len(ids),
            )
        return ids

    def apply_chat_template(
        self, messages: Sequence[Message], *, tools: Any = None, add_generation_prompt: bool = True, **options: Any
    ) -> Traced:
        """The prompt text that the model's chat template makes of *messages*; it knows what of it they said.

        Args:
            tools: functions, or their JSON schemas, for templates that know tools.
            add_generation_prompt: end with what opens the assistant's turn.
            options: passed on to the template (``enable_thinking``, ``continue_final_message``, …).

        Raises:
            ConfigurationError: the model has no chat template.
            PromptError: no messages, one without a role, or the template refuses them (an unknown role, say), goes
                wrong, or takes more time or room than a template may.
        """
        if not self.has_chat_template:
            raise ConfigurationError(
                "this model's tokenizer has no chat template, so it cannot be given messages; pass plain text, "
                "or use an instruct model"
            )
        if not is_chat_messages(messages):
            raise PromptError(
                f"chat messages are a list such as [{{'role': 'user', 'content': 'Hi'}}], not {messages!r:.80}"
            )
        for message in messages:  # a template would print nothing for a role that is not there
            if not isinstance(message.get("role"), str):
                raise PromptError(f"a chat message has a 'role' such as 'user'; this one has none: {message!r:.80}")
        return render_chat(self._tokenizer, messages, tools, add_generation_prompt, options)

    def encode_piece(self, text: str, *, is_said: bool = False) -> list[int]:
        """The token ids of *text*, a piece of a prompt, with nothing added. What *is_said* becomes no control token,
        unless the model may be given those.

        Raises:
            PromptError: half a character.
        """
        _check_characters(text)
        if is_said and not self._allow_control_tokens:
            return self._control_tokens.encode(Traced(text))
        return self._tokenize(text, add_special_tokens=False)

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before a text, and behind it: BOS, EOS, or nothing."""
        whole, bare = (self._tokenize("a", add_special_tokens=add) for add in (True, False))
        starts = (at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
        start = next(starts, 0)
        return whole[:start], whole[start + len(bare) :]

    def _encode(self, prompt: Prompt) -> list[int]:
        if is_chat_messages(prompt):
            prompt = self.apply_chat_template(prompt)
        if isinstance(prompt, str):
            _check_characters(prompt)
        if isinstance(prompt, Traced):
            if self._allow_control_tokens:
                return self._tokenize(prompt, add_special_tokens=False)
            return self._control_tokens.encode(prompt)
        if isinstance(prompt, str):
            return self._tokenize(prompt, add_special_tokens=not prompt.startswith(self._openings))
        if is_token_ids(prompt):
            return [int(item) for item in prompt]
        if _is_list(prompt) and not prompt:
            return []
        raise _not_a_prompt(prompt)

    def _check_ids(self, ids: Sequence[int]) -> None:
        """Refuse what the embedding has no row for."""
        lowest, highest = min(ids), max(ids)
        if lowest >= 0 and highest < self._vocab_size:
            return
        wrong = lowest if lowest < 0 else highest
        names = self._tokenizer.convert_ids_to_tokens([wrong]) if wrong > 0 else None
        named = (
            "" if not names or names[0] is None else f" ({names[0]!r}, which the tokenizer has and the model does not)"
        )
        raise PromptError(
            f"token id {wrong}{named} is not in the vocabulary; expected 0 to {self._vocab_size - 1}: leave it out, or "
            "take the tokenizer that belongs to the model"
        )

    def _tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # verbose: the tokenizer's own warning about long texts would come beside our error
        return self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        templates = self.chat_template or {}
        sources = templates.values() if isinstance(templates, Mapping) else [templates]
        return ControlTokens(self._tokenizer, map(template_literals, sources))

    @cached_property
    def _openings(self) -> tuple[str, ...]:
        """What a text begins with that has its opening tokens already.

        The BOS as a rule; GLM has none and opens with two other tokens, which its tokenizer adds as well.
        """
        added = "".join(self._tokenizer.convert_ids_to_tokens(self.frame[0]))
        return tuple(opening for opening in (added, self._tokenizer.bos_token) if opening)

    @cached_property
    def _vocab_size(self) -> int:
        if self._given_vocab_size is not None:
            return self._given_vocab_size
        return 1 + max(self._tokenizer.get_vocab().values())  # its len() is less where ids have gaps


def _check_characters(text: str) -> None:
    """Refuse half characters, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt has half a character (a lone surrogate) at {error.start}: decode the text with "
            "errors='replace', or leave it out"
        ) from error


def _not_a_prompt(value: object) -> PromptError:
    hint = "; put the message into a list" if isinstance(value, Mapping) else ""
    hint = "; call tolist() on it" if hasattr(value, "tolist") else hint
    return PromptError(
        "a prompt is text, a list of token ids or a list of chat messages, "
        f"not {type(value).__name__} {shown(value)}{hint}"
    )


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)  # NumPy's integers too
