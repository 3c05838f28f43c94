"""Who waits, and who is next. Pure: counts sweeps, reads no clock.

Order of admission: effective priority, then the client that has been served least, then what is cached most, then
arrival. The effective priority rises by one for every :data:`AGEING_SWEEPS` sweeps of waiting, so nobody starves: a
request overtakes newer ones of priority p + d after at most ``d · AGEING_SWEEPS`` sweeps, and once it is the first,
nobody overtakes it while it waits for memory.

Being served is counted in tokens computed for a client, as in "Fairness in Serving Large Language Models" (arXiv
2401.00588): a client that comes, or comes back, starts where the least served of those present is, so that absence
earns no credit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from layerstream.sequence import Sequence

AGEING_SWEEPS = 8


class WaitingQueue:
    """Sequences that were not admitted yet."""

    def __init__(self) -> None:
        self._waited: dict[Sequence, int] = {}
        self._served: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._waited)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._waited

    def __iter__(self):
        return iter(list(self._waited))

    def add(self, sequence: Sequence, running: Iterable[Sequence]) -> None:
        """*sequence* waits from now on, beside those waiting and *running*."""
        present = {other.client for other in (*self._waited, *running)}
        least = min((self._served.get(client, 0) for client in present), default=0)
        if sequence.client not in present:
            self._served[sequence.client] = max(self._served.get(sequence.client, 0), least)
        self._waited[sequence] = 0

    def remove(self, sequence: Sequence) -> None:
        """*sequence* is admitted, or gone."""
        del self._waited[sequence]

    def serve(self, sequence: Sequence, num_tokens: int) -> None:
        """*num_tokens* were computed for *sequence*'s client."""
        self._served[sequence.client] = self._served.get(sequence.client, 0) + num_tokens

    def tick(self) -> None:
        """A sweep goes by."""
        for sequence in self._waited:
            self._waited[sequence] += 1

    def in_order(self, num_cached: Callable[[Sequence], int]) -> list[Sequence]:
        """All that wait, the next one first.

        Args:
            num_cached: tokens of a sequence's prompt that need not be computed.
        """
        return sorted(
            self._waited,
            key=lambda sequence: (
                -(sequence.priority + self._waited[sequence] // AGEING_SWEEPS),
                self._served.get(sequence.client, 0),
                -num_cached(sequence) / sequence.num_prompt_tokens,
                sequence.sequence_id,
            ),
        )
