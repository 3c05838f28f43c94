"""The one object users hold: :class:`LayerStream`."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from layerstream import readings
from layerstream.api import arguments
from layerstream.api.completion import Completion, Delta
from layerstream.api.events import Listener
from layerstream.api.home import Home
from layerstream.api.params import SamplingParams, as_params
from layerstream.api.reading import HiddenState, Pooling, Reading, TokenLogits
from layerstream.api.request import Request
from layerstream.chat.tools import ToolChoice
from layerstream.chat.turn import Turn
from layerstream.checkpoint.hub import DEMO, bundled_reader
from layerstream.core.sizes import format_size
from layerstream.errors import ConfigurationError
from layerstream.hardware.threads import run_apart
from layerstream.hardware.timeline import Timeline
from layerstream.intake import MOST_PRIORITY, Intake, Terms
from layerstream.planner import Plan
from layerstream.progress import make_listener
from layerstream.runtime.guard import Guard, Shadows
from layerstream.runtime.loop import EngineLoop
from layerstream.runtime.reception import OpenGang, Outside
from layerstream.setup.assembly import Assembly, assemble
from layerstream.setup.config import MAX_QUEUED, EngineConfig, as_config
from layerstream.setup.self_check import check_untested
from layerstream.stats import EngineStats, collect_stats
from layerstream.store.config import KVStoreConfig
from layerstream.store.store import PrefixStore
from layerstream.text.passages import SEEN
from layerstream.text.prompt import Prompt, split_prompts
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

logger = logging.getLogger(__name__)

GANG_SECONDS = 1.0
MOST_GANG_SECONDS = 3600.0  # everybody waits for a gang
_ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0)

Params = SamplingParams | Mapping[str, Any] | None
"""Sampling parameters, a dict of their fields, or ``None`` for the model's own."""


class LayerStream:
    """A language model whose weights stream past the compute within a memory budget.

    Args:
        model: a folder, a hub id, or ``"demo"`` for the bundled reader.
        device: ``"auto"`` (a CUDA device where there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.
        device_map: spread the layers over all CUDA devices: ``"balanced"`` (a range of layers for each, in proportion
            to its memory), ``"sequential"`` (as many as stay on the first, then the second; the last one streams what
            is left), ``"auto"`` (balanced where everything stays; where weights stream, devices take turns, so that
            they cross all links at once). ``None``: one device.
        memory: ceiling for all that the engine allocates where it computes (``"3GiB"`` or bytes; with ``device_map``
            on each device, or a list with one for each); ``None``: what the model wants, within what the machine, or
            the device, has free.
        host_memory: on an accelerator, ceiling for weights and KV in host memory, which is pinned; what fits neither
            here nor there is read from disk for every sweep. ``None``: what has a use, within what is free.
        host_compute: of a mixture of experts on an accelerator, ``"auto"``: the processor computes experts that are in
            host memory where that is done sooner than they cross to the accelerator; ``"off"``: none, so that answers
            have the same bits whatever is where.
        dtype: ``"auto"`` (as the checkpoint was saved), ``"float32"``, ``"bfloat16"``, ``"float16"``.
        attention: ``"auto"``, ``"sdpa"`` (torch's), or ``"flash_attn"`` (that package's, on an accelerator, for what
            attends span by span there: soft caps, latents).
        cuda_graphs: on a CUDA device that has room for the whole model, launch a decode sweep at once; which changes no
            bit. ``False``: operator by operator.
        quantization: ``"nf4"``, ``"int8"`` or ``"int4"``: convert the model once, into the user's cache folder, and
            stream that: a quarter, a half, a quarter of the bytes. (What comes quantised needs nothing of the kind.)
        speculation: ``"auto"``: guesses at what comes next are verified in the sweeps, which changes no answer and
            takes fewer of them; ``"off"``: one token per sweep.
        draft_model: a smaller model with the same tokenizer (folder or hub id) that stays in memory and guesses too.
        kv_store: where the KV of prompts outlives the process: ``"auto"`` (the user's cache folder), a folder, a
            :class:`KVStoreConfig`, or ``None`` for nowhere.
        max_context: tokens per sequence at most, if fewer than the model's own limit.
        chunk_tokens: prompt tokens that attend together (32 by default); prefixes are shared finer, see
            ``plan.page_tokens``.
        reuse: ``"exact"``: KV is used again where it is what computing would give; ``"anywhere"``: also that of
            passages which stand elsewhere in the prompt, moved there and in part computed again (docs/kv-store.md).
        recompute: with ``reuse="anywhere"``, how much of a passage is computed again: a share, or ``"free"``: what a
            sweep computes anyway while it reads.
        recompute_by: ``"first"``: of each passage the first tokens; ``"deviation"``: those whose keys differ most in an
            early layer, up to which all of them are computed.
        max_queued: answers that may wait for their turn; past it, :class:`QueueFull`. ``None``: any number.
        allow_untested: try a family that is not on the tested list, after a self-check.
        allow_control_tokens: let control tokens in what messages say (``"<|im_end|>"`` in a retrieved document) be
            those of the chat template. By default they are ordinary text: what is retrieved cannot give orders.
        progress: ``"auto"`` (a line on a terminal or in a notebook once an answer takes longer than two seconds),
            a bool, or a function that is called with :mod:`layerstream.api.events`.

    Raises:
        UnsupportedModel, CheckpointError, ConfigurationError: before a weight is read.
    """

    def __init__(
        self,
        model: str | Path = "demo",
        *,
        device: str = "auto",
        device_map: str | None = None,
        memory: int | str | Seq[int | str] | None = None,
        host_memory: int | str | None = None,
        host_compute: str = "auto",
        dtype: str = "auto",
        attention: str = "auto",
        cuda_graphs: bool = True,
        quantization: str | None = None,
        kv_store: str | Path | KVStoreConfig | None = "auto",
        speculation: str = "auto",
        draft_model: str | Path | None = None,
        max_context: int | None = None,
        chunk_tokens: int | None = None,
        reuse: str = "exact",
        recompute: str | float = "free",
        recompute_by: str = "first",
        max_queued: int | None = MAX_QUEUED,
        trust_remote_code: bool = False,
        revision: str | None = None,
        token: str | None = None,
        allow_untested: bool = False,
        allow_control_tokens: bool = False,
        progress: Literal["auto"] | bool | Listener = "auto",
    ) -> None:
        config = as_config(
            model,
            device=device,
            device_map=device_map,
            memory=memory,
            host_memory=host_memory,
            host_compute=host_compute,
            dtype=dtype,
            attention=attention,
            cuda_graphs=cuda_graphs,
            quantization=quantization,
            kv_store=kv_store,
            speculation=speculation,
            draft_model=draft_model,
            max_context=max_context,
            chunk_tokens=chunk_tokens,
            reuse=reuse,
            recompute=recompute,
            recompute_by=recompute_by,
            max_queued=max_queued,
            trust_remote_code=trust_remote_code,
            revision=revision,
            token=token,
            allow_untested=allow_untested,
            allow_control_tokens=allow_control_tokens,
        )
        self._progress = listener = make_listener(progress)
        self._warmings: weakref.WeakSet[Warming] = weakref.WeakSet()
        self._home = home = Home()
        with ExitStack() as undo:
            self._parts: Assembly = run_apart(lambda: _build(config, listener), Assembly.close)
            parts = self._parts
            undo.callback(parts.close)
            self._loop = EngineLoop(
                parts.steward,
                parts.step,
                parts.drafting,
                parts.weights,
                Outside(home, listener, config.max_queued, at_end=parts.close),
            )
            loop = self._loop
            undo.callback(loop.close)
            self._guard = Guard()
            self._intake = Intake(
                parts, loop.reception.cancel, lambda: parts.seconds_per_sweep(loop.counters), home, self._guard
            )
            if self.reuses_anywhere:
                loop.compare(Shadows(self._guard, self._intake.shadow_of))
            undo.pop_all()
        weakref.finalize(self, loop.close)
        logger.info("%s: %s", self.model_name, parts.defaults.describe())
        if self.model_name == DEMO:
            _say_that_a_toy_answers()

    @property
    def model_name(self) -> str:
        """The model as it was asked for."""
        return self._parts.config.model

    @property
    def identity(self) -> dict[str, Any]:
        """What answers depend on beside prompt and parameters; caches of answers have it in their keys."""
        config = self._parts.config
        names = ("model", "revision", "dtype", "quantization", "max_context")
        said: dict[str, Any] = {"allow_control_tokens": True} if config.allow_control_tokens else {}
        if self.reuses_anywhere:
            said |= {"reuse": config.reuse, "recompute": config.recompute, "recompute_by": config.recompute_by}
        return {name: getattr(config, name) for name in names if getattr(config, name) is not None} | said

    @property
    def reuses_anywhere(self) -> bool:
        """Whether passages are moved to where they stand (``reuse="anywhere"``)."""
        return self._parts.config.reuse == "anywhere"

    def trust_reuse(self) -> None:
        """Move passages whatever comes of it, and compare no answers: where that is measured itself."""
        self._guard.is_acting = False

    @property
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer."""
        return self._parts.tokenizer

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together: the model's limit, or what the budget has KV pages for."""
        return self._parts.context_length

    @property
    def plan(self) -> Plan:
        """What is resident, what streams, and how the budget is spent; ``print`` it."""
        return self._parts.plan

    @property
    def sampling_defaults(self) -> SamplingParams:
        """What ``None`` in :class:`SamplingParams` means for this model."""
        return self._parts.defaults.sampling

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts may be lists of chat messages."""
        return self._intake.encoder.has_chat_template

    def apply_chat_template(self, messages: Seq[Mapping[str, Any]], tools: Any = None, **options: Any) -> str:
        """The prompt text that the model's chat template makes of *messages*."""
        return self._intake.encoder.apply_chat_template(messages, tools=tools, **options)

    @property
    def knows_tools(self) -> bool:
        """Whether the model's chat template has a place for tools that is understood here; else they are explained in
        words, and the grammar does the rest."""
        return self._intake.turns.knows_tools

    def turn(
        self,
        messages: Seq[Mapping[str, Any]],
        params: Params = None,
        *,
        tools: Iterable[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = None,
        parallel_tool_calls: bool | None = None,
        explain_format: bool = False,
        **template_options: Any,
    ) -> Turn:
        """The model's next turn in a chat, to be submitted and read::

            turn = engine.turn(messages, params, tools=[{"type": "function", "function": {...}}])
            reply = turn.read(engine.submit(turn.prompt, turn.params).result().text)
            reply.text, reply.thought, reply.calls

        Args:
            tools: functions that the model may call, in OpenAI's form. Every model can be given tools: a chat template
                that knows them is used, else they are explained in the prompt. Calls are well-formed by grammar.
            tool_choice: ``"auto"``, ``"any"``, ``"none"``, or the name of a tool.
            parallel_tool_calls: several calls in one answer; ``None``: yes, where the model decides to call.
            explain_format: say the JSON schema of ``params.response_format`` in the prompt.
            template_options: passed on to the chat template (``enable_thinking``, …).

        Raises:
            ToolError, PromptError, ConfigurationError: what is wrong, before anything runs.
        """
        return self._intake.turns.make(
            messages,
            as_params(params),
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            explain_format=explain_format,
            **template_options,
        )

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        params: Params = None,
        *,
        timeout: float | None = None,
        priority: int = 0,
        client: str = "",
        tenant: str = "",
        passages: Seq[str] | None = (),
    ) -> list[Completion]:
        r"""Complete one prompt or several; several share every sweep.

        Args:
            prompts: text, a list of token ids or a list of chat messages; or a list of those.
            timeout: seconds after which a request that is not finished is given up.
            priority: where requests have to wait, more goes first; waiting raises it.
            client: whom it is for; clients share the engine fairly.
            tenant: whose it is: what one tenant's prompts left in memory and on disk, no other's find. Empty: the
                engine's own (``KVStoreConfig(salt=...)``). It has to come from whoever runs the engine.
            passages: with ``reuse="anywhere"``, texts in the prompts that other prompts have as well, such as retrieved
                documents; beside those that :func:`~layerstream.compose` marked or a retriever of this process found.
                ``None``: nothing is moved.

        Returns:
            ``n`` completions for each prompt, in order.

        Raises:
            PromptError, GrammarError: before anything runs. RequestTimeout: *timeout* is over. Other errors: the cause
                of the first request that failed.
        """
        terms = Terms(timeout, priority, client, tenant, passages)
        requests = self._submit(split_prompts(prompts), as_params(params), terms)
        try:
            return [completion for request in requests for completion in request.completions()]
        except BaseException:  # Ctrl-C, or one of several failed: nobody waits for the rest
            for request in requests:
                request.cancel()
            raise

    def stream(
        self,
        prompt: Prompt,
        params: Params = None,
        *,
        timeout: float | None = None,
        priority: int = 0,
        client: str = "",
        tenant: str = "",
        passages: Seq[str] | None = (),
    ) -> Iterator[Delta]:
        """Deltas as the sweeps bring them; leaving the iteration cancels the request."""
        self._loop.reception.check_open()
        terms = Terms(timeout, priority, client, tenant, passages)
        terms = replace(terms, passages=self._intake.passages_in(prompt, terms))  # token ids do not know them
        return self._stream(self.encode(prompt), as_params(params), terms)

    def _stream(self, token_ids: list[int], params: SamplingParams, terms: Terms) -> Iterator[Delta]:
        request = self._submit([token_ids], params, terms)[0]
        try:
            yield from request
        finally:
            if self._home.is_here:
                request.cancel()

    def submit(
        self,
        prompt: Prompt,
        params: Params = None,
        *,
        timeout: float | None = None,
        priority: int = 0,
        client: str = "",
        tenant: str = "",
        passages: Seq[str] | None = (),
    ) -> Request:
        """Hand *prompt* in and go on; it joins the next sweep."""
        return self._submit([prompt], as_params(params), Terms(timeout, priority, client, tenant, passages))[0]

    def submit_many(
        self,
        prompts: Seq[Prompt],
        params: Params = None,
        *,
        timeout: float | None = None,
        priority: int = 0,
        client: str = "",
        tenant: str = "",
        passages: Seq[str] | None = (),
    ) -> list[Request]:
        """Hand several prompts in, to join the same sweep. All are checked before any is handed in.

        Raises:
            PromptError, ConfigurationError: what is wrong, and which argument it is. QueueFull: more than may wait.
            EngineClosed: the engine is closed, or another process's.
        """
        return self._submit(prompts, as_params(params), Terms(timeout, priority, client, tenant, passages))

    def _submit(self, prompts: Seq[Prompt], params: SamplingParams, terms: Terms) -> list[Request]:
        self._loop.reception.check_open()
        requests, answers = self._intake.take(prompts, params, terms)
        self._loop.submit(answers)
        return requests

    def submit_to_read(
        self,
        prompts: Seq[Prompt],
        reading: Reading,
        *,
        keep: bool = True,
        timeout: float | None = None,
        priority: int = 0,
        client: str = "",
        tenant: str = "",
    ) -> list[Request]:
        """Hand prompts in to be read instead of answered: what *reading* wants of each is its completion's ``reading``.

        Args:
            reading: :class:`TokenLogits` or :class:`HiddenState`.
            keep: let the store keep their pages. ``False`` for prompts that do not begin as later ones will: they share
                what they have in common while they are in memory, and the disk keeps what it is for.

        Raises:
            As :meth:`submit_many`.
        """
        self._loop.reception.check_open()
        if not isinstance(reading, TokenLogits | HiddenState):
            raise arguments.refusal("reading", reading, "TokenLogits or HiddenState")
        terms = Terms(timeout, priority, client, tenant)
        requests, answers = self._intake.take_to_read(prompts, reading, terms, keep=arguments.flag("keep", keep))
        self._loop.submit(answers)
        return requests

    def embed(
        self,
        texts: Prompt | Seq[Prompt],
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        on_done: Callable[[int, int], None] | None = None,
        **terms: Any,
    ) -> np.ndarray:
        """Vectors ``(n, hidden)`` of *texts*, fp32: final hidden states, in as few sweeps as there is room for.

        Args:
            texts: as prompts of :meth:`generate`; a text has what the model's tokenizer adds to it.
            pooling: ``"last"``: of the last token; ``"mean"``: the mean over all.
            normalize: each vector of length 1.
            on_done: called with the number of texts done and of all, after each.
            terms: ``keep`` (here ``False`` if not given), ``timeout``, ``priority``, ``client``, ``tenant``: as of
                :meth:`submit_to_read`.
        """
        submit = functools.partial(self.submit_to_read, reading=HiddenState(pooling), **{"keep": False, **terms})
        vectors = readings.read(submit, self._encode_all(texts), on_done, self._parts.config.max_queued)
        return readings.normalized(vectors, self.plan.facts.hidden_size, is_wanted=normalize)

    def score(
        self,
        prompts: Prompt | Seq[Prompt],
        tokens: Iterable[str | int] = ("yes", "no"),
        *,
        on_done: Callable[[int, int], None] | None = None,
        **terms: Any,
    ) -> np.ndarray:
        """Probabilities ``(n, tokens)`` that each of *prompts* goes on with one of *tokens* rather than with another of
        them; of a single token, the logistic function of its logit.

        Args:
            tokens: texts that are one token each, or token ids.
            on_done, terms: as of :meth:`embed`; ``keep`` is ``True`` if not given.

        Raises:
            ConfigurationError: a text that is several tokens.
        """
        wanted = readings.token_ids_of(tokens, self.encode_piece)
        submit = functools.partial(self.submit_to_read, reading=TokenLogits(wanted), **terms)
        return readings.probabilities(
            readings.read(submit, self._encode_all(prompts), on_done, self._parts.config.max_queued), len(wanted)
        )

    def _encode_all(self, prompts: Prompt | Seq[Prompt]) -> list[list[int]]:
        """What is wrong with the last of many is said before the first is computed."""
        return [self.encode(prompt) for prompt in split_prompts(prompts)]

    def gang(self, size: int, timeout: float = GANG_SECONDS) -> AbstractContextManager[OpenGang]:
        """Within it, requests wait for each other: none is begun before *size* of them were submitted, by whatever
        threads, or *timeout* seconds are over. ``leave()`` of what it yields: one of them is not going to come.
        For batches whose members arrive one by one::

            with engine.gang(len(questions)), ThreadPoolExecutor() as pool:
                answers = list(pool.map(chain.invoke, questions))

        Raises:
            ConfigurationError: *size* or *timeout* is out of range: everybody waits for a gang, for an hour at most.
        """
        self._loop.reception.check_open()
        size = arguments.whole_number("size", size, 0)
        return self._loop.reception.gang(size, arguments.number("timeout", timeout, 0.0, MOST_GANG_SECONDS))

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids that *prompt* stands for, with the model's opening tokens once."""
        return self._intake.encoder.encode(prompt)

    def encode_piece(self, text: str, *, is_said: bool = False) -> list[int]:
        """The token ids of *text* with nothing added: a piece of a prompt. What *is_said* (a retrieved document)
        becomes no control token."""
        return self._intake.encoder.encode_piece(text, is_said=is_said)

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """The token ids that the model's tokenizer puts before a text, and behind it."""
        return self._intake.encoder.frame

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
        run = WarmRun.prepare(
            self,
            Prefixes(self, prompt, chat_template, tenant),
            store,
            corpus,
            functools.partial(self._submit_while_idle, tenant=tenant)
            if background
            else functools.partial(self.submit_many, params=_ONE_TOKEN, tenant=tenant, passages=None),
            on_document=on_document or (lambda done, count: None),
            at_once=min(AT_ONCE, self._parts.config.max_queued or AT_ONCE),
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

    def _corpus(self, documents: Iterable[str], top: int | None, budget: int | str | None, tenant: str) -> Corpus:
        texts = list(documents)
        return Corpus(texts, self.popularity(texts, tenant=tenant), top, budget)

    def _submit_while_idle(self, prompts: Seq[Prompt], *, tenant: str) -> list[Request] | None:
        """A token for each of *prompts*; ``None``: somebody asks."""
        self._loop.reception.check_open()
        requests, answers = self._intake.take(
            prompts, _ONE_TOKEN, Terms(priority=-MOST_PRIORITY, tenant=tenant, passages=None)
        )
        return requests if self._loop.submit_if_idle(answers) else None

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

    @property
    def compute_seconds_per_token(self) -> float | None:
        """What computing a prompt's token took so far, reading left out; ``None`` before a prompt was computed."""
        step = self._parts.step
        return step.prefill_seconds / step.prefill_tokens if step.prefill_tokens else None

    @contextmanager
    def record(self) -> Iterator[Timeline]:
        """Within it, the timeline is told what goes on: reads, copies, waits and compute, unit by unit::

        with engine.record() as timeline:
            engine.generate(prompt, params)
        timeline.write_chrome("trace.json")  # for ui.perfetto.dev
        """
        self._home.check()
        timeline = Timeline()
        self._parts.record(timeline)
        try:
            yield timeline
        finally:
            self._parts.record(None)

    def stats(self) -> EngineStats:
        """Counters since the engine started."""
        self._home.check()
        return collect_stats(self._parts, self._loop.counters, self._loop.clients, self._guard)

    def _open_store(self) -> PrefixStore:
        self._loop.reception.check_open()
        store = self._parts.store
        if store is None:
            raise ConfigurationError("this engine has no KV store to warm: pass kv_store='auto' or a folder")
        store.wait_until_open()
        if store.tier is None:
            raise ConfigurationError(f"the KV store of this engine cannot be used: {store.reason}")
        return store

    def close(self) -> None:
        """Stop by the next unit; what still runs fails with :class:`EngineClosed`. Never raises, ends every thread of
        the engine. Idempotent, from any thread; from a callback it takes effect when the callback has returned."""
        warmings = list(self._warmings) if self._home.is_here else []
        for warming in warmings:
            warming.stop()
        self._loop.close()
        for warming in warmings if not self._home.is_own_thread else ():
            warming.join()

    def __enter__(self) -> LayerStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LayerStream({self.model_name!r}, {'streaming' if self.plan.streams else 'resident'})"


def _texts(texts: Seq[str]) -> list[str]:
    if isinstance(texts, str):
        raise arguments.refusal("texts", texts, "a list of texts, one for each document")
    return [arguments.text("texts", text) for text in texts]


@functools.cache
def _say_that_a_toy_answers() -> None:
    """Once in a process; whoever named no model may take it for more."""
    size = sum(path.stat().st_size for path in bundled_reader().glob("*.safetensors"))
    logger.warning(
        "the bundled %s toy answers: it finds short answers in a text of the prompt and knows nothing else; name a "
        "model for more (model=, or LAYERSTREAM_MODEL)",
        format_size(size),
    )


def _build(config: EngineConfig, listener: Listener | None) -> Assembly:
    if config.allow_untested:
        check_untested(config)
    return assemble(config, listener)
