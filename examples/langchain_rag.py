"""LangChain: retrieval with FAISS, an answer that streams, and the documents that it is from.

    python examples/langchain_rag.py [question] [--model FOLDER --memory 3GiB]

The embeddings need no download: words are hashed. Any other ``Embeddings`` will do.
"""

import argparse
import re
import zlib
from pathlib import Path

import faiss
import layerstream
import numpy as np
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnablePassthrough
from langchain_layerstream import ChatLayerStream, StablePrefixOrder, WarmPrefixes, rag_prompt
from pydantic import ConfigDict

FOLDER = Path(layerstream.__file__).parent / "demo" / "documents"  # any folder of text files


class HashedWords(Embeddings):
    """A text is the sum of its words, each a place of its own among 4096."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        vectors = np.zeros((len(texts), 4096), np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            for word in re.findall(r"\w{4,}", text.lower()):
                vector[zlib.crc32(word.encode()) % 4096] = 1
        return (vectors / np.maximum(1, np.linalg.norm(vectors, axis=1, keepdims=True))).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


class FaissRetriever(BaseRetriever):
    """The documents nearest to a question."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    embeddings: Embeddings
    documents: list[Document]
    index: faiss.Index
    k: int = 2

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        _, found = self.index.search(np.array([self.embeddings.embed_query(query)], np.float32), self.k)
        return [self.documents[number] for number in found[0]]


parser = argparse.ArgumentParser()
parser.add_argument("question", nargs="?", default="Who supplies Tolmar Archive?")
parser.add_argument("--model", default="demo")
parser.add_argument("--memory")
arguments = parser.parse_args()

prompt = rag_prompt()
engine_options = {"memory": arguments.memory} if arguments.memory else {}
llm = ChatLayerStream(model=arguments.model, max_tokens=32, engine_kwargs=engine_options)

documents = [Document(path.read_text(), metadata={"source": path.name}) for path in sorted(FOLDER.glob("*.md"))]
embeddings = HashedWords()
index = faiss.IndexFlatIP(4096)
index.add(np.array(embeddings.embed_documents([document.page_content for document in documents]), np.float32))
WarmPrefixes(llm=llm, prompt=prompt).transform_documents(documents[:4])  # these are computed before anybody asks

# What the store knows comes first; the answer streams while its sources are kept.
retrieve = FaissRetriever(embeddings=embeddings, documents=documents, index=index) | StablePrefixOrder(
    llm=llm, prompt=prompt
)
join = RunnablePassthrough.assign(context=lambda given: "\n\n".join(d.page_content for d in given["documents"]))
chain = {"documents": retrieve, "input": RunnablePassthrough()} | RunnablePassthrough.assign(answer=join | prompt | llm)

sources = []
for piece in chain.stream(arguments.question):
    if "documents" in piece:
        sources = [document.metadata["source"] for document in piece["documents"]]
    if "answer" in piece:
        print(piece["answer"].text, end="", flush=True)
print(f"\n  from {', '.join(sources)}")
