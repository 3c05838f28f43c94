"""The question behind the context: nothing lost, nothing added, once is enough."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layerstream.api import prompt_layout
from layerstream.api.prompt_layout import arranged, arranged_messages, context_first, context_first_template

HUB = (
    "You are an assistant for question-answering tasks. Use the following pieces of retrieved context to answer the "
    "question. If you don't know the answer, just say that you don't know. Use three sentences maximum and keep the "
    "answer concise.\nQuestion: {question} \nContext: {context} \nAnswer:"
)
LONG = ("Brenvik is led by Sluba Merkast. " * 20).strip()
PIECES = st.sampled_from(
    ["Question: who", "Context: some words and more", "Answer:", "Answer: 7", "**Question**: x", "# Context: y", "word",
     "query:", "", " ", "{question}", "{context}", "Context:\n{context}", "---", "<context>", "</context>", '"""',
     "The question is as follows:", "{{ context }}", "Question: {{question}}", "{chat_history}"]
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=9).map("\n".join) | st.lists(PIECES, max_size=9).map(" \n\n".join) | st.text()


@pytest.mark.parametrize("move", [context_first, context_first_template])
@given(text=TEXTS)
def test_pieces_are_only_exchanged(move, text: str) -> None:
    moved = move(text)
    assert Counter(moved) == Counter(text)
    assert Counter(moved.split()) == Counter(text.split()), "no word is cut or joined"
    assert move(moved) == moved


@given(st.text(), st.text(alphabet="ab: \n{}", max_size=200))
def test_without_labels_or_names_nothing_changes(first: str, second: str) -> None:
    for text in (first, second):
        if ":" not in text:
            assert context_first(text) == text
        if "{" not in text:
            assert context_first_template(text) == text


def test_the_hub_s_prompt() -> None:
    moved = context_first_template(HUB)
    assert moved.endswith("concise.\nContext: {context} \nQuestion: {question} \nAnswer:")
    values = {"question": "Who leads Brenvik?", "context": LONG}
    assert context_first(HUB.format(**values)) == moved.format(**values), "the text as the template"


@pytest.mark.parametrize(
    ("given", "moved"),
    [
        ("{question}\n\n{context}", "{context}\n\n{question}"),
        ("{question}\n{context}\nAnswer:", "{context}\n{question}\nAnswer:"),
        ("Q:\n{input}\n\nUse this:\n---\n{context}\n---\nA:", "Use this:\n---\n{context}\n---\n\nQ:\n{input}\nA:"),
        ("Ask: {query_str}\nThink.\n<c>\n{context_str}\n</c>", "Think.\n<c>\n{context_str}\n</c>\nAsk: {query_str}"),
        ("Question: {{ question }}\nContext: {{context}}", "Context: {{context}}\nQuestion: {{ question }}"),
    ],
)
def test_templates_that_are_moved(given: str, moved: str) -> None:
    assert context_first_template(given) == moved


@pytest.mark.parametrize(
    "template",
    [
        "{context}\n{question}",
        "{question} {context}",
        "{question}\n{context}\n{question}",
        "{question}",
        "{context}",
        "{query_str}\n{unknown}",
        "",
    ],
)
def test_templates_that_stay(template: str) -> None:
    assert context_first_template(template) == template


def test_names_of_ones_own() -> None:
    assert context_first_template("{q}\n{c}", ["q"], ["c"]) == "{c}\n{q}"


@pytest.mark.parametrize(
    "text",
    [
        f"Context: {LONG}\nQuestion: who?\nAnswer:",
        f"Context: {LONG}\nQuestion: who?\nContext: {LONG}",
        "Question: is a long question really longer than its context?\nContext: yes\nAnswer:",
        f"The Question: who?\n{LONG}",
        f"A question: who?\nMy context: {LONG}",
        LONG,
        f"Question: who?\nContext: {LONG}\nQuestion: is it?\nContext: none\nAnswer: no\nAnswer:",
        f"Question: who?\nContext: {LONG}\nSources: none\nAnswer:",
        f"Question: 2 + 2?\nAnswer: 4\n\nWho leads it?\nContext: {LONG}\nAnswer:",
        f"Question: 2 + 2?\nContext: a sum of numbers is asked\nAnswer: 4\n\nWho leads it? {LONG}",
        f"Question: who?\nContext: {LONG}\nAnswer: Let's think step by step.",
    ],
)
def test_texts_that_stay(text: str) -> None:
    assert context_first(text) == text


LINES = st.lists(
    st.sampled_from(
        ["word word word", "7", "Question: x", "**Query**: y", "Context: z and more of it", "# Sources: none",
         "Answer:", "Answer: 4", "Helpful answer: no", "Response: r", "", "- item: 1", "my question: why"]
    ),
    max_size=4,
).map("\n".join)  # fmt: skip
EXAMPLES = st.lists(st.tuples(LINES, LINES | st.none(), LINES | st.none()), max_size=3)


@given(
    examples=EXAMPLES,
    question=LINES,
    context=LINES | st.just(LONG),
    tail=st.sampled_from(["", "\nAnswer:", " \nHelpful Answer: ", "\n\nSay it in French."]),
    labels=st.sampled_from([("Question:", "Context:"), ("# Query:", "Documents:"), ("**Question**:", "**Sources**:")]),
)
def test_only_the_real_question_is_moved_and_only_behind_the_real_context(
    examples, question: str, context: str, tail: str, labels: tuple[str, str]
) -> None:
    """Whatever examples stand in front, and whatever labels stand in what was said and retrieved."""
    ask, show = labels
    head = "Answer as in the examples.\n\n" if examples else ""
    for asked, shown, answer in examples:
        head += f"{ask} {asked}\n"
        head += "" if shown is None else f"{show} {shown}\n"
        head += "\n" if answer is None else f"Answer: {answer}\n\n"
    asked, shown = f"{ask} {question}".rstrip(), f"{show} {context}".rstrip()
    text = f"{head}{asked}\n{shown}{tail}"
    moved = context_first(text)
    assert moved in (text, f"{head}{shown}\n{asked}{tail}", f"{head}{shown}{tail.rstrip()}\n{asked}".rstrip())
    assert moved.startswith(head), "examples stay"
    assert Counter(moved.split()) == Counter(text.split())


def test_examples_in_messages_are_each_for_itself() -> None:
    """What was said before is the same in the next turn, so that its KV is found."""
    pairs = [f"Question: who {number}?\nContext: {LONG} {number}" for number in range(3)]
    chat = [{"role": role, "content": text} for text in pairs for role in ("user", "assistant")]
    moved = arranged_messages(chat, "context_first")
    assert moved[:2] == arranged_messages(chat[:2], "context_first")
    assert [message["content"] for message in moved] == [
        context_first(message["content"]) if message["role"] == "user" else message["content"] for message in chat
    ]


def test_what_could_help_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, prompt_layout.__name__)
    prompt_layout._offer.cache_clear()
    short, long = (HUB.format(question="Who?", context=LONG[:size]) for size in (100, 600))
    assert arranged(short, "as_given") == short
    assert arranged(long, "context_first") == context_first(long) != long
    assert not caplog.records
    for _ in range(2):
        assert arranged(long, "as_given") == long
    assert len(caplog.records) == 1
    assert "prompt_layout='context_first'" in caplog.text


def test_messages_of_users_and_the_system() -> None:
    text = HUB.format(question="Who?", context=LONG)
    given = [{"role": role, "content": text} for role in ("system", "user", "assistant", "tool")]
    moved = arranged_messages([*given, {"role": "user", "content": None}], "context_first")
    assert [message.get("content") for message in moved] == [context_first(text)] * 2 + [text] * 2 + [None]
