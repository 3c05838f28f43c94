"""The one object users hold: :class:`LayerStream`."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from layerstream.api import arguments
from layerstream.api.completion import Completion, Delta
from layerstream.api.events import Listener
from layerstream.api.home import Home
from layerstream.api.params import SamplingParams, as_params
from layerstream.api.request import Request
from layerstream.chat.tools import ToolChoice
from layerstream.chat.turn import Turn
from layerstream.checkpoint.hub import DEMO, bundled_reader
from layerstream.core.sizes import format_size
from layerstream.errors import ConfigurationError
from layerstream.hardware.threads import run_apart
from layerstream.hardware.timeline import Timeline
from layerstream.intake import Intake, Terms
from layerstream.planner import Plan
from layerstream.progress import make_listener
from layerstream.runtime.loop import EngineLoop
from layerstream.runtime.reception import OpenGang, Outside
from layerstream.setup.assembly import Assembly, assemble
from layerstream.setup.config import MAX_QUEUED, EngineConfig, as_config
from layerstream.setup.self_check import check_untested
from layerstream.stats import EngineStats, collect_stats
from layerstream.store.config import KVStoreConfig
from layerstream.store.store import PrefixStore
from layerstream.text.prompt import Prompt, split_prompts
from layerstream.warming import Prefixes, PromptTemplate, WarmForecast, WarmReport, forecast, warm

logger = logging.getLogger(__name__)

GANG_SECONDS = 1.0
MOST_GANG_SECONDS = 3600.0  # everybody waits for a gang

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
        chunk_tokens: prompt tokens that attend together, and that a page of the KV store holds: prefixes are shared in
            multiples of it (32 where weights stream, 128 where they do not).
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
            max_queued=max_queued,
            trust_remote_code=trust_remote_code,
            revision=revision,
            token=token,
            allow_untested=allow_untested,
            allow_control_tokens=allow_control_tokens,
        )
        self._progress = listener = make_listener(progress)
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
            self._intake = Intake(parts, loop.reception.cancel, lambda: parts.seconds_per_sweep(loop.counters), home)
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
        said = {"allow_control_tokens": True} if config.allow_control_tokens else {}
        return {name: getattr(config, name) for name in names if getattr(config, name) is not None} | said

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
    ) -> list[Completion]:
        """Complete one prompt or several; several share every sweep.

        Args:
            prompts: text, a list of token ids or a list of chat messages; or a list of those.
            timeout: seconds after which a request that is not finished is given up.
            priority: where requests have to wait, more goes first; waiting raises it.
            client: whom it is for; clients share the engine fairly.

        Returns:
            ``n`` completions for each prompt, in order.

        Raises:
            PromptError, GrammarError: before anything runs. RequestTimeout: *timeout* is over. Other errors: the cause
                of the first request that failed.
        """
        requests = self.submit_many(split_prompts(prompts), params, timeout=timeout, priority=priority, client=client)
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
    ) -> Iterator[Delta]:
        """Deltas as the sweeps bring them; leaving the iteration cancels the request."""
        self._loop.reception.check_open()
        return self._stream(self.encode(prompt), as_params(params), Terms(timeout, priority, client))

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
    ) -> Request:
        """Hand *prompt* in and go on; it joins the next sweep."""
        return self.submit_many([prompt], params, timeout=timeout, priority=priority, client=client)[0]

    def submit_many(
        self,
        prompts: Seq[Prompt],
        params: Params = None,
        *,
        timeout: float | None = None,
        priority: int = 0,
        client: str = "",
    ) -> list[Request]:
        """Hand several prompts in, to join the same sweep. All are checked before any is handed in.

        Raises:
            PromptError, ConfigurationError: what is wrong, and which argument it is. QueueFull: more than may wait.
            EngineClosed: the engine is closed, or another process's.
        """
        return self._submit(prompts, as_params(params), Terms(timeout, priority, client))

    def _submit(self, prompts: Seq[Prompt], params: SamplingParams, terms: Terms) -> list[Request]:
        self._loop.reception.check_open()
        requests, answers = self._intake.take(prompts, params, terms)
        self._loop.submit(answers)
        return requests

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

    def cached_tokens(self, prompt: Prompt) -> int:
        """Tokens at the beginning of *prompt* whose KV is there, in memory or in the store: what a prefill of it would
        not compute. Whole pages; never the last token."""
        self._home.check()
        scheduler, store = self._parts.scheduler, self._parts.store
        keys = scheduler.prefixes.keys_of(self.encode(prompt))
        in_memory = scheduler.count_cached(keys)
        stored = 0 if store is None else store.look_up(keys)
        return max(in_memory, stored) * self.plan.page_tokens

    def warm(
        self,
        documents: Iterable[str],
        *,
        prompt: PromptTemplate | None = None,
        chat_template: Literal["auto"] | bool = "auto",
        on_document: Callable[[int, int], None] | None = None,
    ) -> WarmReport:
        """Prefill *documents* into the KV store, ahead of questions about them. What is there already costs nothing.

        Args:
            documents: contexts, each as it will stand in a prompt.
            prompt: the very template that questions use: text with ``{context}`` and ``{question}``, or a function of
                both that returns a prompt. ``None``: LangChain's and LlamaIndex's usual one, as ``layerstream ask``.
            chat_template: put a text as a user message through the chat template: where the model has one, always,
                or never.
            on_document: called with the number of documents done and of all, after each.

        Raises:
            ConfigurationError: no store, or a template without a common beginning.
            StorageFull: more than the store may hold; nothing was computed.
        """
        store = self._open_store()
        prefixes = Prefixes(self, documents, prompt, chat_template)
        return warm(self, prefixes, store, on_document or (lambda done, count: None))

    def forecast_warm(
        self,
        documents: Iterable[str],
        *,
        prompt: PromptTemplate | None = None,
        chat_template: Literal["auto"] | bool = "auto",
    ) -> WarmForecast:
        """What :meth:`warm` would take, without doing it."""
        store = self._open_store()
        return forecast(self, Prefixes(self, documents, prompt, chat_template), store)

    def note_retrieved(self, texts: Seq[str], *, tenant: str = "") -> None:
        """*texts*, each as it stands in a prompt, were retrieved together for one question of *tenant*.

        It is counted for :meth:`popularity`; nothing waits for that. The texts are not kept.
        """
        self._home.check()
        self._parts.popularity.note(_texts(texts), arguments.text("tenant", tenant))

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
        return collect_stats(self._parts, self._loop.counters)

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
        self._loop.close()

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
