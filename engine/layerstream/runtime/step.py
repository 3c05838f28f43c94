"""One sweep and what follows from it for the pages: run, commit, publish; or forget a stored page that was damaged."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import TypeAlias

import torch

from layerstream.core.sequence import Sequence
from layerstream.core.sweep import Span, Sweep
from layerstream.errors import OutOfMemory
from layerstream.hardware.device import Device, is_out_of_memory
from layerstream.hardware.footprint import Footprint
from layerstream.model.expert_usage import ExpertUsage
from layerstream.model.model_weights import ModelWeights
from layerstream.model.runner import SweepRunner
from layerstream.runtime.steward import Steward
from layerstream.store.loader import PagesLost

logger = logging.getLogger(__name__)

OnCommit: TypeAlias = Callable[[Sweep, torch.Tensor], None]


class SweepStep:
    """Runs the sweeps that the scheduler of *steward* makes; one thread.

    Args:
        learn: told at the end the least that computing a sweep of one row block took, which decoded.

    Attributes:
        prefill_tokens, prefill_seconds: of sweeps with at least one whole chunk: tokens, and the time that computing
            took, waiting for the disk left out.
        footprint: looked at before every sweep, when the last one was sampled from, and after it, with its logits.
    """

    def __init__(
        self,
        steward: Steward,
        runner: SweepRunner,
        weights: ModelWeights,
        devices: Seq[Device] = (),
        statistics: ExpertUsage | None = None,
        footprint: Footprint | None = None,
        learn: Callable[[float], None] | None = None,
    ) -> None:
        self._steward = steward
        self._scheduler = steward.scheduler
        self._runner = runner
        self._weights = weights
        self._store = steward.store
        self._devices = devices
        self._statistics = statistics
        self.footprint = footprint or Footprint()
        self.prefill_tokens = 0
        self.prefill_seconds = 0.0
        self.num_sweeps = 0
        self._computed = 0.0  # seconds that the last sweep took, waiting left out
        self._learn = learn
        self._block_seconds: float | None = None
        self._on_commit: OnCommit | None = None

    def tell(self, on_commit: OnCommit) -> None:
        """Have *on_commit* told of each sweep that counts, with the final hidden states of its rows."""
        self._on_commit = on_commit
        self._runner.keeps_hidden = True

    def run(self, sweep: Sweep) -> torch.Tensor | None:
        """:meth:`compute`, and :meth:`commit` if it had an effect."""
        logits = self.compute(sweep)
        if logits is not None:
            self.commit(sweep)
        return logits

    def compute(self, sweep: Sweep) -> torch.Tensor | None:
        """Logits of the sampled rows. What it computed is in the pages, and counts when it is committed.

        Returns:
            ``None`` if a stored page turned out damaged or gone, or memory ran out: nothing happened, and the next
            sweep computes that page, or carries less.

        Raises:
            OutOfMemory: and sweeps cannot carry less.
            Whatever the sweep died of; there is nothing to commit then.
        """
        self.footprint.look()
        started, waited = time.perf_counter(), self._waited_seconds()
        try:
            logits = self._runner.run(sweep)
        except PagesLost as lost:
            logger.warning("a stored prefix is computed again: %s", lost)
            self._steward.lose(lost.key)
            return None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._shrink(error)
            return None
        self.footprint.look()
        waiting = self._waited_seconds() - waited
        self._computed = max(0.0, time.perf_counter() - started - waiting)
        self._scheduler.budget.observe(
            sweep.num_decode_blocks, sweep.num_prompt_rows, self._computed, sweep.num_decode_rows, waiting
        )
        if sweep.num_decode_blocks == len(sweep.blocks) == 1:
            self._block_seconds = min(self._computed, self._block_seconds or self._computed)
        return logits

    def commit(self, sweep: Sweep) -> None:
        """*sweep* was computed: its pages are committed, and those of prompts on their way to the store."""
        if sweep.num_tokens >= self._scheduler.limits.chunk_tokens:
            self.prefill_tokens += sweep.num_tokens
            self.prefill_seconds += self._computed
        self.num_sweeps += 1
        pages, states = self._scheduler.commit(sweep)
        if self._store is not None:
            self._store.count_loaded(len(sweep.loads))
            token_seconds = self._computed / sweep.num_tokens
            for published in pages:
                num_tokens = len(published.keys) * self._scheduler.pool.page_tokens
                self._store.publish(published, num_tokens * token_seconds)
            for state in states:
                self._store.publish_state(state, state.num_tokens * token_seconds)
        if self._statistics is not None:
            self._statistics.save_sometimes(self._weights.expert_shares)
        if self._on_commit is not None:
            self._on_commit(sweep, self._runner.take_hidden())

    def take_read(self) -> list[tuple[Span, torch.Tensor]]:
        """What the last sweep read, as :meth:`SweepRunner.take_read`."""
        return self._runner.take_read()

    def is_lost(self, error: BaseException) -> bool:
        """Whether *error* says that an accelerator will not compute again."""
        return any(device.is_lost(error) for device in self._devices)

    def close(self) -> None:
        """Remember which experts were used, and how fast the processor was. Idempotent."""
        if self._statistics is not None and self.num_sweeps:
            self._statistics.save(self._weights.expert_shares())
        seconds, self._block_seconds = self._block_seconds, None
        if self._learn is not None and seconds is not None:
            self._learn(seconds)

    def _shrink(self, error: Exception) -> None:
        for device in self._devices:
            device.free_unused()
        if not self._scheduler.shrink():
            raise OutOfMemory(
                f"memory ran out in the smallest sweep there is ({error}): close other programs that use it, ask for "
                "fewer answers at once, or give the engine less of the memory, so that weights leave more room"
            ) from error
        limits = self._scheduler.limits
        logger.warning(
            "memory ran out; from now on a sweep carries at most %d tokens of prompts and %d guesses: %s",
            limits.max_tokens,
            limits.max_draft_rows,
            error,
        )

    def accept(self, sequence: Sequence, nodes: Seq[int]) -> None:
        """The guesses *nodes*, a path from the root of *sequence*'s draft in the last sweep, were right."""
        if nodes:
            self._runner.accept(sequence, nodes)
            self._scheduler.accept(sequence, len(nodes))

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let *child*, a copy of *parent*, run beside it.

        Raises:
            StorageFull: there is no memory for it.
        """
        copied = self._steward.fork(parent, child)
        if copied is not None:
            self._runner.copy_page(*copied)

    def _waited_seconds(self) -> float:
        """How long the compute has waited for the disk so far."""
        streamer = self._weights.streamer
        waited = 0.0 if streamer is None else streamer.wait_seconds
        return (
            waited
            if self._store is None
            else waited + self._store.loader.counters.wait_seconds + self._store.state_loader.counters.wait_seconds
        )
