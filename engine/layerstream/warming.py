"""Prefill documents ahead of questions: :func:`warm` behind ``engine.warm``.

A bare document is nobody's prefix: what questions share is the prompt up to where they begin to differ. So every
document goes through the very template that questions use, with two different questions, and the tokens that both have
in common are the prefix. Its whole pages are computed unless the store has them, so warming again costs nothing and an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, Protocol

from layerstream.api.params import SamplingParams
from layerstream.api.request import Request
from layerstream.core.sizes import format_size
from layerstream.errors import ConfigurationError, StorageFull
from layerstream.kv.prefix import page_keys
from layerstream.planner import Plan
from layerstream.scheduling.states import snapshot_stride
from layerstream.store.choice import recompute_seconds
from layerstream.store.store import PrefixStore
from layerstream.text.prompt import QUESTION_PROMPT, Prompt


class Engine(Protocol):
    """What warming needs of an engine."""

    @property
    def plan(self) -> Plan:
        """What fits where."""
        ...

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts may be messages."""
        ...

    @property
    def compute_seconds_per_token(self) -> float | None:
        """What a prompt's token took so far."""
        ...

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of *prompt*."""
        ...

    def submit_many(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None, *, tenant: str = ""
    ) -> list[Request]:
        """Hand prompts in."""
        ...


PromptTemplate = str | Callable[[str, str], Prompt]
"""A text with ``{context}`` and ``{question}``, or a function of both that returns a prompt."""

_QUESTIONS = ("Who?", "1. When was it that")  # they share no first token
_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class WarmForecast:
    """What warming documents would take.

    Attributes:
        documents: how many there are.
        prefix_tokens: of all their prefixes, in whole pages; prefixes that documents share count once.
        missing_tokens: those that are not stored yet.
        missing_bytes: what they will take on disk; ``stored_bytes`` are there already, ``max_bytes`` is the bound.
        seconds: what computing them takes, by what was measured so far; ``None`` before anything was.
    """

    documents: int
    prefix_tokens: int
    missing_tokens: int
    missing_bytes: int
    stored_bytes: int
    max_bytes: int
    seconds: float | None

    @property
    def fits(self) -> bool:
        """Whether all of it can be on disk at a time."""
        return self.missing_bytes <= self.max_bytes


@dataclass(frozen=True, slots=True)
class WarmReport:
    """What warming did: *computed_tokens* of the forecast's are stored now, in *seconds*."""

    forecast: WarmForecast
    computed_tokens: int
    seconds: float


class Prefixes:
    """The prefixes that *tenant*'s questions on documents share.

    Raises:
        ConfigurationError: a template without both fields, or one that puts the question before the context.
    """

    def __init__(
        self,
        engine: Engine,
        documents: Iterable[str],
        prompt: PromptTemplate | None,
        chat: Literal["auto"] | bool,
        tenant: str = "",
    ) -> None:
        template = QUESTION_PROMPT if prompt is None else prompt
        if isinstance(template, str) and not ("{context}" in template and "{question}" in template):
            raise ConfigurationError(
                f"the prompt {template!r:.60} has no {{context}} and {{question}}; pass the template that questions use"
            )
        self.tenant = tenant
        self.page_tokens = engine.plan.page_tokens
        self.num_documents = 0
        self.chains: list[tuple[list[int], list[bytes]]] = []
        for document in documents:
            self.num_documents += 1
            ids = _common(*(engine.encode(_render(engine, template, document, q, chat)) for q in _QUESTIONS))
            whole = len(ids) // self.page_tokens * self.page_tokens
            if whole:
                prefix = [*ids[:whole], ids[0]]  # one token more: a prompt's last token is never stored
                self.chains.append((prefix, page_keys(prefix, self.page_tokens, tenant)))
        if self.num_documents and not self.chains:
            raise ConfigurationError(
                "no document has a prefix of a whole page: they are shorter than "
                f"{self.page_tokens} tokens, or the prompt puts the question before the context"
            )

    def missing(self, store: PrefixStore) -> Iterator[tuple[list[int], list[bytes]]]:
        """The chains that are not wholly stored, each with the keys that no earlier one has."""
        seen: set[bytes] = set()
        for ids, keys in self.chains:
            new = [key for key in keys[store.look_up(keys) :] if key not in seen]
            seen.update(new)
            if new:
                yield ids, new

    @property
    def num_tokens(self) -> int:
        """Of all prefixes, shared pages once."""
        return self.page_tokens * len({key for _, keys in self.chains for key in keys})


def forecast(engine: Engine, prefixes: Prefixes, store: PrefixStore) -> WarmForecast:
    """What computing the missing ones of *prefixes* takes."""
    new_pages = [len(keys) for _, keys in prefixes.missing(store)]
    missing, facts = prefixes.page_tokens * sum(new_pages), engine.plan.facts
    stride = snapshot_stride(facts.state_bytes, facts.kv_token_bytes, prefixes.page_tokens)
    num_snapshots = sum(1 + count // stride for count in new_pages)
    per_token = engine.compute_seconds_per_token
    stored, bound = store.room()
    rates = store.rates()
    return WarmForecast(
        documents=prefixes.num_documents,
        prefix_tokens=prefixes.num_tokens,
        missing_tokens=missing,
        missing_bytes=sum(new_pages) * store.page_bytes(facts.kv_token_bytes) + num_snapshots * store.snapshot_bytes,
        stored_bytes=stored,
        max_bytes=bound,
        seconds=None
        if per_token is None
        else rates.weight_seconds + recompute_seconds(missing, missing * per_token, rates),
    )


def warm(engine: Engine, prefixes: Prefixes, store: PrefixStore, on_document: Callable[[int, int], None]) -> WarmReport:
    """Compute and store what is missing, pin all of it.

    Args:
        on_document: called with the documents done and their number, after each.

    Raises:
        StorageFull: it cannot all be on disk at a time; nothing was computed.
    """
    expected = forecast(engine, prefixes, store)
    if not expected.fits:
        raise StorageFull(
            f"the KV of these documents takes {format_size(expected.missing_bytes)} and the store may hold "
            f"{format_size(expected.max_bytes)}: pass KVStoreConfig(max_bytes=...) with more, compression, or fewer "
            "documents"
        )
    started, written = time.perf_counter(), store.counters.written_pages
    work = list(prefixes.missing(store))
    store.pin([key for _, keys in prefixes.chains for key in keys])
    params = SamplingParams(max_tokens=1, temperature=0.0)
    done = prefixes.num_documents - len(work)
    on_document(done, prefixes.num_documents)
    for at in range(0, len(work), _AT_ONCE):
        requests: list[Request] = []
        try:
            requests = engine.submit_many([ids for ids, _ in work[at : at + _AT_ONCE]], params, tenant=prefixes.tenant)
            for request in requests:
                request.result()
                done += 1
                on_document(done, prefixes.num_documents)
        except BaseException:
            for request in requests:
                request.cancel()
            raise
        finally:
            store.flush()
    pages = store.counters.written_pages - written
    return WarmReport(expected, pages * prefixes.page_tokens, time.perf_counter() - started)


def _render(engine: Engine, template: PromptTemplate, context: str, question: str, chat: Any) -> Prompt:
    if not isinstance(template, str):
        return template(context, question)
    text = template.replace("{context}", context).replace("{question}", question)
    if chat is False or (chat == "auto" and not engine.has_chat_template):
        return text
    return [{"role": "user", "content": text}]


def _common(first: list[int], second: list[int]) -> list[int]:
    return [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))]
