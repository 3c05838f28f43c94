"""What the frameworks' standard chains share between questions, before and after the order of documents is minded.

    python -m benchmarks.chains [MODEL] [--memory 2300MiB] [--questions 5] [--batch 40]

The same questions over the same six documents (BM25, the best four) through LangChain's and LlamaIndex's own chains,
three times, each with an empty store: documents as the retriever ranks them; in the order that ``StablePrefixOrder``
gives; and with ``WarmPrefixes`` over all of them before the first question. Shown are prompt tokens, those of them that
were there already, and seconds until the answer begins, per question, the first one apart. Then one batch through a
chain, at once and one by one, and what importing the wrappers takes beside the frameworks' own base classes.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_layerstream import ChatLayerStream, StablePrefixOrder, WarmPrefixes, gang, rag_prompt
from layerstream import KVStoreConfig, LayerStream
from layerstream.demo.retrieval import Document as Text
from layerstream.demo.retrieval import Retriever
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.chat_engine.context import DEFAULT_CONTEXT_TEMPLATE
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import ChatPromptTemplate
from llama_index.core.prompts.default_prompt_selectors import (
    DEFAULT_TEXT_QA_PROMPT_SEL,
    DEFAULT_TREE_SUMMARIZE_PROMPT_SEL,
)
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeRelationship, NodeWithScore, QueryBundle, RelatedNodeInfo, TextNode
from llama_index.llms.layerstream import LayerStreamLLM, context_first_prompts
from llama_index.llms.layerstream import StablePrefixOrder as NodeOrder
from llama_index.llms.layerstream import WarmPrefixes as WarmNodes

from benchmarks import bench
from benchmarks.reader.facts import draw_sentences, draw_sheets, file_name, render_document

NUM_DOCUMENTS, NUM_RETRIEVED, MAX_TOKENS = 6, 4, 12
VARIANTS = ("as found", "ordered", "ordered, warmed")
IMPORTS = {
    "langchain": (
        "from langchain_core.language_models import BaseChatModel, BaseLLM",
        "from langchain_layerstream import ChatLayerStream, LayerStreamLLM",
    ),
    "llama-index": (
        "from llama_index.core.llms.function_calling import FunctionCallingLLM",
        "from llama_index.llms.layerstream import LayerStreamLLM",
    ),
}

Ask = Callable[[str], Any]


@dataclass
class Corpus:
    """Documents, and questions about several of them."""

    retriever: Retriever
    questions: list[str]

    @property
    def documents(self) -> list[Document]:
        return [Document(passage.text, metadata={"source": passage.document}) for passage in self.retriever.passages]

    def find(self, question: str) -> list[Document]:
        """The best four; filled up, since BM25 only finds what shares a word."""
        found = self.retriever.retrieve(question, NUM_RETRIEVED)
        rest = [passage for passage in self.retriever.passages if passage not in found]
        chosen = [*found, *rest][:NUM_RETRIEVED]
        return [Document(passage.text, metadata={"source": passage.document}) for passage in chosen]

    def find_nodes(self, question: str) -> list[NodeWithScore]:
        return [NodeWithScore(node=_node(document)) for document in self.find(question)]


def make_corpus(num_questions: int, seed: int = 11) -> Corpus:
    """Six documents of about 250 tokens; questions that the retriever ranks the documents differently for."""
    rng = random.Random(seed)
    sheets = [sheet for sheet in draw_sheets(rng, 120) if len(sheet.facts) > 4][: 2 * NUM_DOCUMENTS]
    texts = []
    for first, second in zip(sheets[::2], sheets[1::2], strict=True):
        parts = [render_document(sheet.entity, draw_sentences(sheet.facts, rng), rng) for sheet in (first, second)]
        texts.append(Text(file_name(first.entity), "\n\n".join(parts)))
    questions = [rng.choice(sheet.facts).question(rng) for sheet in rng.sample(sheets, num_questions)]
    return Corpus(Retriever(texts), questions)


def langchain_stuff(llm: ChatLayerStream, corpus: Corpus, order: Any, postprocessors: Any) -> Ask:
    chain = create_stuff_documents_chain(llm, rag_prompt())
    return lambda question: chain.invoke({"context": order(corpus.find(question)), "input": question})


def langchain_retrieval(llm: ChatLayerStream, corpus: Corpus, order: Any, postprocessors: Any) -> Ask:
    retrieve = RunnableLambda(lambda inputs: order(corpus.find(inputs["input"])))
    chain = create_retrieval_chain(retrieve, create_stuff_documents_chain(llm, rag_prompt()))
    return lambda question: chain.invoke({"input": question})


def llama_index_query(mode: str) -> Callable[..., Ask]:
    def make(llm: ChatLayerStream, corpus: Corpus, order: Any, postprocessors: Any) -> Ask:
        own = LayerStreamLLM(engine=llm.engine, max_new_tokens=MAX_TOKENS)
        engine = RetrieverQueryEngine.from_args(
            _Nodes(corpus), llm=own, response_mode=mode, node_postprocessors=postprocessors
        )
        engine.update_prompts(context_first_prompts())
        return engine.query

    return make


def llama_index_chat(llm: ChatLayerStream, corpus: Corpus, order: Any, postprocessors: Any) -> Ask:
    own = LayerStreamLLM(engine=llm.engine, max_new_tokens=MAX_TOKENS)
    engine = ContextChatEngine.from_defaults(_Nodes(corpus), llm=own, node_postprocessors=postprocessors)
    return engine.chat


CHAINS: dict[str, Callable[..., Ask]] = {
    "LangChain create_stuff_documents_chain": langchain_stuff,
    "LangChain create_retrieval_chain": langchain_retrieval,
    "LlamaIndex compact": llama_index_query("compact"),
    "LlamaIndex refine": llama_index_query("refine"),
    "LlamaIndex tree_summarize": llama_index_query("tree_summarize"),
    "LlamaIndex ContextChatEngine": llama_index_chat,
}

PROMPTS = {
    "tree_summarize": DEFAULT_TREE_SUMMARIZE_PROMPT_SEL,
    "ContextChatEngine": ChatPromptTemplate([ChatMessage(role="system", content=DEFAULT_CONTEXT_TEMPLATE)]),
}
"""Those that a chain puts its context into, where it is not the question-answering one."""


@contextmanager
def fresh_engine(options: argparse.Namespace, store: bool = True) -> Iterator[LayerStream]:
    """An engine with an empty store."""
    with tempfile.TemporaryDirectory() as folder:
        kv = KVStoreConfig(folder) if store else None
        with LayerStream(options.model, memory=options.memory, kv_store=kv, progress=False) as engine:
            yield engine


def measure_chain(name: str, variant: str, corpus: Corpus, options: argparse.Namespace) -> dict[str, Any]:
    """Per question: prompt tokens, cached ones, seconds until the answer began."""
    with fresh_engine(options) as engine:
        llm = ChatLayerStream(engine=engine, max_tokens=MAX_TOKENS)
        order, postprocessors = list, []
        prompt = PROMPTS.get(name.split()[-1], DEFAULT_TEXT_QA_PROMPT_SEL)
        own = {"llm": LayerStreamLLM(engine=engine, max_new_tokens=MAX_TOKENS), "prompt": prompt}
        if variant != "as found":
            order, postprocessors = StablePrefixOrder(llm=llm).invoke, [NodeOrder(**own)]
        if variant == "ordered, warmed":
            if name.startswith("LangChain"):
                WarmPrefixes(llm=llm).transform_documents(corpus.documents)
            else:
                WarmNodes(**own)([_node(document) for document in corpus.documents])
        ask = CHAINS[name](llm, corpus, order, postprocessors)
        submitted, submit = [], engine.submit

        def watch(*arguments: Any, **terms: Any) -> Any:
            submitted.append((time.perf_counter(), submit(*arguments, **terms)))
            return submitted[-1][1]

        engine.submit = watch  # type: ignore[method-assign]
        rows = []
        for question in corpus.questions:
            submitted.clear()
            started = time.perf_counter()
            ask(question)
            done = [(at, request.result()) for at, request in submitted]
            at, last = done[-1]
            rows.append(
                {
                    "prompt_tokens": sum(completion.usage.prompt_tokens for _, completion in done),
                    "cached_tokens": sum(completion.usage.cached_tokens for _, completion in done),
                    "first_token_seconds": at + last.metrics.first_token_seconds - started,
                }
            )
            engine._open_store().flush()
    return {"chain": name, "variant": variant, "questions": rows}


def measure_batch(options: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    """One batch through a chain whose model stands within an ``assign``: sweeps at once, in LangChain's pool, alone."""
    figures: dict[str, Any] = {"inputs": options.batch}
    inputs = [{"input": corpus.questions[number % len(corpus.questions)]} for number in range(options.batch)]
    for name in ("in a gang", "LangChain's pool", "one by one"):
        with fresh_engine(options, store=False) as engine:
            llm = ChatLayerStream(engine=engine, max_tokens=MAX_TOKENS)
            context = RunnableLambda(lambda given: corpus.find(given["input"])[0].page_content)
            chain = RunnablePassthrough.assign(context=context).assign(answer=rag_prompt() | llm)
            started = time.perf_counter()
            if name == "in a gang":
                gang(chain).batch(inputs)
            elif name == "one by one":
                for given in inputs:
                    chain.invoke(given)
            else:
                chain.batch(inputs)
            figures[name] = {"sweeps": engine.stats().sweeps, "seconds": time.perf_counter() - started}
    return figures


def measure_imports(times: int = 7) -> dict[str, Any]:
    """Seconds, medians of fresh interpreters, in turns."""
    seconds: dict[str, list[float]] = {}
    for _ in range(times):
        for framework, programs in IMPORTS.items():
            for kind, program in zip(("base", "wrapper"), programs, strict=True):
                timed = f"import time; t = time.perf_counter(); {program}; print(time.perf_counter() - t)"
                done = subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True)
                seconds.setdefault(f"{framework} {kind}", []).append(float(done.stdout))
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--memory")
    parser.add_argument("--questions", type=int, default=5)
    parser.add_argument("--batch", type=int, default=40)
    options = parser.parse_args()
    corpus = make_corpus(options.questions)
    results, rows = [], []
    for name in CHAINS:
        for variant in VARIANTS:
            figures = measure_chain(name, variant, corpus, options)
            results.append(figures)
            first, *later = figures["questions"]
            mean = {key: statistics.mean(row[key] for row in later) for key in first}
            rows.append(
                [
                    name,
                    variant,
                    f"{first['cached_tokens']} of {first['prompt_tokens']}",
                    f"{first['first_token_seconds']:.2f}",
                    f"{mean['cached_tokens']:.0f} of {mean['prompt_tokens']:.0f}",
                    f"{mean['first_token_seconds']:.2f}",
                ]
            )
            print(*rows[-1], sep=" | ", flush=True)
    columns = ["chain", "documents", "first: reused", "s", "later: reused", "s"]
    bench.show(f"Tokens reused and seconds until the answer begins, {options.model}", columns, rows)
    batch = measure_batch(options, corpus)
    kinds = [name for name in batch if name != "inputs"]
    table = [[name, str(batch[name]["sweeps"]), f"{batch[name]['seconds']:.1f}"] for name in kinds]
    bench.show(f"{options.batch} questions through a chain", ["", "sweeps", "seconds"], table)
    imports = measure_imports()
    bench.show("Imports", ["", "seconds"], [[name, f"{value:.3f}"] for name, value in imports.items()])
    bench.save("chains", {"machine": bench.machine(), "chains": results, "batch": batch, "imports": imports})


class _Nodes(BaseRetriever):
    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._corpus.find_nodes(query_bundle.query_str)


def _node(document: Document) -> TextNode:
    source = document.metadata["source"]
    return TextNode(
        id_=source,
        text=document.page_content,
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=source)},
    )


if __name__ == "__main__":
    main()
