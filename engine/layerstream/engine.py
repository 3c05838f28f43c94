"""The one object users hold: :class:`LayerStream`."""

from __future__ import annotations

import dataclasses
import functools
import logging
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from layerstream.answer import Answer
from layerstream.assembly import Assembly, EngineConfig, assemble
from layerstream.beams import BeamAnswer
from layerstream.completion import Completion, Delta
from layerstream.constraint import Constraint
from layerstream.errors import ConfigurationError, EngineClosed
from layerstream.events import Listener
from layerstream.kv.config import KVStoreConfig, store_config
from layerstream.kv.store import KVStats, PrefixStore
from layerstream.loop import EngineLoop
from layerstream.params import SamplingParams
from layerstream.planner import Plan
from layerstream.progress import make_listener
from layerstream.request import Request
from layerstream.scheduling.beam import BeamSearch
from layerstream.scheduling.drafting.trees import DrafterCounters
from layerstream.scheduling.grammar import Grammars
from layerstream.self_check import check_untested
from layerstream.sequence import Sequence
from layerstream.sizes import parse_size
from layerstream.text.detokenizer import Detokenizer
from layerstream.text.prompt import Prompt, PromptEncoder, split_prompts
from layerstream.text.stop import StopMatcher
from layerstream.warming import Prefixes, PromptTemplate, WarmForecast, WarmReport, forecast, warm

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 30 * 60  # the default max_tokens fits in this much time
DEFAULT_MAX_TOKENS = 256
MIN_DEFAULT_MAX_TOKENS = 16
GANG_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the engine started.

    Attributes:
        weight_bytes_streamed: read from disk by sweeps; resident weights, read once, are not in it.
        peak_memory_bytes: most the engine held at a time: resident weights, ring, KV pages in use, activations.
        wait_seconds: of ``sweep_seconds``, how long the compute waited for weights.
        kv: what the prefix cache did.
        read_modes: files per way of reading ("direct", "uncached", "buffered").
        drafted_tokens, accepted_tokens: guesses that were verified, and those that were right; ``drafters`` by whom.
        forced_tokens: tokens that a grammar left no choice about; they took no sweep.
    """

    sweeps: int
    tokens_in: int
    tokens_out: int
    weight_bytes_streamed: int
    sweep_seconds: float
    wait_seconds: float
    peak_memory_bytes: int
    budget_bytes: int
    resident_bytes: int
    model_bytes: int
    read_modes: Mapping[str, int]
    kv: KVStats
    drafted_tokens: int
    accepted_tokens: int
    forced_tokens: int
    drafters: Mapping[str, DrafterCounters]


class LayerStream:
    """A language model whose weights stream past the compute within a memory budget.

    Args:
        model: a folder, a hub id, or ``"demo"`` for the bundled reader.
        device: ``"auto"`` or ``"cpu"``.
        memory: ceiling for all that the engine allocates (``"3GiB"`` or bytes); ``None``: what the model wants, within
            what the machine has free.
        dtype: ``"auto"`` (as the checkpoint was saved), ``"float32"``, ``"bfloat16"``, ``"float16"``.
        speculation: ``"auto"``: guesses at what comes next are verified in the sweeps, which changes no answer and
            takes fewer of them; ``"off"``: one token per sweep.
        draft_model: a smaller model with the same tokenizer (folder or hub id) that stays in memory and guesses too.
        kv_store: where the KV of prompts outlives the process: ``"auto"`` (the user's cache folder), a folder, a
            :class:`KVStoreConfig`, or ``None`` for nowhere.
        max_context: tokens per sequence at most, if fewer than the model's own limit.
        chunk_tokens: prompt tokens that attend together, and that a page of the KV store holds: prefixes are shared in
            multiples of it (32 where weights stream, 128 where they do not).
        allow_untested: try a family that is not on the tested list, after a self-check.
        progress: ``"auto"`` (a line on a terminal or in a notebook once an answer takes longer than two seconds),
            a bool, or a function that is called with :mod:`layerstream.events`.

    Raises:
        UnsupportedModel, CheckpointError, ConfigurationError: before a weight is read.
    """

    def __init__(
        self,
        model: str | Path = "demo",
        *,
        device: str = "auto",
        memory: int | str | None = None,
        host_memory: int | str | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        kv_store: str | Path | KVStoreConfig | None = "auto",
        speculation: str = "auto",
        draft_model: str | None = None,
        max_context: int | None = None,
        chunk_tokens: int | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        token: str | None = None,
        allow_untested: bool = False,
        progress: Literal["auto"] | bool | Listener = "auto",
    ) -> None:
        EngineConfig.check_not_yet(host_memory, quantization)
        config = EngineConfig(
            model=str(model),
            device=device,
            memory_bytes=None if memory is None else parse_size(memory),
            dtype=dtype,
            max_context=max_context,
            chunk_tokens=chunk_tokens,
            trust_remote_code=trust_remote_code,
            revision=revision,
            token=token,
            allow_untested=allow_untested,
            kv_store=store_config(kv_store),
            kv_store_is_default=kv_store == "auto",
            speculation=speculation,
            draft_model=draft_model,
        )
        if allow_untested:
            check_untested(config)
        self._progress = make_listener(progress)
        self._parts: Assembly = assemble(config, self._progress)
        parts = self._parts
        self._loop = EngineLoop(parts.scheduler, parts.step, parts.drafting, parts.weights, self._progress)
        self._close = weakref.finalize(self, _shut, self._loop, self._parts)
        self._encoder = PromptEncoder(
            self._parts.tokenizer, max_context=self.context_length, vocab_size=self.plan.facts.vocab_size
        )
        self._grammars = Grammars(self._parts.tokenizer, self.plan.facts.vocab_size, self._parts.defaults.eos_token_ids)
        self._numbers = iter(range(2**62))
        self._lock = threading.Lock()
        logger.info("%s: %s", self.model_name, self._parts.defaults.describe())

    @property
    def model_name(self) -> str:
        """The model as it was asked for."""
        return self._parts.config.model

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
        return self._encoder.has_chat_template

    def apply_chat_template(self, messages: Seq[Mapping[str, Any]], tools: Any = None, **options: Any) -> str:
        """The prompt text that the model's chat template makes of *messages*."""
        return self._encoder.apply_chat_template(messages, tools=tools, **options)

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        params: SamplingParams | None = None,
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
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        priority: int = 0,
        client: str = "",
    ) -> Iterator[Delta]:
        """Deltas as the sweeps bring them; leaving the iteration cancels the request."""
        request = self.submit(prompt, params, timeout=timeout, priority=priority, client=client)
        try:
            yield from request
        finally:
            request.cancel()

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
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
        params: SamplingParams | None = None,
        *,
        timeout: float | None = None,
        priority: int = 0,
        client: str = "",
    ) -> list[Request]:
        """Hand several prompts in, to join the same sweep. All are checked before any is handed in."""
        if not self._close.alive:
            raise EngineClosed("the engine is closed; make a new LayerStream")
        if timeout is not None and not timeout > 0:
            raise ConfigurationError(f"timeout is {timeout!r}; expected a number of seconds > 0, or None")
        submitted = time.perf_counter()
        wanted = (params or SamplingParams()).with_defaults(self.sampling_defaults)
        encoded = [self._encoder.encode(prompt) for prompt in prompts]
        if wanted.response_format is not None:
            self._grammars.compile(wanted.response_format)
        answers: list[Answer] = []
        requests = []
        for token_ids in encoded:
            chosen = None if wanted.best_of is None else functools.partial(_most_probable, wanted)
            request = Request(wanted.best_of or wanted.n, self._loop.cancel, chosen)
            requests.append(request)
            answers.extend(self._answers(request, token_ids, wanted, submitted))
        for answer in answers:
            answer.deadline = submitted + (float("inf") if timeout is None else timeout)
            answer.sequence.priority, answer.sequence.client = priority, client
        self._loop.submit(answers)
        return requests

    def gang(self, size: int, timeout: float = GANG_SECONDS) -> AbstractContextManager[None]:
        """Within it, requests wait for each other: none is begun before *size* of them were submitted, by whatever
        threads, or *timeout* seconds are over. For batches whose members arrive one by one::

            with engine.gang(len(questions)), ThreadPoolExecutor() as pool:
                answers = list(pool.map(chain.invoke, questions))
        """
        return self._loop.gang(size, timeout)

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids that *prompt* stands for, with the model's opening tokens once."""
        return self._encoder.encode(prompt)

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

    @property
    def compute_seconds_per_token(self) -> float | None:
        """What computing a prompt's token took so far, reading left out; ``None`` before a prompt was computed."""
        step = self._parts.step
        return step.prefill_seconds / step.prefill_tokens if step.prefill_tokens else None

    def stats(self) -> EngineStats:
        """Counters since the engine started."""
        parts, counters = self._parts, self._loop.counters
        pool, plan = parts.scheduler.pool, parts.plan
        used_kv = pool.peak_used * pool.page_tokens * plan.facts.kv_token_bytes + plan.transit_bytes
        fixed = plan.resident_bytes + plan.weights.ring_bytes + plan.activation_bytes
        streamer = parts.weights.streamer
        return EngineStats(
            sweeps=counters.sweeps,
            tokens_in=counters.tokens_in,
            tokens_out=counters.tokens_out,
            weight_bytes_streamed=streamer.streamed_bytes if streamer else 0,
            sweep_seconds=counters.sweep_seconds,
            wait_seconds=streamer.wait_seconds if streamer else 0.0,
            peak_memory_bytes=fixed + used_kv + (parts.draft.plan.planned_bytes if parts.draft else 0),
            budget_bytes=plan.budget_bytes,
            resident_bytes=plan.resident_bytes,
            model_bytes=parts.model_bytes,
            read_modes={str(mode): count for mode, count in parts.reader.stats.modes.items()},
            kv=self._kv_stats(),
            drafted_tokens=counters.drafted_tokens,
            accepted_tokens=counters.accepted_tokens,
            forced_tokens=counters.forced_tokens,
            drafters={name: dataclasses.replace(counted) for name, counted in parts.drafting.counters.items()},
        )

    def _open_store(self) -> PrefixStore:
        store = self._parts.store
        if store is None:
            raise ConfigurationError("this engine has no KV store to warm: pass kv_store='auto' or a folder")
        store.wait_until_open()
        if store.tier is None:
            raise ConfigurationError("the KV store of this engine cannot be used; the log says why")
        return store

    def _kv_stats(self) -> KVStats:
        counters, store = self._loop.counters, self._parts.store
        if store is None:
            return KVStats(hits=counters.prefix_hits, reused_tokens=counters.reused_tokens)
        counted = dataclasses.asdict(store.counters)
        return KVStats(
            state=store.state,
            hits=counters.prefix_hits,
            reused_tokens=counters.reused_tokens,
            loaded_bytes=store.loader.counters.num_bytes,
            recomputed_tokens=counted.pop("declined_tokens"),
            **counted,
        )

    def close(self) -> None:
        """Stop by the next unit; what still runs fails with :class:`EngineClosed`. Idempotent."""
        self._close()

    def __enter__(self) -> LayerStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LayerStream({self.model_name!r}, {'streaming' if self.plan.streams else 'resident'})"

    def _answers(
        self, request: Request, token_ids: list[int], params: SamplingParams, submitted: float
    ) -> Iterator[Answer]:
        params = dataclasses.replace(params, max_tokens=self._max_tokens(len(token_ids), params.max_tokens))
        if params.best_of is not None and params.logprobs is None:
            params = dataclasses.replace(params, logprobs=0)
        seed = random.getrandbits(48) if params.seed is None else params.seed
        ends = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            ends |= self._parts.defaults.eos_token_ids

        def make(index: int, kind: Callable[..., Answer] = Answer, **more: Any) -> Answer:
            own = dataclasses.replace(params, seed=(seed + index) % 2**63)
            with self._lock:
                number = next(self._numbers)
            return kind(
                request=request,
                index=index,
                sequence=Sequence(number, list(token_ids), len(token_ids), own, constraint=self._constraint(own)),
                detokenizer=Detokenizer(self.tokenizer, prompt_ids=token_ids),
                stop=StopMatcher(tuple(params.stop)),
                end_token_ids=ends,
                submitted=submitted,
                **more,
            )

        if params.beam_width is None:
            yield from (make(index) for index in range(params.best_of or params.n))
            return
        search = BeamSearch(params.beam_width, params.max_tokens or 1, params.length_penalty, ends)
        answer = make(0, BeamAnswer, search=search, make_answer=make)
        answer.sequence.num_group_pages = self._num_beam_pages(len(token_ids), params)
        yield answer

    def _num_beam_pages(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        """Pages that a beam search may need. Beams run together or not at all."""
        pool, width, max_tokens = self._parts.scheduler.pool, params.beam_width or 1, params.max_tokens or 1
        needed = pool.pages_for(num_prompt_tokens) + width * (pool.pages_for(max_tokens) + 1)
        if needed > pool.num_pages:
            raise ConfigurationError(
                f"{width} beams of {max_tokens} tokens after a prompt of {num_prompt_tokens} need KV for "
                f"{needed * pool.page_tokens:,} tokens, and there is memory for {pool.num_tokens:,}: ask for fewer "
                "beams or tokens, or give the engine more memory"
            )
        return needed

    def _constraint(self, params: SamplingParams) -> Constraint | None:
        return None if params.response_format is None else self._grammars.compile(params.response_format)

    def _max_tokens(self, num_prompt_tokens: int, wanted: int | None) -> int:
        """New tokens a prompt may get: as wanted, or as fits the speed, within context and KV pages."""
        longest = self._parts.scheduler.max_tokens(num_prompt_tokens)
        room = max(1, min(self.context_length, longest) - num_prompt_tokens)
        if wanted is not None:
            return min(wanted, room)
        seconds = self._parts.seconds_per_sweep(self._loop.counters)
        fitting = max(MIN_DEFAULT_MAX_TOKENS, min(DEFAULT_MAX_TOKENS, int(PATIENCE_SECONDS / max(seconds, 1e-3))))
        chosen = min(fitting, room)
        if self.plan.streams:
            logger.info("max_tokens is not set: %d tokens at %.1f s each", chosen, seconds)
        return chosen


def _shut(loop: EngineLoop, parts: Assembly) -> None:
    """Close what the engine owns; must not refer to the engine itself."""
    loop.close()
    parts.close()


def _most_probable(params: SamplingParams, completions: list[Completion]) -> list[Completion]:
    """The ``n`` completions whose tokens are most probable on average."""

    def mean(completion: Completion) -> float:
        logprobs = [entry.logprob for entry in completion.logprobs or ()]
        return sum(logprobs) / max(1, len(logprobs))

    best = sorted(completions, key=mean, reverse=True)[: params.n]
    return [
        dataclasses.replace(
            completion, index=index, logprobs=completion.logprobs if params.logprobs is not None else None
        )
        for index, completion in enumerate(best)
    ]
