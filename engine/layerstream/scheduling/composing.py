"""From the sequences that run to the row blocks of a sweep.

No tensor, no file. It writes how much room a sequence's pages had (``capacity``), hands out frames of the reserve, and
asks for guesses; a draft model computes when it is asked.

The one invariant that covers chunking and decoding alike: a sequence has ``num_computed`` tokens in its pages, and a
sweep carries some of ``token_ids[num_computed:]``, in order, without gaps. When the last known token is among them,
the sequence is sampled, unless its hidden states alone are wanted.

Rules:

* a sequence that shares pages still to be computed goes along in the very sweep that computes them, in later row
  blocks: every layer appends a block's KV before it turns to the next block. Owners were admitted before sharers,
  so the first sequence never waits for another;
* every sequence whose prompt is computed, in an earlier sweep or in this one, gets all its tokens after it into the
  sweep, one span each; such rows share row blocks of ``decode_rows`` rows, padded, behind all chunks;
* prompts are computed in chunks of ``chunk_tokens`` counted from position 0, of which the first may lack its beginning
  (a sequence begins behind the pages that are there, and a chunk has several) and the last its end, as many as the
  token budget has room for after the decode rows, in order of arrival, at least one per sweep. A chunk attends alone,
  and chunks share row blocks of ``prompt_rows`` rows, padded, so that neither shape depends on what a chunk lacks;
* where there are recurrent layers, a sequence is in the sweep if its states are there, or an earlier row block leaves
  them, and there is a slot for the next ones (:mod:`layerstream.scheduling.states`);
* of a prompt that has passages, some tokens are not computed but moved (:mod:`layerstream.scheduling.blending`); what
  rides free is what the rows that decode and the prompts before it leave;
* guesses (:mod:`layerstream.core.draft`) follow their sequence's newest token as decode rows, as many as there is room
  for; a sequence never gets guesses past its longest answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Protocol

from layerstream.core.draft import DraftTree
from layerstream.core.passages import Move
from layerstream.core.sequence import Sequence
from layerstream.core.sweep import PageLoad, RowBlock, Span, Sweep
from layerstream.kv.pages import PagePool
from layerstream.kv.prefix import PrefixTable
from layerstream.scheduling.blending import Blending
from layerstream.scheduling.budget import SweepBudget
from layerstream.scheduling.packing import PromptBlocks, SweepLimits, decode_blocks, decode_spans, draft_spans
from layerstream.scheduling.spill import Spill
from layerstream.scheduling.states import States


class Drafting(Protocol):
    """Where guesses come from."""

    def propose(
        self, sequences: Seq[Sequence], num_decoded: int, num_prompt_tokens: int
    ) -> Mapping[Sequence, DraftTree]:
        """Trees for some of *sequences*, beside *num_decoded* decode rows and *num_prompt_tokens* of prompts."""
        ...


class _NoDrafting:
    def propose(self, sequences: Seq[Sequence], num_decoded: int, num_prompt_tokens: int) -> dict[Sequence, DraftTree]:
        return {}


NO_DRAFTING = _NoDrafting()


class Composer:
    """Puts rows together, within *limits*.

    Args:
        budget: what rows cost.
        prefixes, spill: who computes shared pages, and what has to be loaded.
        states: who has the states of recurrent layers.
        blending: which tokens are moved.
    """

    def __init__(
        self,
        limits: SweepLimits,
        budget: SweepBudget,
        pool: PagePool,
        prefixes: PrefixTable,
        spill: Spill,
        states: States,
        blending: Blending,
    ) -> None:
        self.limits = limits
        self._budget = budget
        self._pool = pool
        self._prefixes = prefixes
        self._spill = spill
        self._states = states
        self._blending = blending
        self._moves: dict[Sequence, Seq[Move]] = {}
        self._staying: dict[Sequence, int] = {}
        self._free = 0  # prompt tokens that still hide behind the read

    def compose(self, running: Seq[Sequence], drafting: Drafting) -> Sweep | None:
        """A sweep of *running*, in order of admission, with guesses of *drafting*; ``None`` if none has a row."""
        self._states.start(running)
        self._moves, self._staying = {}, {}
        ready = [s for s in running if self._may_decode(s)]
        for sequence in ready:
            self._states.join(sequence, sequence.num_tokens)
        num_decoded = sum(sequence.num_pending for sequence in ready)
        self._free = self._budget.free_tokens(num_decoded)
        prompts = self._prompt_blocks(num_decoded)
        ready += [sequence for sequence in self._add_prompts(prompts, running) if not sequence.is_passage]
        for sequence in ready:
            sequence.tenancy.capacity = len(sequence.pages) * self._pool.page_tokens
        spans = [span for sequence in ready for span in decode_spans(sequence)]
        chunks = prompts.blocks()
        drafts = drafting.propose(ready, len(spans), sum(block.num_rows for block in chunks))
        spans += [span for sequence, tree in drafts.items() for span in draft_spans(sequence, tree)]
        blocks = [*chunks, *decode_blocks(spans, self.limits)]
        if not blocks:
            return None
        routes, state_loads = self._states.routes(), self._states.loads()
        moves = {sequence: tuple(found) for sequence, found in self._moves.items()}
        sampled = tuple(sequence for sequence in ready if sequence.needs_logits)
        loads = self._loads(blocks)
        return Sweep(tuple(blocks), sampled, loads, drafts, routes, state_loads, moves, self._staying)

    def shrink(self) -> bool:
        """A sweep did not fit the memory: from now on they carry half as much. False: they cannot carry less."""
        limits = self.limits
        least = max(limits.chunk_tokens, limits.prompt_rows)
        if limits.max_tokens <= least and not limits.max_draft_rows:
            return False
        max_tokens, max_draft_rows = max(least, limits.max_tokens // 2), limits.max_draft_rows // 2
        self.limits = replace(limits, max_tokens=max_tokens, max_draft_rows=max_draft_rows)
        self._budget.max_draft_rows = max_draft_rows
        return True

    def _may_decode(self, sequence: Sequence) -> bool:
        """Whether tokens of the answer of *sequence* may be computed, as all before them is there.

        Who was suspended may share pages again that were evicted meanwhile and that another is to compute: they are
        waited for.
        """
        is_due = sequence.is_prefilled and sequence.num_pending > 0
        return is_due and not self._is_ahead(sequence, {}) and self._states.may_join(sequence)

    def _add_prompts(self, prompts: PromptBlocks, running: Seq[Sequence]) -> list[Sequence]:
        """Fill *prompts*; those of *running* whose prompt ends in it."""
        planned: dict[Sequence, int] = {}
        for sequence in sorted(running, key=lambda sequence: -sequence.priority):
            if sequence.is_prefilled or self._is_ahead(sequence, planned) or not self._states.may_join(sequence):
                continue
            stop = planned[sequence] = self._add_chunks(prompts, sequence)
            self._states.join(sequence, sequence.num_tokens if stop == sequence.num_prompt_tokens else stop)
        return [sequence for sequence, stop in planned.items() if stop == sequence.num_prompt_tokens]

    def _loads(self, blocks: list[RowBlock]) -> tuple[PageLoad, ...]:
        """The stored pages that the rows of *blocks* attend to."""
        sequences = {span.sequence: None for block in blocks for span in block.spans}
        loads: dict[PageLoad, None] = {}
        for sequence in sequences:
            found = self._spill.loads(sequence) if sequence.is_long else self._prefixes.loads(sequence.prefix_keys)
            loads.update(dict.fromkeys(found))
            if sequence in self._moves:
                for passage, _ in self._blending.passages(sequence):
                    loads.update(dict.fromkeys(self._prefixes.loads(passage.keys)))
        return tuple(loads)

    def _is_ahead(self, sequence: Sequence, planned: dict[Sequence, int]) -> bool:
        """Whether *sequence* shares pages that are neither computed nor planned for the sweep so far."""
        if sequence.is_long:
            return False
        if sequence.passages and self._blending.is_ahead(sequence, planned):
            return True
        size = self._pool.page_tokens
        return any(
            planned.get(owner, owner.num_computed) < (position + 1) * size
            for position, owner in self._prefixes.owners(sequence.prefix_keys, sequence.num_computed // size)
        )

    def _prompt_blocks(self, num_decoded: int) -> PromptBlocks:
        """Room for prompts beside *num_decoded* decode rows."""
        most = self.limits.max_tokens - num_decoded
        free = most
        if num_decoded:
            free = self._budget.prompt_tokens(num_decoded, most, self.limits.chunk_tokens)
        return PromptBlocks(self.limits, most, free)

    def _add_chunks(self, prompts: PromptBlocks, sequence: Sequence) -> int:
        """Put the next chunks of *sequence* into *prompts*, as far as there is room.

        Returns:
            The position where they end.
        """
        start, free, moves = sequence.num_computed, self._free, list[Move]()
        for piece in self._blending.pieces(sequence, self.limits.chunk_tokens, free):
            if not prompts.has_room(piece.stop - piece.start):
                break
            if sequence.is_long and not self._spill.frames(sequence, piece.stop):
                break  # they are still being written
            prompts.add(Span(sequence, piece.start, piece.stop))
            moves += piece.moves
            start = piece.stop
        computed = start - sequence.num_computed - sum(map(len, moves))
        if sequence.tenancy.sources:
            chosen, staying = self._blending.choice(sequence, start, free)
            if chosen:
                self._staying[sequence] = staying
            if chosen or moves:
                self._moves[sequence] = chosen or moves
            computed -= max(0, sum(map(len, chosen)) - staying)
        self._free = max(0, self._free - computed)  # nobody's rows ride free twice
        return start
