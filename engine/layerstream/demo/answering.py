"""The same questions through two frameworks: a LangChain chain and a LlamaIndex query engine.

Both are put together as their users would; only the retriever (BM25 over the bundled documents) is shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerstream.demo.retrieval import Retriever
from layerstream.errors import MissingExtra
from layerstream.text.prompt import QUESTION_PROMPT

if TYPE_CHECKING:
    from layerstream.engine import LayerStream

MAX_TOKENS = 32
NUM_PASSAGES = 2


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, and the documents that were read for it, best first."""

    text: str
    documents: tuple[str, ...]


def langchain_chain(engine: LayerStream, retriever: Retriever) -> Callable[[str], Answer]:
    """Retriever, prompt and model as one LangChain chain."""
    try:
        from langchain_core.documents import Document
        from langchain_core.output_parsers import StrOutputParser
        from langchain_core.prompts import PromptTemplate
        from langchain_core.runnables import RunnableLambda, RunnablePassthrough
    except ImportError as error:
        raise MissingExtra("langchain-core", "langchain") from error
    from langchain_layerstream import LayerStreamLLM

    def retrieve(question: str) -> list[Document]:
        found = retriever.retrieve(question, NUM_PASSAGES)
        return [Document(page_content=passage.text, metadata={"source": passage.document}) for passage in found]

    def join(inputs: dict[str, Any]) -> str:
        return "\n\n".join(document.page_content for document in inputs["documents"])

    model = LayerStreamLLM(engine=engine, max_tokens=MAX_TOKENS)
    answer = PromptTemplate.from_template(QUESTION_PROMPT) | model | StrOutputParser()
    chain = (
        {"documents": RunnableLambda(retrieve), "question": RunnablePassthrough()}
        | RunnablePassthrough.assign(context=join)
        | RunnablePassthrough.assign(answer=answer)
    )

    def ask(question: str) -> Answer:
        result = chain.invoke(question)
        return Answer(result["answer"].strip(), tuple(document.metadata["source"] for document in result["documents"]))

    return ask


def llama_index_query_engine(engine: LayerStream, retriever: Retriever) -> Callable[[str], Answer]:
    """Retriever and model as one LlamaIndex query engine, with LlamaIndex's own prompts."""
    try:
        from llama_index.core import QueryBundle
        from llama_index.core.query_engine import RetrieverQueryEngine
        from llama_index.core.retrievers import BaseRetriever
        from llama_index.core.schema import NodeWithScore, TextNode
    except ImportError as error:
        raise MissingExtra("llama-index-core", "llama-index") from error
    from llama_index.llms.layerstream import LayerStreamLLM

    class PassageRetriever(BaseRetriever):
        def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            found = retriever.retrieve(query_bundle.query_str, NUM_PASSAGES)
            return [
                NodeWithScore(
                    node=TextNode(
                        text=passage.text,
                        metadata={"source": passage.document},
                        excluded_llm_metadata_keys=["source"],
                    )
                )
                for passage in found
            ]

    llm = LayerStreamLLM(engine=engine, max_new_tokens=MAX_TOKENS)
    query_engine = RetrieverQueryEngine.from_args(PassageRetriever(), llm=llm)

    def ask(question: str) -> Answer:
        response = query_engine.query(question)
        return Answer(str(response).strip(), tuple(found.node.metadata["source"] for found in response.source_nodes))

    return ask
