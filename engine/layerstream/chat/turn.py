"""A :class:`Turn`: everything about the model's next answer in a chat, from messages and tools.

Nothing here runs the model: a turn is a prompt and sampling parameters for ``engine.submit``, and a reader for what
comes back.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerstream.api.params import SamplingParams
from layerstream.chat.formats import GENERIC, ToolFormat, find_format, thinks
from layerstream.chat.grammar import Thoughts, answer_grammar
from layerstream.chat.messages import explain_schema, explain_tools, plain_messages, without_system
from layerstream.chat.reader import Reply, ReplyReader, gather, response_template
from layerstream.chat.tools import Selection, ToolChoice, closed, select_tools
from layerstream.errors import PromptError, ToolError
from layerstream.text.prompt import Message, PromptEncoder

_JSON_FORMATS = ("json_schema", "json_object")


@dataclass(frozen=True, slots=True)
class Turn:
    """What to submit, and how to read the answer.

    Attributes:
        prompt: the text that the chat template made.
        params: the caller's, with the grammar of the answer.
    """

    prompt: str
    params: SamplingParams
    _new_reader: Callable[[], ReplyReader]

    def reader(self) -> ReplyReader:
        """Reads one answer to this turn as it comes."""
        return self._new_reader()

    def read(self, text: str) -> Reply:
        """A whole answer's text, read."""
        reader = self.reader()
        return gather([*reader.push(text), *reader.finish()])


class TurnMaker:
    """Makes turns for one model.

    Args:
        special_tokens: those that a grammar must name by id; asked when a grammar is made.
    """

    def __init__(self, encoder: PromptEncoder, tokenizer: Any, special_tokens: Callable[[], Mapping[str, int]]) -> None:
        self._encoder = encoder
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens
        self._known_form = find_format(encoder.chat_template)
        self._declared = getattr(tokenizer, "response_template", None) if self._known_form is None else None
        self.form: ToolFormat = self._known_form or GENERIC
        """How this model writes calls."""
        self._thinks = thinks(encoder.chat_template, self.form)

    @property
    def knows_tools(self) -> bool:
        """Whether the model's own chat template does; else tools are explained in words."""
        return self._known_form is not None or self._declared is not None

    def make(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        *,
        tools: Iterable[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = None,
        parallel_tool_calls: bool | None = None,
        explain_format: bool = False,
        **template_options: Any,
    ) -> Turn:
        """The next turn of *messages*.

        Args:
            tools: OpenAI's form.
            parallel_tool_calls: several calls in an answer; ``None``: where the model decides to call.
            explain_format: say the JSON schema of ``params.response_format`` in the prompt.
            template_options: passed on to the chat template (``enable_thinking``, ``strftime_now``, …).

        Raises:
            ToolError, PromptError, ConfigurationError: what is wrong with them.
        """
        selection = select_tools(tools, tool_choice, parallel_tool_calls)
        schema = self._schema(params, selection)
        plain = plain_messages(messages)
        if explain_format and schema is not None:
            plain = explain_schema(plain, schema)
        # a form that only the tokenizer can read has no grammar: what must be a call is then asked for in our own words
        is_declared = self._declared is not None and not selection.must_call
        form = None if is_declared else self.form
        prompt = self._render(
            plain, selection, is_native=is_declared or self._known_form is not None, **template_options
        )
        thoughts = self._thoughts(prompt)
        reads_calls = bool(selection.callable) or _goes_on_calling(plain, params, selection)
        is_framed = form is not None and (thoughts != "none" or form.answer_open != "")
        if form is not None and (selection.offered or (schema is not None and is_framed)):
            grammar = answer_grammar(
                form, selection, thoughts=thoughts, schema=schema, special_tokens=self._special_tokens()
            )
            params = dataclasses.replace(params, response_format={"type": "grammar", "grammar": grammar})
        elif schema is not None and params.response_format["type"] == "json_schema":
            params = dataclasses.replace(params, response_format={"type": "json_schema", "schema": schema})
        if self._shows_special_tokens(reads_calls):
            params = dataclasses.replace(params, skip_special_tokens=False)
        template = self._declared or response_template(self.form, thinks=self._thinks, has_tools=reads_calls)
        prefix = self.form.thought_open if thoughts == "begun" else ""
        salt = hashlib.sha256(prompt.encode(errors="surrogatepass")).hexdigest()
        names = frozenset(tool.name for tool in selection.callable) or None

        def new_reader() -> ReplyReader:
            return ReplyReader(template, form, prompt if is_declared else prefix, salt, names)

        return Turn(prompt, params, new_reader)

    def _render(self, messages: list[dict[str, Any]], selection: Selection, *, is_native: bool, **options: Any) -> str:
        offered = selection.offered
        if is_native:
            given = [tool.as_dict() for tool in offered] or None
        else:
            messages, given = explain_tools(messages, offered), None
        try:
            return self._encoder.apply_chat_template(messages, tools=given, **options)
        except PromptError:
            if not any(message["role"] == "system" for message in messages):
                raise
        return self._encoder.apply_chat_template(plain_messages(without_system(messages)), tools=given, **options)

    def _thoughts(self, prompt: str) -> Thoughts:
        """Whether the answer to *prompt* may begin with thoughts."""
        ending = prompt.rstrip()
        if not self._thinks or ending.endswith(self.form.thought_close):
            return "none"
        return "begun" if ending.endswith(self.form.thought_open) else "allowed"

    def _schema(self, params: SamplingParams, selection: Selection) -> Any:
        """The JSON schema that the answer must follow; ``None``: something else, or nothing."""
        wanted = params.response_format
        if wanted is None:
            return None
        if wanted["type"] not in _JSON_FORMATS:
            if selection.offered:
                raise ToolError(
                    f"response_format is {wanted['type']!r} and there are tools: an answer that may be a call can "
                    "otherwise be text or JSON (json_schema, json_object); ask for one of them, or leave the tools out"
                )
            return None
        return closed(wanted["schema"]) if wanted["type"] == "json_schema" else {"type": "object"}

    def _shows_special_tokens(self, reads_calls: bool) -> bool:
        marks = [self.form.answer_open]
        marks += [self.form.thought_open, self.form.thought_close] if self._thinks else []
        marks += [self.form.trigger, self.form.call_open] if reads_calls else []
        special = self._tokenizer.all_special_tokens
        return self._declared is not None or any(token in mark for mark in marks for token in special)


def _goes_on_calling(messages: Sequence[Message], wanted: SamplingParams, selection: Selection) -> bool:
    """Whether an answer without tools may still be a call, as there were some before: not where it must be another."""
    if selection.offered or wanted.response_format is not None:
        return False
    return any("tool_calls" in message for message in messages)
