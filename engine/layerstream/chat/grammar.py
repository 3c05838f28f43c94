"""What an answer may look like, as a grammar for llguidance (Lark): thoughts, then text, JSON or calls.

Marks that are single special tokens to the tokenizer stand in the grammar as tokens (``<[128010]>``): spelt out in
letters they would be other tokens than those the model was trained on. Text cannot contain special tokens, and may not
contain a trigger that is made of letters but as the beginning of a call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from layerstream.chat.formats import ToolFormat
from layerstream.chat.tools import Selection, closed
from layerstream.text.response_format import JSON_STYLE

Thoughts: TypeAlias = Literal["none", "allowed", "begun"]

_ANYTHING = r"/(.|\n)*/"


def answer_grammar(
    form: ToolFormat,
    tools: Selection,
    *,
    thoughts: Thoughts,
    schema: Any,
    special_tokens: Mapping[str, int],
) -> str:
    """The grammar of an answer.

    Args:
        thoughts: whether some may come first, or the prompt began one.
        schema: what the answer must be where it is no call; ``None``: text.
        special_tokens: the tokenizer's, with their ids.
    """
    marks = _Marks(special_tokens)
    rules = ["%llguidance {}"]
    kinds = []
    if tools.callable:
        behind_text = form.trigger and not (form.answer_open or tools.must_call or schema is not None)
        kinds.append("text_calls" if behind_text else "calls")
        rules += _call_rules(form, tools, marks)
    if not tools.must_call:
        kinds.append("answer")
        rules += _answer_rules(form, tools, schema, marks)
    if thoughts != "none":
        rules += _thought_rules(form, marks)
    first = {"none": "", "allowed": "(thought)* ", "begun": "thoughts "}[thoughts]
    rules.insert(1, f"start: {first}({' | '.join(kinds)})")
    rules.append(f"ANYTHING: {_ANYTHING}")
    return "\n".join(rules) + "\n"


def _thought_rules(form: ToolFormat, marks: _Marks) -> list[str]:
    begins, ends = marks.write(form.thought_open), marks.write(form.thought_close)
    rules = [f"thought: {begins} thoughts", r"BLANK: /\n*/"]
    if marks.is_special(form.thought_close):
        return [*rules, f"thoughts: ANYTHING {ends} BLANK"]
    return [*rules, "thoughts: thinking BLANK", f"thinking[lazy]: {_ANYTHING} {ends}"]


def _call_rules(form: ToolFormat, tools: Selection, marks: _Marks) -> list[str]:
    trigger, section = marks.write(form.trigger), bool(form.section_open)
    more = f" ({marks.write(form.separator)} call)*" if tools.several else ""
    rest = f"call_rest{more} {marks.write(form.section_close)}"  # of all calls, behind the first trigger
    rules = [f"calls: {trigger} {rest}", f"call: {'' if section else trigger} call_rest"]
    if marks.is_special(form.trigger):
        rules.append(f"text_calls: ANYTHING {trigger} {rest}")
    elif form.trigger:
        rules += [f"text_calls: text_trigger {rest}", f"text_trigger[lazy]: {_ANYTHING} {trigger}"]
    rules.append(f"call_rest: {' | '.join(f'call_{number}' for number in range(len(tools.callable)))}")
    for number, tool in enumerate(tools.callable):
        opening = form.opening(tool.name).removeprefix("" if section else form.trigger)
        arguments = "%json " + json.dumps({"x-guidance": JSON_STYLE, **closed(tool.parameters)})
        rules.append(f"call_{number}: {marks.write(opening)} {arguments} {marks.write(form.closing())}")
    return rules


def _answer_rules(form: ToolFormat, tools: Selection, schema: Any, marks: _Marks) -> list[str]:
    opening = marks.write(form.answer_open)
    if schema is not None:
        guided = {"x-guidance": JSON_STYLE, **schema} if isinstance(schema, Mapping) else schema
        return [f"answer: {opening} %json {json.dumps(guided)}"]
    if not tools.offered or marks.is_special(form.trigger) or form.answer_open:
        return [f"answer: {opening} ANYTHING"]
    if not form.trigger:
        return ["answer: TEXT", r"TEXT: /([^{\s](.|\n)*)?/"]
    if tools.callable:  # the lazy rule beside it takes what has a trigger
        return ["answer: ANYTHING"]
    forbidden = re.escape(form.trigger.strip()).replace("/", r"\/")
    return ["answer: TEXT", rf"TEXT: {_ANYTHING} & ~/(.|\n)*{forbidden}(.|\n)*/"]


class _Marks:
    """Writes text for a grammar, special tokens as tokens."""

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        self._ids = special_tokens
        names = sorted(map(re.escape, special_tokens), key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(names)})") if names else None

    def write(self, text: str) -> str:
        """*text* as grammar symbols; nothing for nothing."""
        parts = self._split.split(text) if self._split else [text]
        symbols = [f"<[{self._ids[part]}]>" if part in self._ids else _quoted(part) for part in parts if part]
        return " ".join(symbols)

    def is_special(self, text: str) -> bool:
        """Whether *text* begins with a special token."""
        first = self._split.match(text) if self._split else None
        return first is not None


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
