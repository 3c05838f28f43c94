"""Slots for the states of recurrent layers: who holds which, and where snapshots are taken. Pure accounting.

A slot is room for one state of every recurrent layer (:mod:`layerstream.kv.recurrent`). A *snapshot* is the states
after a whole page of a prompt, under that page's key. States that were committed never change, so a snapshot is no
copy: the sequence goes on to another slot. Who holds a slot:

| holder | from when | until |
|---|---|---|
| a running sequence (``tenancy.state``) | a sweep is committed, or it begins at a snapshot | the next commit |
| one that steps back (``tenancy.previous``) | a sweep is committed, but for its newest token | it is in another sweep |
| the sweep under way | it is composed | it is committed; or, if it had no effect, the next one is composed |
| a snapshot | it was computed, or is to be loaded | a slot is wanted: least recently used first |
| the store | a snapshot is published | it was written |

Where a sequence begins: at the end of the last page of its prompt whose snapshot is in memory, is stored, or will be
there because a running sequence passes it (*expected*). Between that and the end of the pages that it shares it
computes once more, into pages that hold the same bits.

Where snapshots are taken, as far as there are slots: where one is expected; where a prompt has left what others have
computed (the next one is likely to leave it there, too); at the end of a prompt's whole pages, and so of a document
that was warmed; and every ``stride`` pages (:func:`snapshot_stride`).

Invariants: ``tenancy.state`` is the state after ``num_computed`` tokens, or ``None``: there are none, or it is not
there yet (the sequence is in no sweep then); every running sequence may have a second slot for the next sweep (one that
steps back four in all, a search two for each beam), and those who run are no more than have; without recurrent layers
there are no slots, and all this does nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from layerstream.core.sequence import Sequence as TokenSequence
from layerstream.core.sweep import PageLoad, StateRoute, Sweep
from layerstream.kv.keys import Key, snapshot_key
from layerstream.kv.pages import PagePool
from layerstream.kv.stored import PublishedState, SpillStore

SLOTS_EACH = 2  # of a sequence that runs: the state that was committed, and the next one
SLOTS_STEPPING_BACK = 4  # of one that steps back: also the state before its newest token, of this sweep and of the last
MOST_STRIDE_TOKENS = 4096
MOST_EXPECTED = 4096


def snapshot_stride(state_bytes: int, kv_token_bytes: int, page_tokens: int) -> int:
    """Pages between snapshots: a snapshot takes as many bytes as the KV of the tokens that it saves at most.

    So a stored prefix takes at most twice its KV, and no more than :data:`MOST_STRIDE_TOKENS` are computed once more.
    """
    tokens = min(MOST_STRIDE_TOKENS, state_bytes // kv_token_bytes if kv_token_bytes else MOST_STRIDE_TOKENS)
    return max(1, -(-tokens // page_tokens))


@dataclass(slots=True)
class _Snapshot:
    slot: int
    is_loading: bool = False


class States:
    """The slots of an engine.

    Args:
        num_slots: 0: the model has no recurrent layers.
        stride: pages between snapshots.
    """

    def __init__(self, num_slots: int, page_tokens: int, stride: int = 1, store: SpillStore | None = None) -> None:
        self.pool = PagePool(num_slots, 1)
        self._page_tokens = page_tokens
        self._stride = stride
        self._store = store
        self._snapshots: OrderedDict[Key, _Snapshot] = OrderedDict()  # least recently used first
        self._expected: set[Key] = set()
        self._routes: dict[TokenSequence, StateRoute] = {}
        self._passed: dict[Key, int] = {}  # slots of snapshots that the sweep being composed takes
        self._targets: dict[TokenSequence, int] = {}  # slots of sequences that may be in it
        self._num_running = 0
        self._held_by_store: list[int] = []

    @property
    def is_needed(self) -> bool:
        """Whether there are recurrent layers."""
        return self.pool.num_pages > 0

    @property
    def most_at_once(self) -> int:
        """Sequences that may run at once, where there are recurrent layers."""
        return self.pool.num_pages // SLOTS_EACH

    @property
    def num_snapshots(self) -> int:
        """Snapshots in memory."""
        return len(self._snapshots)

    def has_room(self, running: Iterable[TokenSequence]) -> bool:
        """Whether all of *running* may have two slots at once."""
        if not self.is_needed:
            return True
        everyone = list(running)
        alone = sum(
            SLOTS_STEPPING_BACK if sequence.steps_back else SLOTS_EACH
            for sequence in everyone
            if sequence.group is None
        )
        groups = {sequence.group for sequence in everyone if sequence.group is not None}
        return alone + sum(SLOTS_EACH * group.num_rows for group in groups) <= self.pool.num_pages

    # Where a sequence begins

    def resumable(self, keys: Sequence[Key], most: int) -> int:
        """The largest number of pages, up to *most*, whose snapshot is in memory."""
        return next((count for count in range(min(most, len(keys)), 0, -1) if keys[count - 1] in self._snapshots), 0)

    def expect(self, key: Key) -> None:
        """A snapshot at page *key* is worth having: whoever computes past it is to leave one."""
        if self.is_needed and key not in self._snapshots:
            self._expected.add(key)

    def bring(self, key: Key) -> bool:
        """Have the stored snapshot at page *key* loaded with the first sweep that needs it; False: there is no slot."""
        if key not in self._snapshots:
            slot = self._acquire()
            if slot is None:
                return False
            self._snapshots[key] = _Snapshot(slot, is_loading=True)
        return True

    def begin(self, sequence: TokenSequence) -> bool:
        """Give *sequence* the state after ``num_computed`` tokens, if it is there; whether it has it, or needs none."""
        if not self.is_needed or sequence.tenancy.state is not None or not sequence.num_computed:
            return True
        key = self._key_at(sequence, sequence.num_computed)
        found = None if key is None else self._snapshots.get(key)
        if key is None or found is None:
            return False
        self._snapshots.move_to_end(key)
        self.pool.share([found.slot])
        sequence.tenancy.state = found.slot
        return True

    def is_coming(self, sequence: TokenSequence, running: Iterable[TokenSequence]) -> bool:
        """Whether the state that *sequence* lacks will be left by one of *running*."""
        key = self._key_at(sequence, sequence.num_computed)
        if key is None or key not in self._expected:
            return False
        position = sequence.num_computed // self._page_tokens - 1
        return any(
            other is not sequence
            and other.num_computed < sequence.num_computed
            and other.prefix_keys[position : position + 1] == [key]
            for other in running
        )

    def acquire(self) -> int | None:
        """A slot for somebody who comes back with a state."""
        return self._acquire()

    def give_back(self, slot: int) -> None:
        """Nobody came back to *slot*."""
        self.pool.release([slot])

    def release(self, sequence: TokenSequence) -> None:
        """*sequence* has no state any more."""
        self._leave_previous(sequence)
        state, sequence.tenancy.state = sequence.tenancy.state, None
        if state is not None:
            self.pool.release([state])

    def rewind(self, sequence: TokenSequence, num_tokens: int) -> None:
        """*sequence* has the state after *num_tokens* again, if that was kept; else it has none any more."""
        previous, sequence.tenancy.previous = sequence.tenancy.previous, None
        self.release(sequence)
        if previous is not None and previous[0] == num_tokens:
            sequence.tenancy.state = previous[1]
        elif previous is not None:
            self.pool.release([previous[1]])

    def fork(self, child: TokenSequence) -> None:
        """*child*, a copy of a running sequence, has its state, too."""
        if child.tenancy.state is not None:
            self.pool.share([child.tenancy.state])

    def lose(self, key: Key, running: Iterable[TokenSequence]) -> None:
        """What the store has under *key* is damaged or gone: if it is a snapshot, those that begin at it do not."""
        lost = next((k for k, s in self._snapshots.items() if s.is_loading and snapshot_key(k) == key), None)
        if lost is not None:
            slot = self._snapshots.pop(lost).slot
            self._expected.add(lost)  # whoever computes it anew leaves it for the others
            for sequence in running:
                if sequence.tenancy.state == slot:
                    self.release(sequence)
            self.pool.release([slot])

    # A sweep

    def start(self, running: Sequence[TokenSequence]) -> None:
        """A sweep of some of *running* is going to be composed; the last one, if it was not committed, is forgotten."""
        self.pool.release([slot for route in self._routes.values() for _, slot in route.stops])
        self.pool.release(list(self._targets.values()))
        self._routes, self._passed, self._targets = {}, {}, {}
        self._num_running = len(running)
        if len(self._expected) > MOST_EXPECTED:  # some by sequences that are gone
            self._expected.intersection_update(key for sequence in running for key in sequence.prefix_keys)
        if self._store is not None and self.is_needed:
            self._release_stored(self._store.collect_slots())

    def may_join(self, sequence: TokenSequence) -> bool:
        """Whether *sequence* has a state to go on from, or this sweep leaves it, and a slot for the next one."""
        if not self.is_needed:
            return True
        if not self.begin(sequence) and self._key_at(sequence, sequence.num_computed) not in self._passed:
            return False
        self._leave_previous(sequence)
        target = self._acquire()
        if target is None:
            return False
        self._targets[sequence] = target
        return True

    def join(self, sequence: TokenSequence, stop: int) -> None:
        """The sweep computes *sequence* up to token *stop*; nothing, if that is where it is."""
        if not self.is_needed:
            return
        target, start = self._targets.pop(sequence), sequence.num_computed
        if stop == start:
            self.pool.release([target])
            return
        source = sequence.tenancy.state
        if source is None and start:
            key = self._key_at(sequence, start)
            assert key is not None, "it began at the end of a page"
            source = self._passed[key]
        stops = self._snapshots_between(sequence, start, stop)
        if sequence.steps_back and stop - 1 > max(start, sequence.num_prompt_tokens - 1):  # a chunk is not parted
            before = self._spare_slot(self._num_running - len(self._routes) - 1)
            stops += [] if before is None else [(stop - 1, before)]
        if stops and stops[-1][0] == stop:
            self.pool.release([target])
        else:
            stops.append((stop, target))
        self._routes[sequence] = StateRoute(start, source, tuple(stops))

    def routes(self) -> dict[TokenSequence, StateRoute]:
        """Of all that joined."""
        return dict(self._routes)

    def loads(self) -> tuple[PageLoad, ...]:
        """The stored snapshots that they begin at."""
        sources = {route.source for route in self._routes.values()}
        loading = ((key, found) for key, found in self._snapshots.items() if found.is_loading)
        return tuple(PageLoad(snapshot_key(key), found.slot) for key, found in loading if found.slot in sources)

    def commit(self, sweep: Sweep) -> list[PublishedState]:
        """The states of *sweep*, the one that was composed last, are in their slots.

        Returns:
            What may be stored. With a store these slots are held until ``collect_slots`` or ``give_back_slots`` names
            them.
        """
        loaded = {load.key for load in sweep.state_loads}
        for key, found in self._snapshots.items():
            found.is_loading = found.is_loading and snapshot_key(key) not in loaded
        published: list[PublishedState] = []
        for sequence, route in sweep.routes.items():
            previous = self._state_before_newest(sequence, route)
            self.release(sequence)
            sequence.tenancy.state, sequence.tenancy.previous = route.target, previous
            self.pool.share([route.target])
            last = route.start
            for stop, slot in route.stops:
                key = self._key_at(sequence, stop)
                if key is None or self._passed.get(key) != slot:
                    self.pool.release([slot])
                    continue
                self._snapshots[key] = _Snapshot(slot)
                self._expected.discard(key)
                if sequence.is_kept:
                    published.append(PublishedState(key, slot, stop - last))
                last = stop
        self._routes, self._passed = {}, {}
        if self._store is None:
            return []
        slots = [item.slot for item in published]
        self.pool.share(slots)
        self._held_by_store += slots
        return published

    def reset(self, others: Iterable[TokenSequence]) -> None:
        """There are no sequences and no snapshots; *others* had some. What the store holds stays its own."""
        for sequence in others:
            sequence.tenancy.state = sequence.tenancy.previous = None
        self._snapshots.clear()
        self._expected.clear()
        self._routes, self._passed, self._targets = {}, {}, {}
        for slot in range(self.pool.num_pages):
            self.pool.release([slot] * (self.pool.refcount(slot) - self._held_by_store.count(slot)))

    def check_integrity(self, running: Iterable[TokenSequence]) -> None:
        """Raise ``AssertionError`` unless all slots are accounted for."""
        tenancies = [sequence.tenancy for sequence in running]
        states = [tenancy.state for tenancy in tenancies if tenancy.state is not None]
        states += [tenancy.previous[1] for tenancy in tenancies if tenancy.previous is not None]
        stops = [slot for route in self._routes.values() for _, slot in route.stops]
        snapshots = [found.slot for found in self._snapshots.values()]
        self.pool.check_integrity([states, stops, snapshots, list(self._targets.values()), self._held_by_store])

    def _leave_previous(self, sequence: TokenSequence) -> None:
        previous, sequence.tenancy.previous = sequence.tenancy.previous, None
        if previous is not None:
            self.pool.release([previous[1]])

    def _state_before_newest(self, sequence: TokenSequence, route: StateRoute) -> tuple[int, int] | None:
        """Tokens and slot of it, held once more; ``None`` where *sequence* does not step back, or nothing was left."""
        before = route.stops[-1][0] - 1
        slot = route.source if before == route.start else dict(route.stops).get(before)
        if not sequence.steps_back or slot is None:
            return None
        self.pool.share([slot])
        return before, slot

    def _snapshots_between(self, sequence: TokenSequence, start: int, stop: int) -> list[tuple[int, int]]:
        """``(tokens, slot)`` of the snapshots that *sequence* leaves after *start*, up to *stop*, in order."""
        size, keys = self._page_tokens, sequence.prefix_keys
        places = [
            count
            for count in range(start // size + 1, min(stop // size, len(keys)) + 1)
            if keys[count - 1] not in self._snapshots and keys[count - 1] not in self._passed
        ]
        first = [count for count in places if keys[count - 1] in self._expected or count == len(keys)]
        regular = [count for count in places if count % self._stride == 0 and count not in first]
        others = self._num_running - len(self._routes) - 1  # each is to have its slot
        taken: list[tuple[int, int]] = []
        for count in (*first, *reversed(regular)):
            slot = self._spare_slot(others + (count in regular))  # the end of the prompt may still be to come
            if slot is None:
                break
            self._passed[keys[count - 1]] = slot
            taken.append((count * size, slot))
        return sorted(taken)

    def _acquire(self) -> int | None:
        """A slot that somebody needs: what waits to be stored makes room, too."""
        slot = self._spare_slot(0)
        if slot is None and self._store is not None:
            self._release_stored(self._store.give_back_slots())
            slot = self._spare_slot(0)
        return slot

    def _spare_slot(self, left: int) -> int | None:
        """A slot, so that *left* more are to be had; snapshots that nobody uses make room."""
        idle = [key for key, found in self._snapshots.items() if self.pool.refcount(found.slot) == 1]
        if self.pool.num_free + len(idle) <= left:
            return None
        if not self.pool.num_free:
            self.pool.release([self._snapshots.pop(idle[0]).slot])
        found = self.pool.acquire(1)
        return None if found is None else found[0]

    def _release_stored(self, slots: list[int]) -> None:
        for slot in slots:
            self._held_by_store.remove(slot)
        self.pool.release(slots)

    def _key_at(self, sequence: TokenSequence, num_tokens: int) -> Key | None:
        """The key of the page that ends after *num_tokens* of *sequence*."""
        count, rest = divmod(num_tokens, self._page_tokens)
        return sequence.prefix_keys[count - 1] if count and not rest and count <= len(sequence.prefix_keys) else None
