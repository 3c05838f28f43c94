"""How this model is spoken to: words to tokens, chats to prompts, tools to a grammar."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from layerstream.api.params import Params, as_params
from layerstream.chat.tools import ToolChoice
from layerstream.chat.turn import Turn
from layerstream.front.opened import Opened
from layerstream.text.prompt import Prompt


class Phrasing(Opened):
    """Makes prompts, and asks nothing of the model."""

    @property
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer."""
        return self._parts.tokenizer

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids that *prompt* stands for, with the model's opening tokens once."""
        return self._intake.encoder.encode(prompt)

    def encode_piece(self, text: str, *, is_said: bool = False) -> list[int]:
        """The token ids of *text* with nothing added: a piece of a prompt. What *is_said* (a retrieved document)
        becomes no control token."""
        return self._intake.encoder.encode_piece(text, is_said=is_said)

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """The token ids that the model's tokenizer puts before a text, and behind it."""
        return self._intake.encoder.frame

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts may be lists of chat messages."""
        return self._intake.encoder.has_chat_template

    def apply_chat_template(self, messages: Seq[Mapping[str, Any]], tools: Any = None, **options: Any) -> str:
        """The prompt text that the model's chat template makes of *messages*."""
        return self._intake.encoder.apply_chat_template(messages, tools=tools, **options)

    @property
    def knows_tools(self) -> bool:
        """Whether the model's chat template has a place for tools that is understood here; else they are explained in
        words, and the grammar does the rest."""
        return self._intake.turns.knows_tools

    def turn(
        self,
        messages: Seq[Mapping[str, Any]],
        params: Params = None,
        *,
        tools: Iterable[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = None,
        parallel_tool_calls: bool | None = None,
        explain_format: bool = False,
        **template_options: Any,
    ) -> Turn:
        """The model's next turn in a chat, to be submitted and read::

            turn = engine.turn(messages, params, tools=[{"type": "function", "function": {...}}])
            reply = turn.read(engine.submit(turn.prompt, turn.params).result().text)
            reply.text, reply.thought, reply.calls

        Args:
            tools: functions that the model may call, in OpenAI's form. Every model can be given tools: a chat template
                that knows them is used, else they are explained in the prompt. Calls are well-formed by grammar.
            tool_choice: ``"auto"``, ``"any"``, ``"none"``, or the name of a tool.
            parallel_tool_calls: several calls in one answer; ``None``: yes, where the model decides to call.
            explain_format: say the JSON schema of ``params.response_format`` in the prompt.
            template_options: passed on to the chat template (``enable_thinking``, …).

        Raises:
            ToolError, PromptError, ConfigurationError: what is wrong, before anything runs.
        """
        return self._intake.turns.make(
            messages,
            as_params(params),
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            explain_format=explain_format,
            **template_options,
        )
