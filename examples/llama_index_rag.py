"""LlamaIndex: an index over a folder, nodes computed as they enter it, a query engine that finds their KV again.

    python examples/llama_index_rag.py [--docs FOLDER] [--model FOLDER --memory 3GiB]

The embeddings need no download: words are hashed. Any other embedding will do.
"""

import argparse
import re
import zlib
from pathlib import Path

import layerstream
from llama_index.core import SimpleDirectoryReader, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.llms.layerstream import LayerStreamLLM, StablePrefixOrder, WarmPrefixes, stable_prompt_helper


class HashedWords(BaseEmbedding):
    """A text is the sum of its words, each a place of its own among 4096."""

    def _get_text_embedding(self, text: str) -> list[float]:
        vector = [0.0] * 4096
        for word in re.findall(r"\w{4,}", text.lower()):
            vector[zlib.crc32(word.encode()) % 4096] = 1.0
        return vector

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


parser = argparse.ArgumentParser()
parser.add_argument("--docs", default=Path(layerstream.__file__).parent / "demo" / "documents")
parser.add_argument("--question", action="append")
parser.add_argument("--model", default="demo")
parser.add_argument("--memory")
arguments = parser.parse_args()

engine_options = {"memory": arguments.memory} if arguments.memory else {}
llm = LayerStreamLLM(arguments.model, max_new_tokens=32, engine_kwargs=engine_options)
documents = SimpleDirectoryReader(arguments.docs, recursive=True).load_data()
for document in documents:  # paths and dates are for us, and would stand between the model and the text
    document.excluded_llm_metadata_keys = list(document.metadata)

splitter = SentenceSplitter(chunk_size=512, chunk_overlap=0, tokenizer=llm.tokenize)
nodes = IngestionPipeline(transformations=[splitter, WarmPrefixes(llm=llm)]).run(documents=documents)
query_engine = VectorStoreIndex(nodes, embed_model=HashedWords()).as_query_engine(
    llm=llm,
    similarity_top_k=2,
    node_postprocessors=[StablePrefixOrder(llm=llm)],  # last: whatever comes after it would move the nodes again
    prompt_helper=stable_prompt_helper(llm),
)
for question in arguments.question or ["Who supplies Tolmar Archive?", "Who ordered Project Drusveld?"]:
    response = query_engine.query(question)
    found = ", ".join(source.node.metadata["file_name"] for source in response.source_nodes)
    print(f"{question} {str(response).strip()}\n  from {found}")
