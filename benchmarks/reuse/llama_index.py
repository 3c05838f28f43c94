"""LlamaIndex's pipelines, with its own query and chat engines, parsers and retrievers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from layerstream.demo.retrieval import Document as Text
from layerstream.demo.retrieval import Retriever
from llama_index.core import Document, StorageContext
from llama_index.core.chat_engine import CondensePlusContextChatEngine
from llama_index.core.chat_engine.condense_plus_context import DEFAULT_CONTEXT_PROMPT_TEMPLATE
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.node_parser import (
    HierarchicalNodeParser,
    SentenceSplitter,
    SentenceWindowNodeParser,
    get_leaf_nodes,
)
from llama_index.core.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.prompts import ChatPromptTemplate
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.retrievers import AutoMergingRetriever, BaseRetriever
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle
from llama_index.llms.layerstream import GrowingContext

from benchmarks.reuse.corpus import NUM_RETRIEVED
from benchmarks.reuse.setting import Ask, Setting

WINDOW = "window"
PARENT_TOKENS, LEAF_TOKENS = 840, 210


def compact(setting: Setting) -> Ask:
    """A query engine in its default mode over the passages."""
    return _query_engine(setting, _Found(setting.find_nodes))


def sentence_window(setting: Setting) -> Ask:
    """Sentences are searched, and the sentences around a hit are read."""
    parser = SentenceWindowNodeParser.from_defaults(
        window_size=3, window_metadata_key=WINDOW, original_text_metadata_key="original", sentence_splitter=_sentences
    )
    nodes = parser.get_nodes_from_documents(_documents(setting))
    found = _Bm25(nodes)
    replace = MetadataReplacementPostProcessor(target_metadata_key=WINDOW)
    return _query_engine(setting, _Found(lambda: found(setting.now)), [replace])


def auto_merging(setting: Setting) -> Ask:
    """Leaves are searched, and a parent is read in place of most of its leaves."""
    sizes = {"parent": PARENT_TOKENS, "leaf": LEAF_TOKENS}
    splitters: Any = {
        name: SentenceSplitter(
            chunk_size=size, chunk_overlap=0, tokenizer=setting.own.tokenize, chunking_tokenizer_fn=_sentences
        )
        for name, size in sizes.items()
    }
    parser = HierarchicalNodeParser.from_defaults(node_parser_ids=list(sizes), node_parser_map=splitters)
    nodes = parser.get_nodes_from_documents(_documents(setting))
    storage = StorageContext.from_defaults()
    storage.docstore.add_documents(nodes)
    found = _Bm25(get_leaf_nodes(nodes))
    retriever = AutoMergingRetriever(_Found(lambda: found(setting.now)), storage)  # type: ignore[arg-type]
    return _query_engine(setting, retriever)


def condense_plus_context(setting: Setting, turns: int = 5) -> Ask:
    """A chat engine: the model rewrites the question, then answers. Conversations of *turns*."""
    prompt = ChatPromptTemplate([ChatMessage(role="system", content=DEFAULT_CONTEXT_PROMPT_TEMPLATE)])
    retriever = _Found(setting.find_nodes)
    processors = setting.node_order(_retrieves(setting, retriever), prompt)
    if setting.variant == "growing":
        processors.append(GrowingContext(most=12))
    llm = setting.own
    memory = ChatMemoryBuffer.from_defaults(token_limit=8192, tokenizer_fn=llm.tokenize)
    engine = CondensePlusContextChatEngine.from_defaults(
        retriever, llm=llm, memory=memory, node_postprocessors=processors
    )
    asked = 0

    def ask(question: str) -> None:
        nonlocal asked
        if asked and asked % turns == 0:
            engine.reset()
            for processor in processors:
                if isinstance(processor, GrowingContext):
                    processor.reset()
        asked += 1
        engine.chat(question)

    return ask


def _query_engine(setting: Setting, retriever: BaseRetriever, earlier: Sequence[Any] = ()) -> Ask:
    processors = setting.node_order(_retrieves(setting, retriever), DEFAULT_TEXT_QA_PROMPT_SEL, earlier)
    engine = RetrieverQueryEngine.from_args(
        retriever, llm=setting.own, response_mode=ResponseMode.COMPACT, node_postprocessors=processors
    )
    return engine.query


def _retrieves(setting: Setting, retriever: BaseRetriever) -> Callable[[str], list[NodeWithScore]]:
    """What *retriever* brings for a question that is not being asked."""

    def retrieve(question: str) -> list[NodeWithScore]:
        setting.now = question
        return retriever.retrieve(question)

    return retrieve


class _Found(BaseRetriever):
    """What a function finds."""

    def __init__(self, find: Callable[[], list[NodeWithScore]]) -> None:
        self._find = find
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._find()


class _Bm25:
    """The best of *nodes* for a question."""

    def __init__(self, nodes: Sequence[BaseNode]) -> None:
        self._nodes = nodes
        texts = [" ".join(node.get_content().split()) for node in nodes]
        self._retriever = Retriever(
            [Text(str(number), text) for number, text in enumerate(texts)], limit=max(map(len, texts))
        )

    def __call__(self, question: str) -> list[NodeWithScore]:
        found = self._retriever.retrieve(question, NUM_RETRIEVED)
        return [NodeWithScore(node=self._nodes[int(passage.document)].model_copy(), score=0.5) for passage in found]


def _documents(setting: Setting) -> list[Document]:
    return [Document(text=text, id_=name) for name, text in setting.corpus.documents.items()]


def _sentences(text: str) -> list[str]:
    """With what follows each."""
    return re.findall(r".+?(?:[.?!]\s+|\n+|$)", text, re.DOTALL)
