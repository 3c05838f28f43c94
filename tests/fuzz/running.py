"""Lives through a case: every ask alone first, for the bits that it then has to get in every other company.

The engine that answers alone has no store and makes no guesses. Those after it have what the case says; each answers
all asks together, round by round, beside neighbours that are cancelled at some moment.
"""

from __future__ import annotations

import random
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from layerstream import BudgetTooSmall, KVStoreConfig, LayerStream, Request, SamplingParams

from tests.fuzz import inside
from tests.fuzz.cases import Ask, Case
from tests.fuzz.judging import LOGPROBS, Bits, against_transformers, bits, difference
from tests.fuzz.report import Outcome
from tests.harness import shrink_units
from tests.models import make_model, make_tokenizer

SECONDS = 180.0  # that an answer may take
TRIES = 4  # of budgets that an error names as enough
SMALL_STORE = 2**20
LARGE_STORE = 2**30


class Fault(Exception):
    """Something is not as it has to be."""


def run_case(case: Case) -> Outcome:
    """All that comes of *case*; it never raises."""
    outcome = Outcome()
    with TemporaryDirectory(prefix="layerstream-fuzz-") as name, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(Path(name) / "cache"))
        if case.is_shrunk:
            shrink_units(patch)
        try:
            _Run(case, Path(name), outcome).live()
        except Fault as fault:
            outcome.failures.append(str(fault))
        except Exception as error:  # noqa: BLE001 whatever it is, the next case is to run
            last = traceback.format_exception(error)[-2].strip().replace("\n", " ")
            outcome.failures.append(f"{type(error).__name__}: {error} ({last})")
    return outcome


class _Run:
    def __init__(self, case: Case, folder: Path, outcome: Outcome) -> None:
        self._case = case
        self._model_folder = folder / "model"
        self._store_folder = folder / "store"
        self._outcome = outcome
        self._asks: dict[int, Ask] = {}  # by their number in the case
        self._expected: dict[int, Bits] = {}
        self._memory: int | None = None

    def live(self) -> None:
        sizes = dict(self._case.sizes)
        model = make_model(self._case.family, self._model_folder, seed=self._case.index, sizes=sizes)
        make_tokenizer().save_pretrained(self._model_folder)
        self._count("models")
        self._memory = self._draw_memory()
        self._answer_alone(model)
        self._answer_together()

    def _answer_alone(self, model: Any) -> None:
        with self._engine(store=None, speculation="off") as engine:
            for number, ask in enumerate(self._case.asks):
                if not _fits(ask, engine):
                    self._outcome.refusals.append(f"a prompt of {len(ask.prompt)} tokens and {ask.max_tokens} more")
                    continue
                self._asks[number] = ask
                completions = engine.submit(list(ask.prompt), params_of(ask)).completions(SECONDS)
                self._expected[number] = bits(completions)
                self._count("completions", len(completions))
                self._count("tokens", sum(len(completion.token_ids) for completion in completions))
                for completion in completions if self._case.is_exact else ():
                    self._count("against transformers")
                    wrong = against_transformers(model, ask.prompt, completion, is_greedy=not ask.temperature)
                    self._note(number, "alone", wrong)

    def _answer_together(self) -> None:
        case = self._case
        first, *others = case.orders
        sessions = {"none": [case.orders[:1]], "warm": [case.orders]}.get(case.store, [(first, others[0]), others[1:]])
        for session, orders in enumerate(sessions):
            if session and case.store == "damaged":
                self._damage()
            with self._engine(self._store(), case.speculation) as engine:
                for number, order in enumerate(orders):
                    self._round(engine, order, f"engine {session}, round {number}")

    def _round(self, engine: LayerStream, order: tuple[int, ...], when: str) -> None:
        neighbours = [ask for ask in self._case.neighbours if _fits(ask, engine)]
        beside = [engine.submit(list(ask.prompt), params_of(ask)) for ask in neighbours]
        timers = [_cancel_later(request, ask) for ask, request in zip(neighbours, beside, strict=True)]
        requests = {
            number: engine.submit(list(self._asks[number].prompt), params_of(self._asks[number]))
            for number in order
            if number in self._asks
        }
        for number, request in requests.items():
            completions = request.completions(SECONDS)
            self._count("comparisons of bits")
            self._count("completions", len(completions))
            self._count("tokens", sum(len(completion.token_ids) for completion in completions))
            cached = completions[0].usage.cached_tokens
            self._count("of cached prompts", cached > 0)
            self._count("of guessed tokens", any(c.metrics.accepted_tokens for c in completions))
            self._note(number, f"{when}, {cached} cached", difference(bits(completions), self._expected[number]))
        for timer in timers:
            timer.cancel()
        for request in beside:
            request.cancel()
            self._count("cancelled", any(c.finish_reason == "cancelled" for c in request.completions(SECONDS)))
        inside.check_idle(engine)

    @contextmanager
    def _engine(self, store: KVStoreConfig | None, speculation: str) -> Iterator[LayerStream]:
        with LayerStream(
            self._model_folder, memory=self._memory, kv_store=store, speculation=speculation, **self._options()
        ) as engine:
            self._count("engines")
            yield engine

    def _options(self) -> dict[str, Any]:
        case = self._case
        return {
            "device": "cpu",
            "dtype": case.dtype,
            "quantization": case.quantization,
            "chunk_tokens": case.chunk_tokens,
            "progress": False,
        }

    def _draw_memory(self) -> int | None:
        """The budget: what the engines need at the least is what their errors say."""
        if self._case.budget == "roomy":
            return None
        least = max(self._least_memory(None), self._least_memory(self._store()))
        return int(least * (1 + self._case.share)) if self._case.budget == "between" else least

    def _least_memory(self, store: KVStoreConfig | None) -> int:
        memory = 1024
        for _ in range(TRIES):
            try:
                LayerStream(self._model_folder, memory=memory, kv_store=store, **self._options()).close()
            except BudgetTooSmall as error:
                memory = error.required_bytes
            else:
                return memory
        raise Fault(f"{memory} bytes are named as enough, and refused")

    def _store(self) -> KVStoreConfig | None:
        case = self._case
        if case.store == "none":
            return None
        most = SMALL_STORE if case.store == "evicting" else LARGE_STORE
        return KVStoreConfig(self._store_folder, max_bytes=most, min_free_bytes=0, load=case.load)  # type: ignore[arg-type]

    def _damage(self) -> None:
        """A byte in the middle of some files is another."""
        rng = random.Random(self._case.index)
        for path in inside.segments(self._store_folder):
            if rng.random() < 0.5:
                content = bytearray(path.read_bytes())
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
                path.write_bytes(content)
                self._count("damaged files")

    def _note(self, number: int, when: str, wrong: str | None) -> None:
        if wrong is not None:
            length = len(self._asks[number].prompt)
            self._outcome.failures.append(f"prompt {number} of {length} tokens, {when}: {wrong}")

    def _count(self, name: str, number: int = 1) -> None:
        self._outcome.counts[name] += number


def _fits(ask: Ask, engine: LayerStream) -> bool:
    return len(ask.prompt) + ask.max_tokens <= engine.context_length


def params_of(ask: Ask) -> SamplingParams:
    """How *ask* is answered."""
    return SamplingParams(
        max_tokens=ask.max_tokens,
        temperature=ask.temperature,
        seed=ask.seed,
        n=ask.n,
        ignore_eos=True,
        logprobs=LOGPROBS,
    )


def _cancel_later(request: Request, ask: Ask) -> threading.Timer:
    timer = threading.Timer(SECONDS if ask.cancel_after is None else ask.cancel_after, request.cancel)
    timer.daemon = True
    timer.start()
    return timer
