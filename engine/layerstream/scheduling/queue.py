"""Who waits, and who is next. Pure: counts sweeps, reads no clock.

Order of admission: effective priority, then the client that has been served least, then what is cached most (looked up
for :data:`LOOK_AHEAD` at a time, in order of arrival), then arrival. The effective priority rises by one for every
:data:`AGEING_SWEEPS` sweeps of waiting, so nobody starves: a request overtakes newer ones of priority p + d after at
most ``d · AGEING_SWEEPS`` sweeps, and once it is the first, nobody overtakes it while it waits for memory. What a
sequence has waited it keeps, should it be suspended and wait again.

Being served is counted in tokens computed for a client, as in "Fairness in Serving Large Language Models" (arXiv
2401.00588): a client that comes, or comes back, starts where the least served of those present is, or where it left if
that is more, so that absence earns no credit. A client is forgotten :data:`AGEING_SWEEPS` sweeps after its last request
went, and all are when nobody is left: whoever waited meanwhile has gained a priority over what it may ask next, so
coming back as somebody new gains nothing that waiting would not have.

No operation looks at all that wait. Those whose effective priorities are equal at all times share a *rank*: priority p
at sweep t has rank ``AGEING_SWEEPS · p - t``, and at sweep T the effective priority ``(T + rank) // AGEING_SWEEPS``.
So nothing changes place while time goes by. Within a rank a heap has the first sequence of each client; what a client
has been served only grows while it waits, so an entry that is out of date comes up too early, and is put right then.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping
from itertools import groupby, islice

from layerstream.core.sequence import Sequence

AGEING_SWEEPS = 8
LOOK_AHEAD = 128

_Place = tuple[int, int, str]
"""What its client has been served, the number of the sequence, its client."""


class WaitingQueue:
    """Sequences that were not admitted yet, and what the clients of those that are present have been served."""

    def __init__(self) -> None:
        self._sweep = 0
        self._clients = Clients()
        self._came: dict[Sequence, int] = {}
        self._waited: dict[Sequence, int] = {}  # sweeps, of those that were admitted
        self._ranks: dict[int, _Rank] = {}
        self._ordered_ranks: list[int] = []

    def __len__(self) -> int:
        return len(self._came)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._came

    def __iter__(self) -> Iterator[Sequence]:
        return iter(list(self._came))

    @property
    def num_clients(self) -> int:
        """Clients that something is known of."""
        return len(self._clients.served)

    def enter(self, sequence: Sequence) -> None:
        """*sequence* is present from now on, whether it waits or runs."""
        self._clients.enter(sequence.client)

    def leave(self, sequence: Sequence) -> None:
        """*sequence* does not run and does not wait any more."""
        self._waited.pop(sequence, None)
        self._clients.leave(sequence.client, self._sweep)

    def add(self, sequence: Sequence) -> None:
        """*sequence*, which is present, waits from now on."""
        came = self._came[sequence] = self._sweep - self._waited.pop(sequence, 0)
        number = AGEING_SWEEPS * sequence.priority - came
        if number not in self._ranks:
            self._ranks[number] = _Rank(self._clients.served)
            insort(self._ordered_ranks, number)
        self._ranks[number].add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """*sequence* is admitted, or gone."""
        came = self._came.pop(sequence)
        self._waited[sequence] = self._sweep - came
        number = AGEING_SWEEPS * sequence.priority - came
        self._ranks[number].remove(sequence)
        if not len(self._ranks[number]):
            del self._ranks[number]
            del self._ordered_ranks[bisect_left(self._ordered_ranks, number)]

    def serve(self, sequence: Sequence, num_tokens: int) -> None:
        """*num_tokens* were computed for the client of *sequence*, which is present."""
        self._clients.serve(sequence.client, num_tokens)

    def tick(self) -> None:
        """A sweep goes by."""
        self._sweep += 1
        self._clients.forget_before(self._sweep - AGEING_SWEEPS)

    def in_order(self, num_cached: Callable[[Sequence], int]) -> Generator[Sequence, None, None]:
        """Those that wait, the next one first. What was given out may be removed; nothing may be added meanwhile.

        Args:
            num_cached: tokens of a sequence's prompt that need not be computed.
        """
        from_above = reversed(self._ordered_ranks)
        for _, same in groupby(from_above, key=lambda rank: (self._sweep + rank) // AGEING_SWEEPS):
            placed = heapq.merge(*(self._ranks[rank].in_order() for rank in same))
            for _, equals in groupby(placed, key=lambda item: item[0][0]):
                while ahead := [sequence for _, sequence in islice(equals, LOOK_AHEAD)]:
                    if len(ahead) > 1:
                        ahead.sort(key=lambda sequence: -num_cached(sequence) / sequence.num_prompt_tokens)
                    yield from ahead


class Clients:
    """What was computed for whom: tokens, as far as it matters (see the module).

    Attributes:
        served: of those present, and of those that went a moment ago.
    """

    def __init__(self) -> None:
        self.served: dict[str, int] = {}
        self._present: Counter[str] = Counter()
        self._ordered: list[tuple[int, str]] = []  # of those present
        self._gone: OrderedDict[str, int] = OrderedDict()  # the sweep of each, the earliest first

    def enter(self, client: str) -> None:
        """One more request of *client* is present."""
        self._present[client] += 1
        if self._present[client] == 1:
            least = self._ordered[0][0] if self._ordered else 0
            self.served[client] = max(self.served.get(client, 0), least)
            insort(self._ordered, (self.served[client], client))
            self._gone.pop(client, None)

    def leave(self, client: str, sweep: int) -> None:
        """One request of *client* went, at *sweep*."""
        self._present[client] -= 1
        if self._present[client]:
            return
        del self._present[client]
        del self._ordered[bisect_left(self._ordered, (self.served[client], client))]
        self._gone[client] = sweep
        if not self._present:  # nobody is left that it could gain on
            self.served.clear()
            self._gone.clear()

    def serve(self, client: str, num_tokens: int) -> None:
        """*num_tokens* were computed for *client*, which is present."""
        del self._ordered[bisect_left(self._ordered, (self.served[client], client))]
        self.served[client] += num_tokens
        insort(self._ordered, (self.served[client], client))

    def forget_before(self, sweep: int) -> None:
        """Forget who went before *sweep* and did not come back."""
        while self._gone and next(iter(self._gone.values())) < sweep:
            client, _ = self._gone.popitem(last=False)
            del self.served[client]


class _Rank:
    """The sequences of one rank: by what their client has been served, then by number."""

    def __init__(self, served: Mapping[str, int]) -> None:
        self._served = served
        self._waiting: dict[str, list[tuple[int, Sequence]]] = {}
        self._firsts: list[_Place] = []
        self._entries: dict[str, _Place] = {}  # of each client the one entry in the heap that counts
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, sequence: Sequence) -> None:
        waiting = self._waiting.setdefault(sequence.client, [])
        insort(waiting, (sequence.sequence_id, sequence), key=lambda item: item[0])
        self._length += 1
        if waiting[0][1] is sequence:
            self._put(sequence.client)

    def remove(self, sequence: Sequence) -> None:
        waiting = self._waiting[sequence.client]
        del waiting[bisect_left(waiting, sequence.sequence_id, key=lambda item: item[0])]
        self._length -= 1
        if not waiting:
            del self._waiting[sequence.client]

    def in_order(self) -> Iterator[tuple[_Place, Sequence]]:
        """All of them, the next one first, each with its place; whoever asks for few pays for few."""
        ahead: list[_Place] = []
        met: list[str] = []
        try:
            while True:
                while self._firsts and (not ahead or self._firsts[0] < ahead[0]):
                    if (first := self._take()) is not None:
                        met.append(first[2])
                        heapq.heappush(ahead, first)
                if not ahead:
                    return
                served, number, client = place = heapq.heappop(ahead)
                waiting = self._waiting.get(client, [])
                at = bisect_left(waiting, number, key=lambda item: item[0])
                if at < len(waiting) and waiting[at][0] == number:
                    yield place, waiting[at][1]
                    waiting = self._waiting.get(client, [])
                after = bisect_right(waiting, number, key=lambda item: item[0])
                if after < len(waiting):
                    heapq.heappush(ahead, (served, waiting[after][0], client))
        finally:
            for client in met:
                self._put(client)

    def _put(self, client: str) -> None:
        """Enter the first sequence of *client*, if it has one."""
        if client in self._waiting:
            entry = self._entries[client] = (self._served[client], self._waiting[client][0][0], client)
            heapq.heappush(self._firsts, entry)

    def _take(self) -> _Place | None:
        """Take the first entry out; ``None`` if it was out of date."""
        entry = heapq.heappop(self._firsts)
        client = entry[2]
        if self._entries.get(client) is not entry:
            return None
        del self._entries[client]
        if client in self._waiting and entry != (self._served[client], self._waiting[client][0][0], client):
            self._put(client)
            return None
        return entry if client in self._waiting else None
