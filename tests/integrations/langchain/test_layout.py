"""Prompts that have the question first: moved where it is wanted, in a template or in the wrapper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.prompts import (
    BasePromptTemplate,
    ChatPromptTemplate,
    FewShotChatMessagePromptTemplate,
    FewShotPromptTemplate,
    FewShotPromptWithTemplates,
    MessagesPlaceholder,
    PromptTemplate,
)
from langchain_layerstream import ChatLayerStream, LayerStreamLLM, WarmPrefixes, context_first
from layerstream import ConfigurationError, KVStoreConfig, LayerStream

from tests.integrations.fake_engine import FakeEngine

HUB = (
    "You are an assistant for question-answering tasks. Use the following pieces of retrieved context to answer the "
    "question. If you don't know the answer, just say that you don't know.\n"
    "Question: {question} \nContext: {context} \nAnswer:"
)
MOVED = HUB[: HUB.index("Question:")] + "Context: {context} \nQuestion: {question} \nAnswer:"
TEXT = " ".join(f"In year {year} the hall of Brenvik had {year % 7} doors." for year in range(20))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LayerStream]:
    with LayerStream(
        "demo", kv_store=KVStoreConfig(tmp_path, load="always"), progress=False, chunk_tokens=32
    ) as engine:
        yield engine


def test_templates() -> None:
    text = PromptTemplate.from_template(HUB)
    assert context_first(text).template == MOVED
    assert text.template == HUB, "the one that was given stays"
    assert context_first(context_first(text)) == context_first(text)
    chat = ChatPromptTemplate.from_messages([("system", "Be brief."), ("human", HUB)])
    assert context_first(chat).invoke({"question": "Q", "context": "C"}).to_messages()[1].text == MOVED.format(
        question="Q", context="C"
    )
    mustache = PromptTemplate.from_template("{{question}}\n{{context}}", template_format="mustache")
    assert context_first(mustache).format(question="Q", context="C") == "C\nQ"


def test_messages_change_places() -> None:
    prompt = ChatPromptTemplate.from_messages(
        [
            ("system", "Be brief."),
            MessagesPlaceholder("chat_history"),
            ("human", "{input}"),
            ("system", "Use this: {context}"),
        ]
    )
    messages = context_first(prompt).invoke({"input": "Q", "context": "C", "chat_history": []}).to_messages()
    assert [message.text for message in messages] == ["Be brief.", "Use this: C", "Q"]
    assert context_first(context_first(prompt)) == context_first(prompt)
    stays = ChatPromptTemplate.from_messages([("system", "{context}"), ("human", "{input}")])
    assert context_first(stays) == stays


PAIR = "Question: {question}\nContext: {context}\nAnswer:"
NAMES = ("Jaskeld", "Tredry")
EXAMPLES = [{"question": f"Who leads {name}?", "context": TEXT + name, "answer": name} for name in NAMES]
REAL = {"question": "Who leads Brenvik?", "context": TEXT}


def few_shot(kind: type) -> BasePromptTemplate:
    example = PromptTemplate.from_template(PAIR + " {answer}")
    suffix = PAIR if kind is FewShotPromptTemplate else PromptTemplate.from_template(PAIR)
    prefix = "Be brief." if kind is FewShotPromptTemplate else PromptTemplate.from_template("Be brief.")
    return kind(
        examples=EXAMPLES, example_prompt=example, prefix=prefix, suffix=suffix, input_variables=["question", "context"]
    )


@pytest.mark.parametrize("kind", [FewShotPromptTemplate, FewShotPromptWithTemplates])
def test_behind_examples_the_real_question_is_moved(kind: type) -> None:
    prompt = few_shot(kind)
    head, real = prompt.format(**REAL), PAIR.format(**REAL)
    head = head[: -len(real)]
    moved = context_first(prompt)
    assert moved.format(**REAL) == f"{head}Context: {TEXT}\nQuestion: Who leads Brenvik?\nAnswer:"
    assert context_first(moved) == moved
    assert prompt.format(**REAL) == head + real, "the one that was given stays"


@pytest.mark.parametrize("kind", [FewShotPromptTemplate, FewShotPromptWithTemplates])
def test_which_of_many_questions_is_the_real_one_no_text_shows(kind: type) -> None:
    engine = FakeEngine()
    asked = few_shot(kind).invoke(REAL)
    LayerStreamLLM(engine=engine, prompt_layout="context_first").invoke(asked)
    assert engine.batches == [[asked.to_string()]]


def test_messages_of_examples_are_each_for_itself() -> None:
    example = ChatPromptTemplate.from_messages([("human", PAIR), ("ai", "{answer}")])
    examples = FewShotChatMessagePromptTemplate(examples=EXAMPLES, example_prompt=example)  # pyright: ignore
    prompt = ChatPromptTemplate.from_messages([("system", "Be brief."), examples, ("human", PAIR)])
    moved = context_first(prompt).invoke(REAL).to_messages()
    given = prompt.invoke(REAL).to_messages()
    assert moved[:-1] == given[:-1]
    assert moved[-1].text == f"Context: {TEXT}\nQuestion: Who leads Brenvik?\nAnswer:"

    engine = FakeEngine(has_chat_template=True)
    ChatLayerStream(engine=engine, prompt_layout="context_first").invoke(given)
    said = engine.batches[0][0]
    places = [said.index(text) for name in NAMES for text in (f"{TEXT}{name}", f"Who leads {name}?")]
    places += [said.rindex(f"Context: {TEXT}\nQuestion: Who leads Brenvik?")]
    assert places == sorted(places)


@pytest.mark.parametrize("kind", [ChatLayerStream, LayerStreamLLM])
@pytest.mark.parametrize("how", ["as given", "template", "wrapper"])
def test_the_hub_s_prompt_shares_its_context(engine: LayerStream, kind: type, how: str) -> None:
    given: BasePromptTemplate = PromptTemplate.from_template(HUB)
    prompt = context_first(given) if how == "template" else given
    llm = kind(engine=engine, max_tokens=2, prompt_layout="context_first" if how == "wrapper" else "as_given")
    chain = create_stuff_documents_chain(llm, prompt)
    warm = WarmPrefixes(llm=llm, prompt=prompt)
    if how == "as given":
        with pytest.raises(ConfigurationError, match="question before the context"):
            warm.transform_documents([Document(TEXT)])
    else:
        warm.transform_documents([Document(TEXT)])
    before = engine.stats().kv.reused_tokens
    for question in ("How many doors?", "When were there six?"):
        chain.invoke({"context": [Document(TEXT)], "question": question})
        engine._open_store().flush()
    reused = engine.stats().kv.reused_tokens - before
    assert reused < 200 if how == "as given" else reused > 600


def test_caches_of_answers_know_the_layout(engine: LayerStream) -> None:
    llms = [LayerStreamLLM(engine=engine, prompt_layout=layout) for layout in ("as_given", "context_first")]
    assert llms[0]._identifying_params != llms[1]._identifying_params
    with pytest.raises(ValueError, match="prompt_layout"):
        LayerStreamLLM(engine=engine, prompt_layout="question_first")  # type: ignore[arg-type]
