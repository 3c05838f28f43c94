"""Retrieval-augmented generation with LlamaIndex: a retriever of your own and its query engine."""

from pathlib import Path

import layerstream
from layerstream.demo.retrieval import Retriever, load_documents
from llama_index.core import QueryBundle
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.llms.layerstream import LayerStreamLLM


class BundledDocuments(BaseRetriever):
    """BM25 over the bundled documents; any LlamaIndex retriever will do."""

    def __init__(self) -> None:
        self._retriever = Retriever(load_documents(Path(layerstream.__file__).parent / "demo" / "documents"))
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        passages = self._retriever.retrieve(query_bundle.query_str, 2)
        return [NodeWithScore(node=TextNode(text=passage.text)) for passage in passages]


query_engine = RetrieverQueryEngine.from_args(BundledDocuments(), llm=LayerStreamLLM(model="demo", max_new_tokens=16))
for question in ("Who supplies Tolmar Archive?", "Who ordered Project Drusveld?"):
    print(f"{question} {str(query_engine.query(question)).strip()}")
