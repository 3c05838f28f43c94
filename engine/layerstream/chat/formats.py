"""How model families write tool calls and thoughts: a row each, chosen by what the chat template says.

A family that is not here, and a model whose template knows no tools, is told about tools in :data:`GENERIC`'s words:
the form that Hermes models, Qwen and many fine-tunes were trained on, and the easiest one for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import regex

NAME = "{name}"
_NAME_PATTERN = r"(?P<name>[\w.-]+)"


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """What stands around a call.

    Attributes:
        telltales: parts of a chat template; all of them are in this family's.
        call_open, call_close: around each call; where ``call_open`` has ``{name}``, what follows are the arguments.
        arguments_key: else a call is a JSON object of ``"name"`` and this key.
        section_open, section_close: around all calls together.
        separator: between calls.
        answer_open: before an answer that is no call.
        thought_open, thought_close: around what the model thinks first.
    """

    name: str
    telltales: tuple[str, ...]
    call_open: str = ""
    call_close: str = ""
    arguments_key: str = "arguments"
    section_open: str = ""
    section_close: str = ""
    separator: str = ""
    answer_open: str = ""
    thought_open: str = "<think>"
    thought_close: str = "</think>"

    @property
    def trigger(self) -> str:
        """What a call begins with wherever it stands; empty: calls are told by their first brace."""
        return self.section_open or self.call_open.split(NAME)[0]

    def opening(self, name: str) -> str:
        """Everything of a call of *name* before its arguments."""
        if NAME in self.call_open:
            return self.call_open.replace(NAME, name)
        return f'{self.call_open}{{"name": "{name}", "{self.arguments_key}": '

    def closing(self) -> str:
        """Everything after the arguments."""
        return self.call_close if NAME in self.call_open else "}" + self.call_close

    @property
    def header(self) -> regex.Pattern[str]:
        """Matches a call, behind the trigger, up to the brace of its arguments; says its name."""
        if NAME not in self.call_open:
            return regex.compile(
                r'\{\s*"name"\s*:\s*"' + _NAME_PATTERN + r'"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
            )
        before, after = self.call_open.split(NAME)
        before = before.removeprefix(self.trigger)
        return regex.compile(regex.escape(before) + _NAME_PATTERN + r"\s*" + _loosely(after) + r"\s*(?=\{)")


HERMES = ToolFormat("hermes", ("<tool_call>", "</tool_call>"), "<tool_call>\n", "\n</tool_call>", separator="\n")
GENERIC = ToolFormat("generic", (), HERMES.call_open, HERMES.call_close, separator="\n")

FORMATS = (
    ToolFormat(
        "harmony", ("<|channel|>", "<|constrain|>"),
        f"<|channel|>commentary to=functions.{NAME} <|constrain|>json<|message|>",
        answer_open="<|channel|>final<|message|>",
        thought_open="<|channel|>analysis<|message|>", thought_close="<|end|><|start|>assistant",
    ),
    ToolFormat(
        "deepseek-v3", ("<｜tool▁calls▁begin｜>", "```json"),
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{NAME}\n```json\n", "\n```<｜tool▁call▁end｜>",
        section_open="<｜tool▁calls▁begin｜>", section_close="<｜tool▁calls▁end｜>", separator="\n",
    ),
    ToolFormat(
        "deepseek-v3.1", ("<｜tool▁calls▁begin｜>",),
        f"<｜tool▁call▁begin｜>{NAME}<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
        section_open="<｜tool▁calls▁begin｜>", section_close="<｜tool▁calls▁end｜>",
    ),
    ToolFormat("mistral-v11", ("[TOOL_CALLS]", "[ARGS]"), f"[TOOL_CALLS]{NAME}[ARGS]",
               thought_open="[THINK]", thought_close="[/THINK]"),
    ToolFormat("mistral", ("[TOOL_CALLS] [",), section_open="[TOOL_CALLS] [", section_close="]", separator=", "),
    ToolFormat("mistral-tekken", ("[TOOL_CALLS][",), section_open="[TOOL_CALLS][", section_close="]", separator=", "),
    HERMES,
    ToolFormat("llama", ("<|start_header_id|>", '"parameters": '), arguments_key="parameters", separator="; "),
)  # fmt: skip

_XML_CALLS = ("<function=", "<arg_key>")  # Qwen 3 Coder's, GLM 4.5's: marks of Hermes around another language


def find_format(template: str | Mapping[str, str] | None) -> ToolFormat | None:
    """The format that a chat template teaches; ``None``: it knows no tools, or none of these."""
    text = _text(template)
    if not regex.search(r"\btools\b", text) or any(mark in text for mark in _XML_CALLS):
        return None
    return next((row for row in FORMATS if all(mark in text for mark in row.telltales)), None)


def thinks(template: str | Mapping[str, str] | None, form: ToolFormat) -> bool:
    """Whether the template has heard of thoughts in *form*'s marks."""
    text = _text(template)
    return form.thought_open in text or form.thought_close in text


def _loosely(text: str) -> str:
    """Matches *text* with any whitespace, or none, where it has some."""
    return r"\s*".join(map(regex.escape, text.split(" ")))


def _text(template: str | Mapping[str, str] | None) -> str:
    return "\n".join(template.values()) if isinstance(template, Mapping) else template or ""
