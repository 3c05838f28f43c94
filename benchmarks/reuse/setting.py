"""What a pipeline is made of: an engine with an empty store, the corpus, the order of passages, and who watches."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from langchain_core.documents import Document
from langchain_layerstream import ChatLayerStream, StablePrefixOrder, WarmPrefixes
from layerstream import KVStoreConfig, LayerStream
from layerstream.api.request import Request
from layerstream.core.sweep import Sweep
from llama_index.core.schema import BaseNode, NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode
from llama_index.llms.layerstream import LayerStreamLLM
from llama_index.llms.layerstream import StablePrefixOrder as NodeOrder
from llama_index.llms.layerstream import WarmPrefixes as WarmNodes

from benchmarks.reuse.corpus import Corpus
from benchmarks.reuse.oracle import ByPopularity

Variant = Literal["as found", "ordered", "learned", "warmed", "oracle", "growing"]
Ask = Callable[[str], Any]
Retrieve = Callable[[str], list[NodeWithScore]]

CONTEXT_TOKENS = 16384
MAX_TOKENS = 8


@dataclass
class Asked:
    """A prompt that the engine was given, and the request that came of it."""

    token_ids: list[int]
    at: float
    request: Request


@dataclass
class Watch:
    """Notes every prompt that is handed to *engine*, and how many tokens of prompts it computes for them."""

    engine: LayerStream
    asked: list[Asked] = field(default_factory=list)
    computed_tokens: int = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it."""
        submit = self.engine._submit

        def noting(prompts: Sequence[Any], *arguments: Any, **options: Any) -> list[Request]:
            requests = submit(prompts, *arguments, **options)
            at = time.perf_counter()
            for prompt, request in zip(prompts, requests, strict=True):
                self.asked.append(Asked(self.engine.encode(prompt), at, request))
            return requests

        scheduler = self.engine._parts.scheduler
        commit = scheduler.commit

        def counting(sweep: Sweep) -> Any:
            for _, span in sweep.known_spans():
                self.computed_tokens += max(0, min(span.stop, span.sequence.num_prompt_tokens) - span.start)
            return commit(sweep)

        self.engine._submit = noting  # type: ignore[method-assign]
        scheduler.commit = counting  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.engine._submit, scheduler.commit  # the classes' own are there again


@dataclass
class Setting:
    """One row's.

    Attributes:
        variant: what is done about the order of passages.
        now: the question that is being asked. Retrievers look for it and not for what the model made of it: where a
            pipeline has the model rewrite a question, it does, and the toy's words are set aside.
    """

    engine: LayerStream
    corpus: Corpus
    variant: Variant
    now: str = ""

    @property
    def llm(self) -> ChatLayerStream:
        """LangChain's."""
        return ChatLayerStream(engine=self.engine, max_tokens=MAX_TOKENS, temperature=0.0)

    @property
    def own(self) -> LayerStreamLLM:
        """LlamaIndex's."""
        return LayerStreamLLM(engine=self.engine, max_new_tokens=MAX_TOKENS, temperature=0.0)

    @property
    def is_ordered(self) -> bool:
        """Whether passages go through ``StablePrefixOrder``."""
        return self.variant in ("ordered", "learned", "warmed", "growing")

    def find_documents(self) -> list[Document]:
        """For the question that is being asked, as LangChain's."""
        return [as_document(passage) for passage in self.corpus.find(self.now)]

    def find_nodes(self) -> list[NodeWithScore]:
        """For the question that is being asked, as LlamaIndex's."""
        return [NodeWithScore(node=as_node(passage), score=0.5) for passage in self.corpus.find(self.now)]

    def document_order(self, prompt: Any) -> Callable[[list[Document]], list[Document]]:
        """What the variant does to LangChain's documents that go into *prompt*; warms them where it does."""
        shape = {"llm": self.llm, "prompt": prompt}
        if self.variant == "warmed":
            found = [as_document(p) for question in self.corpus.questions for p in self.corpus.find(question)]
            WarmPrefixes(**shape).transform_documents(list({d.page_content: d for d in found}.values()))
        if not self.is_ordered:
            return list
        return StablePrefixOrder(**shape, learn=self.variant != "ordered").invoke

    def node_order(self, retrieve: Retrieve, prompt: Any, earlier: Sequence[Any] = ()) -> list[Any]:
        """Postprocessors that do it to LlamaIndex's nodes, behind *earlier* ones.

        Args:
            retrieve: for popularity that nobody can know, and for what will be asked.
        """
        shape = {"llm": self.own, "prompt": prompt}
        if self.variant == "warmed":
            WarmNodes(**shape)(list({found.node.node_id: found.node for found in self._all(retrieve)}.values()))
        if self.variant == "oracle":
            return [*earlier, ByPopularity(counts=Counter(found.node.node_id for found in self._all(retrieve)))]
        return [*earlier, NodeOrder(**shape, learn=self.variant != "ordered")] if self.is_ordered else list(earlier)

    def _all(self, retrieve: Retrieve) -> list[NodeWithScore]:
        """What all questions bring."""
        return [found for question in self.corpus.questions for found in retrieve(question)]


def as_document(passage: Any) -> Document:
    """A passage for LangChain."""
    return Document(passage.text, metadata={"source": passage.document, "chunk": passage.index})


def as_node(passage: Any) -> BaseNode:
    """A passage for LlamaIndex."""
    return TextNode(
        id_=f"{passage.document} {passage.index}",
        text=passage.text,
        start_char_idx=passage.index,
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=passage.document)},
    )


def stretch(model: str, folder: Path) -> str:
    """*model* as it is, or, if its context is too short for agents, a copy in *folder* that says it is longer: the
    answers beyond suffer, what prompts cost does not."""
    from layerstream.checkpoint.hub import bundled_reader

    source = bundled_reader() if model == "demo" else Path(model)
    if not (source / "config.json").is_file():
        return model
    config = json.loads((source / "config.json").read_text())
    if config.get("max_position_embeddings", CONTEXT_TOKENS) >= CONTEXT_TOKENS:
        return model
    for path in source.iterdir():
        if path.name != "config.json" and path.is_file():
            (folder / path.name).symlink_to(path.resolve())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT_TOKENS}))
    return str(folder)


@contextmanager
def fresh_engine(model: str, options: argparse.Namespace) -> Iterator[LayerStream]:
    """An engine with an empty store, or with none."""
    given = {"memory": options.memory, "chunk_tokens": options.chunk_tokens}
    if options.reuse == "anywhere":
        given["reuse"] = "anywhere"
    with tempfile.TemporaryDirectory() as folder:
        given["kv_store"] = None if options.reuse == "off" else KVStoreConfig(folder)
        with LayerStream(model, progress=False, **given) as engine:
            yield engine
