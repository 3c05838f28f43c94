"""The context before the question: what many prompts write the other way round. Pure.

What prompts share is what they have in common from the first token on. A prompt that begins with the question shares
nothing with the next one, however long the context is that both have. :func:`context_first_template` moves the question
of a template behind its context; :func:`context_first` does it in a text, where labels show which is which::

    Question: Who leads Brenvik?            Context: Brenvik is led by …
    Context: Brenvik is led by …      →     Question: Who leads Brenvik?
    Answer:                                 Answer:

Both only exchange two pieces: nothing is lost or added, white space stays where it was, and what has the context first
already, or does not show it, comes back as it is. So doing it twice is doing it once.

A text may have examples in front, and documents with labels in them. Which question is the real one then cannot be
told from the text, and an example's question behind the real context would ask something else. So a text is moved only
where it has one question, one context and at most one place for the answer, at its end. A template knows its variables:
there the real question is moved whatever the examples say.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

logger = logging.getLogger(__name__)

PromptLayout = Literal["as_given", "context_first"]

QUESTION_NAMES = frozenset({"question", "input", "query", "query_str", "user_question", "user_input"})
"""What templates call the question."""
CONTEXT_NAMES = frozenset({"context", "context_str", "context_msg", "context_list", "documents", "docs", "passages"})
"""What templates call the context."""

WORTH_CHARACTERS = 400
"""Of a context; a shorter one is hardly more than a page."""

_LABEL = r"^[ \t]*(?:\#+[ ]*|\*\*)?(?:{words})(?:\*\*)?[ \t]*:"
_FLAGS = re.MULTILINE | re.IGNORECASE
_QUESTION = re.compile(_LABEL.format(words="(?:user(?:'s)? |the )?(?:question|query)"), _FLAGS)
_CONTEXT = re.compile(_LABEL.format(words="(?:retrieved )?(?:context|documents|passages|sources)"), _FLAGS)
_ANSWER = re.compile(_LABEL.format(words="(?:(?:helpful|final|your) )?(?:answer|response)"), _FLAGS)
_FENCE = re.compile(r"^\s*(?:[^\w\s{}]+|</?\w+>)\s*$")


def context_first(text: str) -> str:
    """*text*, with the question behind the context, if it is a prompt with one labelled question, then a labelled
    context that is longer."""
    found = _labelled(text)
    return text if found is None else _exchange(text, *found)


def arranged(text: str, layout: PromptLayout) -> str:
    """*text* as *layout* wants it; where another one would help, that is said once in a process."""
    if layout == "context_first":
        return context_first(text)
    found = _labelled(text)
    if found is not None and found[2] - found[1] >= WORTH_CHARACTERS:
        _offer()
    return text


def arranged_messages(messages: Sequence[Mapping[str, Any]], layout: PromptLayout) -> list[dict[str, Any]]:
    """As :func:`arranged`, what users and the system say: each message for itself, so that what was said in earlier
    turns, or in examples, stays as it was whatever is said next."""
    return [
        {**message, "content": arranged(message["content"], layout)}
        if message.get("role") in ("user", "system") and isinstance(message.get("content"), str)
        else dict(message)
        for message in messages
    ]


def context_first_template(
    template: str,
    question_names: Collection[str] = QUESTION_NAMES,
    context_names: Collection[str] = CONTEXT_NAMES,
) -> str:
    """*template*, with the lines of the question behind those of the context.

    To a variable belong its line, fences around it (rules, quotes, tags), a line above that ends with a colon, and
    empty lines below.

    Args:
        template: of any form with names in braces: ``{name}``, ``{{name}}``, ``{{ name }}``.
    """
    lines = template.splitlines(keepends=True)
    question, context = _block(lines, question_names), _block(lines, context_names)
    if question is None or context is None or question[1] > context[0]:
        return template
    ends = [0]
    for line in lines:
        ends.append(ends[-1] + len(line))
    return _exchange(template, ends[question[0]], ends[context[0]], ends[context[1]], ends[question[1]])


def variables_of(template: str, names: Collection[str]) -> bool:
    """Whether *template* has one of *names*."""
    return _variable(names).search(template) is not None


def place_to_swap(texts: Sequence[str], question: Collection[str], context: Collection[str]) -> int | None:
    """Of the messages of a chat, the first that has the question and stands right before the context's; ``None``: there
    is none, or one of the two has both."""
    for at, (first, second) in enumerate(itertools.pairwise(texts)):
        if variables_of(first, question) and variables_of(second, context):
            is_apart = not variables_of(first, context) and not variables_of(second, question)
            return at if is_apart else None
    return None


def _labelled(text: str) -> tuple[int, int, int] | None:
    """Where the question begins, the context behind it, and what comes behind that; ``None``: it is not so, or it is
    not the only one."""
    questions, contexts = list(_QUESTION.finditer(text)), list(_CONTEXT.finditer(text))
    if len(questions) != 1 or len(contexts) != 1 or contexts[0].start() < questions[0].start():
        return None
    begin, context = questions[0].start(), contexts[0].start()
    answers = list(_ANSWER.finditer(text, begin))
    end = answers[0].start() if answers else len(text)
    if end < context or (answers and text[answers[0].end() :].strip()):
        return None
    return None if end - context <= context - begin else (begin, context, end)


def _exchange(text: str, begin: int, context: int, end: int, question_end: int | None = None) -> str:
    """*text* with the question, from *begin* to *question_end*, behind the context, from *context* to *end*."""
    question_end = context if question_end is None else question_end
    question, after_question = _split_space(text[begin:question_end])
    found, after_context = _split_space(text[context:end])
    between = text[question_end:context]
    return f"{text[:begin]}{between}{found}{after_question}{question}{after_context}{text[end:]}"


def _split_space(text: str) -> tuple[str, str]:
    body = text.rstrip()
    return body, text[len(body) :]


def _variable(names: Collection[str]) -> re.Pattern[str]:
    words = "|".join(sorted(map(re.escape, names)))
    return re.compile(rf"\{{\s*(?:{words})\s*\}}")


def _block(lines: Sequence[str], names: Collection[str]) -> tuple[int, int] | None:
    """The lines of the one of *names* that *lines* have; ``None``: none, or on several lines."""
    variable = _variable(names)
    at = [number for number, line in enumerate(lines) if variable.search(line)]
    if len(at) != 1:
        return None
    first, last = at[0], at[0] + 1
    if first and last < len(lines) and _FENCE.match(lines[first - 1]) and _FENCE.match(lines[last]):
        first, last = first - 1, last + 1
    if first and lines[first - 1].rstrip().endswith(":") and "{" not in lines[first - 1]:
        first -= 1
    while last < len(lines) and not lines[last].strip():
        last += 1
    return first, last


@functools.cache
def _offer() -> None:
    logger.warning(
        "prompts have the question before a long context, so the next question shares nothing with this one: "
        "prompt_layout='context_first' moves the question behind the context, context_first(prompt) does it in a "
        "template"
    )
