"""Messages to a prompt: what transformers gives to a chat template, given to ours.

transformers prepares messages before a template sees them (fields without a value are left out, reasoning has several
names, Python functions become schemas), and in another way from version to version. So it is asked to: with a template
that writes down all that it was given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from layerstream.errors import PromptError
from layerstream.text.template import ChatTemplate, compile_template
from layerstream.text.traced import WRITTEN, Traced, as_said

_GIVEN = "{{ {'messages': messages, 'tools': tools, 'documents': documents, 'options': options} | tojson }}"
_ROLE = re.compile(r"[\w-]+")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_PROBE = "What was said?"
_END = "\U0010fffdend of the message\U0010fffd "  # the space at its end tells whether a template trims


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Any,
    add_generation_prompt: bool,
    options: Mapping[str, Any],
) -> Traced:
    """The prompt that *tokenizer*'s chat template makes of *messages*.

    Raises:
        PromptError: they cannot be given to a template, or the template goes wrong.
    """
    options = dict(options)
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return _render_in_python(tokenizer, messages, tools, add_generation_prompt, options)
    source, documents = options.pop("chat_template", None), options.pop("documents", None)
    continued = options.pop("continue_final_message", False)
    if continued and add_generation_prompt:
        raise PromptError("continue_final_message goes on with the last message: pass add_generation_prompt=False too")
    functions = {name: value for name, value in options.items() if callable(value)}
    with _refusing():
        source = tokenizer.get_chat_template(source, tools)
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=tools,
            documents=documents,
            chat_template=_GIVEN,
            tokenize=False,
            options={name: value for name, value in options.items() if name not in functions},
        )
        given = json.loads(text)
    variables = {**tokenizer.special_tokens_map, **as_said({**given, **given.pop("options")}), **functions}
    for message in variables["messages"]:
        if _ROLE.fullmatch(message["role"]):  # the caller's word, and tokens are put together of it
            message["role"] = Traced(message["role"], WRITTEN * len(message["role"]))
        if isinstance(message.get("content"), str) and _reads_parts(source):
            message["content"] = [{"type": "text", "text": message["content"]}]
    template = compile_template(source)
    if continued:
        return _render_open(template, variables, continued if isinstance(continued, str) else "content")
    return template.render({**variables, "add_generation_prompt": add_generation_prompt})


@lru_cache(maxsize=32)
def _reads_parts(source: str) -> bool:
    """Whether the template *source* leaves out contents that are text, and writes the parts of those that are lists: as
    many of models that read images do."""
    as_text, as_parts = (_writes_probe(source, content) for content in (_PROBE, [{"type": "text", "text": _PROBE}]))
    return as_parts and not as_text


def _writes_probe(source: str, content: Any) -> bool:
    try:
        text = compile_template(source).render({"messages": [{"role": "user", "content": content}]})
    except PromptError:
        return False
    return _PROBE in text and not re.search("""['"]type['"]""", text)  # a list that is printed is not read


def _render_open(template: ChatTemplate, variables: Mapping[str, Any], field: str) -> Traced:
    """The prompt up to the end of the last message's *field*, and without what closes it."""
    last = variables["messages"][-1]
    if last.get(field) is None:
        raise PromptError(f"continue_final_message: the last message has no {field!r} to go on with")
    for name in _REASONING if field in _REASONING else (field,):
        if name in last:
            last[name] = _marked(last[name])
    text = template.render({**variables, "add_generation_prompt": False})
    end = text.rfind(_END.rstrip())
    if end < 0:
        raise PromptError(f"continue_final_message: the chat template leaves the end of the last {field!r} out")
    is_trimmed = not text.startswith(_END, end)
    return text[:end].rstrip() if is_trimmed else text[:end]


def _marked(content: Any) -> Any:
    """*content* with the mark at the end of its text, or of its last part of text."""
    if isinstance(content, str):
        return content + _END
    parts = list(content)
    for position in range(len(parts) - 1, -1, -1):
        if isinstance(parts[position], dict) and "text" in parts[position]:
            parts[position] = {**parts[position], "text": parts[position]["text"] + _END}
            break
    return parts


def _render_in_python(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Any, add_generation_prompt: bool, options: Any
) -> Traced:
    """For a tokenizer that brings its own code for it: what was said is not told apart."""
    with _refusing():
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **options,
        )
    return Traced(text, WRITTEN * len(text))


@contextmanager
def _refusing() -> Iterator[None]:
    """What goes wrong within is the messages' fault."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, TemplateError) as error:
        raise PromptError(f"these messages cannot be given to the model's chat template: {error}") from error
