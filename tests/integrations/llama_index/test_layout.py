"""Prompts that have the question first: moved where it is wanted, in a template or in the wrapper."""

from __future__ import annotations

import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import (
    BasePromptTemplate,
    ChatPromptTemplate,
    PromptTemplate,
    RichPromptTemplate,
    SelectorPromptTemplate,
)
from llama_index.core.prompts.default_prompts import DEFAULT_REFINE_PROMPT, DEFAULT_TEXT_QA_PROMPT
from llama_index.core.prompts.utils import is_chat_model
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.llms.layerstream import LayerStreamLLM, context_first

from tests.integrations.fake_engine import FakeEngine

GIVEN = "Question: {query_str}\nContext: {context_str}\nAnswer:"
MOVED = "Context: {context_str}\nQuestion: {query_str}\nAnswer:"
TEXT = "Brenvik is led by Sluba Merkast. " * 20


def chat(text: str) -> ChatPromptTemplate:
    return ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", text)])


@pytest.mark.parametrize(
    "prompt",
    [
        PromptTemplate(GIVEN),
        chat(GIVEN),
        SelectorPromptTemplate(PromptTemplate(GIVEN), [(is_chat_model, chat(GIVEN))]),
        PromptTemplate(
            GIVEN.replace("query_str", "q").replace("context_str", "c"),
            template_var_mappings={"query_str": "q", "context_str": "c"},
        ),
        RichPromptTemplate(GIVEN.replace("{", "{{ ").replace("}", " }}")),
        ChatPromptTemplate.from_messages(
            [("system", "Question: {query_str}"), ("user", "Context: {context_str}\nAnswer:")]
        ),
    ],
)
def test_templates(prompt: BasePromptTemplate) -> None:
    before = prompt.format(query_str="Q", context_str="C")
    moved = context_first(prompt)
    text = moved.format(query_str="Q", context_str="C")
    assert text.index("Context: C") < text.index("Question: Q")
    assert sorted(text.split()) == sorted(before.split())
    assert context_first(moved).format(query_str="Q", context_str="C") == text
    assert prompt.format(query_str="Q", context_str="C") == before, "the one that was given stays"


def test_what_is_kept() -> None:
    partial = PromptTemplate(GIVEN + " {tone}").partial_format(tone="dry")
    assert context_first(partial).format(query_str="Q", context_str="C").endswith("dry")
    assert context_first(DEFAULT_TEXT_QA_PROMPT).get_template() == DEFAULT_TEXT_QA_PROMPT.get_template()
    refined = context_first(DEFAULT_REFINE_PROMPT).get_template()
    assert refined.index("{context_msg}") < refined.index("{query_str}"), "LlamaIndex's own has the question first"
    assert sorted(refined) == sorted(DEFAULT_REFINE_PROMPT.get_template())


@pytest.mark.parametrize("layout", ["as_given", "context_first"])
def test_the_wrapper_moves_what_it_recognises(layout: str) -> None:
    engine = FakeEngine()
    llm = LayerStreamLLM(engine=engine, context_window=4096, prompt_layout=layout)  # type: ignore[arg-type]
    nodes = [NodeWithScore(node=TextNode(text=TEXT), score=1.0)]
    get_response_synthesizer(llm=llm, text_qa_template=PromptTemplate(GIVEN)).synthesize("Who leads it?", nodes=nodes)
    llm.complete(GIVEN.format(query_str="Who?", context_str=TEXT))
    llm.chat([ChatMessage(role="user", content=GIVEN.format(query_str="Who?", context_str=TEXT))])
    for prompt in (str(batch[0]) for batch in engine.batches):
        assert (prompt.index("Context: ") < prompt.index("Question: ")) == (layout == "context_first")
