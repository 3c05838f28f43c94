"""From prompts and parameters to the answers that the loop works on. Whatever is wrong with them is said here."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from typing import Any

from layerstream.api import arguments
from layerstream.api.completion import Completion
from layerstream.api.home import Home
from layerstream.api.params import SamplingParams, derive_seed
from layerstream.api.reading import HiddenState, Reading, TokenLogits
from layerstream.api.request import Request
from layerstream.api.terms import MOST_PRIORITY, Terms
from layerstream.chat.turn import TurnMaker
from layerstream.core.constraint import Constraint
from layerstream.core.sequence import BeamGroup, Sequence
from layerstream.errors import ConfigurationError, UnsupportedModel
from layerstream.kv.keys import page_keys
from layerstream.runtime.answer import Answer
from layerstream.runtime.beams import BeamAnswer, largest
from layerstream.runtime.contexts import Contexts, context_sequence
from layerstream.runtime.guard import COMPARED_TOKENS, Guard, Shadow
from layerstream.runtime.reading import ReadAnswer
from layerstream.scheduling.beam import BeamSearch
from layerstream.setup.assembly import Assembly
from layerstream.text.detokenizer import Detokenizer
from layerstream.text.passages import SEEN, passages_in
from layerstream.text.prompt import Prompt, PromptEncoder
from layerstream.text.response_format import Grammars
from layerstream.text.stop import StopMatcher

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 30 * 60  # the default max_tokens fits in this much time
DEFAULT_MAX_TOKENS = 256
MIN_DEFAULT_MAX_TOKENS = 16


class Intake:
    """Makes requests and their empty answers. Any thread may call.

    Args:
        cancel: takes a request out of the loop.
        seconds_per_sweep: as measured so far; decides how many tokens an answer may have if nobody said.
        home: where the engine lives.
        guard: says whether prompts may be blended.
    """

    def __init__(
        self,
        parts: Assembly,
        cancel: Callable[[Request], None],
        seconds_per_sweep: Callable[[], float],
        home: Home,
        guard: Guard,
    ) -> None:
        self.encoder = PromptEncoder(
            parts.tokenizer,
            max_context=parts.context_length,
            vocab_size=parts.plan.facts.vocab_size,
            allow_control_tokens=parts.config.allow_control_tokens,
        )
        self._parts = parts
        self._home = home
        self._cancel = cancel
        self._seconds_per_sweep = seconds_per_sweep
        self._end_token_ids = parts.defaults.eos_token_ids
        self._grammars = Grammars(parts.tokenizer, parts.plan.facts.vocab_size, self._end_token_ids)
        self.turns = TurnMaker(self.encoder, parts.tokenizer, self._grammars.special_tokens)
        self._numbers = itertools.count()
        self._guard = guard
        self._contexts = Contexts(
            parts.tokenizer,
            parts.scheduler.pool,
            parts.count_cached,
            f"{parts.config.recompute} {parts.config.recompute_by}",
        )

    def take(self, prompts: Seq[Prompt], params: SamplingParams, terms: Terms) -> tuple[list[Request], list[Answer]]:
        """A request for each of *prompts*, and the answers that they wait for."""
        self._check_head()
        submitted = time.perf_counter()
        wanted = params.with_defaults(self._parts.defaults.sampling)
        requests, answers = [], []
        for token_ids, texts in [(self.encoder.encode(prompt), self.passages_in(prompt, terms)) for prompt in prompts]:
            choose = None if wanted.best_of is None else functools.partial(_most_probable, wanted)
            request = Request(wanted.best_of or wanted.n, self._cancel, choose, self._home)
            requests.append(request)
            answers.extend(self._answers(request, token_ids, wanted, terms, submitted, texts))
        for answer in answers:
            answer.deadline = submitted + (float("inf") if terms.timeout is None else terms.timeout)
        return requests, answers

    def passages_in(self, prompt: Prompt, terms: Terms) -> list[str]:
        """What *prompt* says, *terms* say, or was retrieved, of its passages; nothing, where none may be moved."""
        if self._parts.config.reuse != "anywhere" or not self._guard.is_blending or terms.passages is None:
            return []
        return [*passages_in(prompt), *terms.passages, *SEEN.within(prompt, terms.tenant)]

    def take_to_read(
        self, prompts: Seq[Prompt], reading: Reading, terms: Terms, *, keep: bool
    ) -> tuple[list[Request], list[Answer]]:
        """A request for each of *prompts*, which are read for *reading*. *keep*: a store may keep their pages.

        Raises:
            ConfigurationError: logits of a token that the model does not have.
            UnsupportedModel: logits, of a model without a head.
        """
        if isinstance(reading, TokenLogits):
            self._check_head()
            arguments.whole_number("token_ids", max(reading.token_ids), 0, self._parts.plan.facts.vocab_size - 1)
        submitted = time.perf_counter()
        deadline = submitted + (float("inf") if terms.timeout is None else terms.timeout)
        params = dataclasses.replace(self._parts.defaults.sampling, max_tokens=1)  # none is drawn
        reads_all = isinstance(reading, HiddenState) and reading.pooling == "mean"
        requests, answers = [], []
        for token_ids in [self.encoder.encode(prompt) for prompt in prompts]:
            keys = [] if reads_all else self._parts.scheduler.prefixes.keys_of(token_ids, terms.tenant)
            request = Request(1, self._cancel, home=self._home)
            sequence = Sequence(
                next(self._numbers),
                token_ids,
                len(token_ids),
                params,
                prefix_keys=keys,
                priority=terms.priority,
                client=terms.client,
                tenant=terms.tenant,
                reading=reading,
                is_kept=keep,
            )
            said = Detokenizer(self._parts.tokenizer), StopMatcher(())
            answers.append(ReadAnswer(request, 0, sequence, *said, frozenset(), submitted, deadline))
            requests.append(request)
        return requests, answers

    def _answers(
        self,
        request: Request,
        token_ids: list[int],
        params: SamplingParams,
        terms: Terms,
        submitted: float,
        texts: Seq[str] = (),
    ) -> Iterator[Answer]:
        params = dataclasses.replace(params, max_tokens=self._max_tokens(len(token_ids), params.max_tokens))
        if params.best_of is not None and params.logprobs is None:
            params = dataclasses.replace(params, logprobs=0)
        seed = random.getrandbits(48) if params.seed is None else params.seed
        passages, contexts = (), list[list[int]]()
        if texts:
            passages, contexts = self._contexts.find(token_ids, texts, terms.tenant)
        keys = page_keys(token_ids, self._parts.scheduler.pool.page_tokens, terms.tenant, passages)
        width, group = params.beam_width, None
        if width is not None:
            group = BeamGroup(self._num_beam_pages(len(token_ids), width, params.max_tokens or 1), width)
        ends = frozenset(params.stop_token_ids) | self._stop_ids(params.stop)
        if not params.ignore_eos:
            ends |= self._end_token_ids

        whose = {"priority": terms.priority, "client": terms.client, "tenant": terms.tenant}
        owes = tuple(
            context_sequence(next(self._numbers), context, passage, whose)
            for passage, context in zip(passages, contexts, strict=True)
        )

        def make(index: int, kind: Callable[..., Answer] = Answer, **more: Any) -> Answer:
            own = dataclasses.replace(params, seed=derive_seed(seed, index))
            number = next(self._numbers)
            return kind(
                request=request,
                index=index,
                sequence=Sequence(
                    number,
                    list(token_ids),
                    len(token_ids),
                    own,
                    prefix_keys=keys,
                    constraint=self._constraint(own),
                    group=group,
                    passages=passages,
                    owes=owes,
                    **whose,
                ),
                detokenizer=Detokenizer(
                    self._parts.tokenizer, prompt_ids=token_ids, skip_special_tokens=own.skip_special_tokens
                ),
                stop=StopMatcher(tuple(params.stop)),
                end_token_ids=ends,
                submitted=submitted,
                contexts=owes if index == 0 else (),
                **more,
            )

        if width is None:
            yield from (make(index) for index in range(params.best_of or params.n))
            return
        search = BeamSearch(width, params.max_tokens or 1, params.length_penalty, ends, largest)
        yield make(0, BeamAnswer, search=search, make_answer=make)

    def shadow_of(self, answer: Answer) -> Shadow:
        """An exact answer to the prompt of *answer*, which was blended: its first tokens are enough."""
        blended = answer.sequence
        compared = tuple(blended.output_ids[:COMPARED_TOKENS])
        token_ids = blended.token_ids[: blended.num_prompt_tokens]
        params = dataclasses.replace(blended.params, max_tokens=len(compared), logprobs=None)
        sequence = Sequence(
            next(self._numbers),
            token_ids,
            len(token_ids),
            params,
            prefix_keys=page_keys(token_ids, self._parts.scheduler.pool.page_tokens, blended.tenant),
            priority=-MOST_PRIORITY,
            client=blended.client,
            tenant=blended.tenant,
        )
        return Shadow(
            request=Request(1, self._cancel, home=self._home),
            index=0,
            sequence=sequence,
            detokenizer=Detokenizer(
                self._parts.tokenizer, prompt_ids=token_ids, skip_special_tokens=params.skip_special_tokens
            ),
            stop=StopMatcher(()),
            end_token_ids=answer.end_token_ids,
            submitted=time.perf_counter(),
            compared=compared,
        )

    def _check_head(self) -> None:
        if self._parts.skeleton.is_headless:
            raise UnsupportedModel(
                f"{self._parts.config.model} was saved without an output projection, so it knows no next token: embed "
                "texts with it, or take the model that it was made of"
            )

    def _stop_ids(self, stops: Iterable[str]) -> frozenset[int]:
        """The special tokens among *stops*: they are not shown, so they are no part of the text."""
        tokenizer = self._parts.tokenizer
        known, added = tokenizer.added_tokens_decoder, tokenizer.added_tokens_encoder
        return frozenset(added[stop] for stop in stops if stop in added and known[added[stop]].special)

    def _num_beam_pages(self, num_prompt_tokens: int, width: int, max_tokens: int) -> int:
        """Pages that a beam search may need. Beams run together or not at all."""
        pool, states = self._parts.scheduler.pool, self._parts.scheduler.states
        most = min(states.most_at_once, self._parts.scheduler.limits.max_sequences)
        if states.is_needed and width > most:
            raise ConfigurationError(
                f"{width} beams need two states of the model's recurrent layers each, and there is memory for "
                f"{states.pool.num_pages} states, of which some keep prefixes: ask for {most} beams at most, or give "
                "the engine more memory"
            )
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
        room = max(1, min(self._parts.context_length, longest) - num_prompt_tokens)
        if wanted is not None:
            return min(wanted, room)
        seconds = self._seconds_per_sweep()
        fitting = max(MIN_DEFAULT_MAX_TOKENS, min(DEFAULT_MAX_TOKENS, int(PATIENCE_SECONDS / max(seconds, 1e-3))))
        chosen = min(fitting, room)
        if self._parts.plan.streams:
            logger.info("max_tokens is not set: %d tokens at %.1f s each", chosen, seconds)
        return chosen


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
