"""How much a sweep may carry: what computes while the bytes arrive is free. Pure.

A sweep takes ``max(read, compute)`` seconds: *read* for its streamed weights at the link's rate, *compute* for its row
blocks. While compute is the smaller one, more rows cost nothing (the design's N*); past that they are worth it only if
they bring more tokens per second than the sweep without them. What a row block takes is measured, sweep by sweep.

In a mixture of experts no row is free: it is routed to experts of its own, which compute, and those that are not in
memory are read, of which only some hides behind the compute. What a row more takes is then weighed against the tokens
that it brings, row by row; of a prompt's rows the first few want nearly all experts, and the others come with them.
What sweeps take is a straight line over the experts that are wanted, fitted to those that were seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from layerstream.core.line import Line, mixed

MARGIN = 0.9  # of the read: what the compute may take and still hide behind it
PAYS = 1.1  # times what it takes: what a row with experts of its own has to bring
SWEEPS = 50  # that the line over a mixture's sweeps is fitted to
UNKNOWN_BLOCK_SHARE = 0.25  # of a sweep, for a row block, before anything was measured


class ExpertLoad(Protocol):
    """What rows bring in a mixture of experts."""

    def wanted(self, num_rows: int) -> float:
        """How many experts *num_rows* are likely to be routed to."""
        ...

    def read_seconds(self, num_rows: int) -> float:
        """What reading those of them takes that are not in memory."""
        ...


class SweepBudget:
    """Follows what sweeps take.

    Args:
        decode_rows: rows per decode block.
        per_block: how many of them may be used.
        max_draft_rows: guesses in one sweep at most; memory is set aside for them.
        read_seconds: what reading the streamed weights of one sweep takes; 0 where everything is resident.
        experts: what rows bring; ``None``: no weights of their own.
    """

    def __init__(
        self,
        decode_rows: int,
        per_block: int,
        max_draft_rows: int,
        read_seconds: Callable[[], float],
        experts: ExpertLoad | None = None,
    ) -> None:
        self.decode_rows = decode_rows
        self.per_block = per_block
        self.max_draft_rows = max_draft_rows
        self._read_seconds = read_seconds
        self._experts = experts
        self._computing = Line()
        self._taking = Line(SWEEPS)
        self._block_seconds: float | None = None
        self._token_seconds: float | None = None

    def observe(
        self,
        num_blocks: int,
        num_prompt_rows: int,
        compute_seconds: float,
        num_rows: int = 0,
        wait_seconds: float = 0.0,
    ) -> None:
        """A sweep with *num_blocks* decode blocks of *num_rows*, padding left out, and *num_prompt_rows* computed for
        so long, and waited beside that."""
        if not num_prompt_rows and num_blocks:
            if self._experts is not None:
                wanted = self._experts.wanted(num_rows)
                self._computing.add(wanted, compute_seconds)
                self._taking.add(wanted, compute_seconds + wait_seconds)
            self._block_seconds = mixed(self._block_seconds, compute_seconds / num_blocks)
        elif num_prompt_rows:
            rest = compute_seconds - self._decoding(num_rows or num_blocks * self.per_block)
            self._token_seconds = mixed(self._token_seconds, max(rest, 0.0) / num_prompt_rows)

    @property
    def rows_read(self) -> bool:
        """Whether every row brings weights of its own."""
        return self._experts is not None

    def blocks_for(self, num_rows: int) -> int:
        """Decode blocks that *num_rows* need."""
        return -(-num_rows // self.per_block)

    def seconds(self, num_rows: int, num_prompt_rows: int) -> float:
        """What a sweep takes that decodes *num_rows*, as far as it is known."""
        if self._experts is not None and not num_prompt_rows:
            return max(self._reading(num_rows), self._taking.at(self._experts.wanted(num_rows)) if num_rows else 0.0)
        compute = self._decoding(num_rows) + num_prompt_rows * (self._token_seconds or 0.0)
        return max(self._reading(num_rows + num_prompt_rows), compute / MARGIN)

    def is_worth(self, num_rows: int, more_rows: int, num_prompt_rows: int, tokens: float, more_tokens: float) -> bool:
        """Whether *more_rows* than *num_rows*, which bring *more_tokens* beside *tokens*, pay.

        They do if their tokens cost less time than those of a sweep without them do. Prompts that are computed in the
        same sweep are no reason for tokens to be dear.
        """
        more = self.seconds(num_rows + more_rows, num_prompt_rows) - self.seconds(num_rows, num_prompt_rows)
        pays = 1.0 if self._experts is None else PAYS
        return more_tokens * self.seconds(num_rows, 0) > tokens * more * pays

    def prompt_tokens(self, num_rows: int, most: int, least: int) -> int:
        """Prompt tokens beside *num_rows* that decode: what is free, within ``[least, most]``."""
        reading = self._reading(num_rows + most)
        if self._token_seconds is None or not reading:
            return most
        free = MARGIN * reading - self._decoding(num_rows)
        return int(min(most, max(least, free / max(self._token_seconds, 1e-9))))

    def free_tokens(self, num_rows: int) -> int:
        """Prompt tokens that a sweep computes while it reads, beside *num_rows* that decode; 0 where nothing is read,
        or nothing is known yet."""
        if self._token_seconds is None or self._experts is not None:
            return 0
        free = MARGIN * self._read_seconds() - self._decoding(num_rows)
        return max(0, int(free / max(self._token_seconds, 1e-9)))

    def _reading(self, num_rows: int) -> float:
        """What reading takes for a sweep of so many rows."""
        experts = 0.0 if self._experts is None else self._experts.read_seconds(num_rows)
        return self._read_seconds() + experts

    def _decoding(self, num_rows: int) -> float:
        """What computing *num_rows* that decode takes."""
        if self._experts is not None:
            return self._computing.at(self._experts.wanted(num_rows)) if num_rows else 0.0
        return self.blocks_for(num_rows) * self._a_block()

    def _a_block(self) -> float:
        if self._block_seconds is None:
            return UNKNOWN_BLOCK_SHARE * self._reading(1)
        return self._block_seconds
