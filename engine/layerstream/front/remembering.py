"""What an engine remembers from one question to the next: prefixes, and which documents are wanted.

Warming in the background holds the engine; when the engine is closed it is stopped before and waited for after.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import Literal, overload

from layerstream.api import arguments
from layerstream.api.events import Listener
from layerstream.api.params import SamplingParams
from layerstream.api.terms import MOST_PRIORITY, Terms
from layerstream.errors import ConfigurationError
from layerstream.front.phrasing import Phrasing
from layerstream.setup.config import EngineConfig
from layerstream.store.store import PrefixStore
from layerstream.text.passages import SEEN
from layerstream.text.prompt import Prompt
from layerstream.warming import (
    AT_ONCE,
    DOCUMENTS_PER_PROMPT,
    Corpus,
    Prefixes,
    PromptTemplate,
    WarmForecast,
    Warming,
    WarmReport,
    WarmRun,
    make_forecast,
)

_ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0)


class Remembering(Phrasing):
    """Computes ahead, and counts what is asked for."""

    def __init__(self, config: EngineConfig, listener: Listener | None) -> None:
        super().__init__(config, listener)
        self._warmings: weakref.WeakSet[Warming] = weakref.WeakSet()

    def cached_tokens(self, prompt: Prompt, *, tenant: str = "") -> int:
        """Tokens at the beginning of *prompt* whose KV *tenant* has there, in memory or in the store: what a prefill of
        it would not compute. Whole pages; never the last token."""
        self._home.check()
        keys = self._parts.scheduler.prefixes.keys_of(self.encode(prompt), Terms(tenant=tenant).tenant)
        return self._parts.count_cached(keys) * self.plan.page_tokens

    @overload
    def warm(
        self,
        documents: Iterable[str],
        *,
        prompt: PromptTemplate | None = ...,
        chat_template: Literal["auto"] | bool = ...,
        top: int | None = ...,
        budget: int | str | None = ...,
        background: Literal[False] = ...,
        on_document: Callable[[int, int], None] | None = ...,
        tenant: str = ...,
    ) -> WarmReport: ...

    @overload
    def warm(
        self,
        documents: Iterable[str],
        *,
        prompt: PromptTemplate | None = ...,
        chat_template: Literal["auto"] | bool = ...,
        top: int | None = ...,
        budget: int | str | None = ...,
        background: Literal[True],
        on_document: Callable[[int, int], None] | None = ...,
        tenant: str = ...,
    ) -> Warming: ...

    def warm(
        self,
        documents: Iterable[str],
        *,
        prompt: PromptTemplate | None = None,
        chat_template: Literal["auto"] | bool = "auto",
        top: int | None = None,
        budget: int | str | None = None,
        background: bool = False,
        on_document: Callable[[int, int], None] | None = None,
        tenant: str = "",
    ) -> WarmReport | Warming:
        """Prefill *documents* into the KV store, ahead of questions about them. What is there already costs nothing.

        The most popular come first (:meth:`popularity`; equals as they are given), as far as the store has room: nine
        tenths of its bound, the rest is for what questions leave. Those that it has no room for are left out.

        Args:
            documents: contexts, each as it will stand in a prompt.
            prompt: the very template that questions use: text with ``{context}`` and ``{question}``, or a function of
                both that returns a prompt. ``None``: LangChain's and LlamaIndex's usual one, as ``layerstream ask``.
            chat_template: put a text as a user message through the chat template: where the model has one, always,
                or never.
            top: so many documents at most.
            budget: what they may take on disk, such as ``"20GB"``; what is stored already counts.
            background: return at once. Documents are then computed while nobody asks, and give way to questions.
            on_document: called with the number of documents done and of all, after each; in the background, on its
                thread.
            tenant: whose questions find them, and whose retrievals say what is popular.

        Returns:
            What was done; in the background a handle: ``progress``, ``cancel()``, ``wait()``.

        Raises:
            ConfigurationError: no store, or a template without a common beginning.
            StorageFull: there is not even room for one document.
        """
        store, corpus = self._open_store(), self._corpus(documents, top, budget, tenant)
        terms = Terms(priority=-MOST_PRIORITY if background else 0, tenant=tenant, passages=None)
        submit = self._submit_if_idle if background else self._submit
        run = WarmRun.prepare(
            self,
            Prefixes(self, prompt, chat_template, tenant),
            store,
            corpus,
            functools.partial(submit, params=_ONE_TOKEN, terms=terms),
            on_document=on_document or (lambda done, count: None),
            at_once=min(AT_ONCE, self.max_queued or AT_ONCE),
        )
        if not arguments.flag("background", background):
            return run.run()
        warming = Warming(run, self._home)
        self._warmings.add(warming)
        return warming

    def forecast_warm(
        self,
        documents: Iterable[str],
        *,
        prompt: PromptTemplate | None = None,
        chat_template: Literal["auto"] | bool = "auto",
        top: int | None = None,
        budget: int | str | None = None,
        documents_per_prompt: int = DOCUMENTS_PER_PROMPT,
        tenant: str = "",
    ) -> WarmForecast:
        """What :meth:`warm` would take, and which share of later prompts it would save, without doing it.

        Args:
            documents_per_prompt: how many a question retrieves. The others are as for :meth:`warm`.
        """
        store, corpus = self._open_store(), self._corpus(documents, top, budget, tenant)
        num = arguments.whole_number("documents_per_prompt", documents_per_prompt, 1)
        return make_forecast(self, Prefixes(self, prompt, chat_template, tenant), store, corpus, num)

    def note_retrieved(self, texts: Seq[str], *, tenant: str = "") -> None:
        """*texts*, each as it stands in a prompt, were retrieved together for one question of *tenant*.

        It is counted for :meth:`popularity`; nothing waits for that. The texts are not kept, but for a while in memory
        where they are looked for in prompts (``reuse="anywhere"``).
        """
        self._home.check()
        noted = _texts(texts)
        self._parts.popularity.note(noted, arguments.text("tenant", tenant))
        if self.reuses_anywhere:
            SEEN.add(noted, tenant)

    def popularity(self, texts: Seq[str], *, tenant: str = "") -> list[float]:
        """How often each of *texts* was retrieved by *tenant*'s questions, counted in the store: halved with every 256
        questions since. Without a store: since the engine started."""
        self._home.check()
        return self._parts.popularity.of(_texts(texts), arguments.text("tenant", tenant))

    @contextmanager
    def _without_warming(self) -> Iterator[None]:
        """Within it the engine is closed: warming in the background was stopped, and has ended behind it."""
        warmings = list(self._warmings) if self._home.is_here else []
        for warming in warmings:
            warming.stop()
        yield
        for warming in warmings if not self._home.is_own_thread else ():
            warming.join()

    def _corpus(self, documents: Iterable[str], top: int | None, budget: int | str | None, tenant: str) -> Corpus:
        texts = list(documents)
        return Corpus(texts, self.popularity(texts, tenant=tenant), top, budget)

    def _open_store(self) -> PrefixStore:
        self._loop.reception.check_open()
        store = self._parts.store
        if store is None:
            raise ConfigurationError("this engine has no KV store to warm: pass kv_store='auto' or a folder")
        store.wait_until_open()
        if store.tier is None:
            raise ConfigurationError(f"the KV store of this engine cannot be used: {store.reason}")
        return store


def _texts(texts: Seq[str]) -> list[str]:
    if isinstance(texts, str):
        raise arguments.refusal("texts", texts, "a list of texts, one for each document")
    return [arguments.text("texts", text) for text in texts]
