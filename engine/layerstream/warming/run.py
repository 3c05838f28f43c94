"""A run: compute the prefixes that are missing, a few at a time, and pin them.

Documents are encoded as the run comes to them. What a run has stored stays, whatever ends it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from layerstream.api.request import Request
from layerstream.store.store import PrefixStore
from layerstream.warming.choice import Allowance, Corpus, Sizes
from layerstream.warming.forecast import WarmForecast, make_forecast, room_for, sizes_of
from layerstream.warming.prefixes import Engine, Prefix, Prefixes, Submit

AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class WarmReport:
    """What warming did: *computed_tokens* of the forecast's are stored now, in *seconds*.

    ``warmed`` documents are in the store, ``left_out`` had no room, or were too long for the context.
    """

    forecast: WarmForecast
    computed_tokens: int
    seconds: float
    warmed: int
    left_out: int


@dataclass(slots=True)
class WarmRun:
    """Documents in the order in which they are warmed, and how far that is.

    Attributes:
        order: the most popular first.
        on_document: called with the documents done and their number, after each.
        should_stop: asked between groups and whenever questions are waited for.
        wait_for_turn: called where somebody asks; returns when it may be tried again.
        at_once: prefixes in one group; they share sweeps.
    """

    forecast: WarmForecast
    order: Sequence[str]
    prefixes: Prefixes
    store: PrefixStore
    sizes: Sizes
    room: float
    submit: Submit
    on_document: Callable[[int, int], None] = lambda done, count: None
    should_stop: Callable[[], bool] = lambda: False
    wait_for_turn: Callable[[], object] = lambda: None
    at_once: int = AT_ONCE
    done: int = 0
    left_out: int = 0
    computed_pages: int = 0
    requests: list[Request] = field(default_factory=list)
    _seen: set[bytes] = field(default_factory=set)

    @classmethod
    def prepare(
        cls, engine: Engine, prefixes: Prefixes, store: PrefixStore, corpus: Corpus, submit: Submit, **more: Any
    ) -> WarmRun:
        """A run over *corpus*; *more* are fields that have a default."""
        sizes, room = sizes_of(engine, store), room_for(store, corpus.budget_bytes)
        foreseen = make_forecast(engine, prefixes, store, corpus)
        return cls(foreseen, corpus.order, prefixes, store, sizes, room, submit, **more)

    def run(self) -> WarmReport:
        """Do it; raises what a request raises."""
        started = time.perf_counter()
        self._tell(0)
        for group in self._groups():
            self._compute(group)
            if self.should_stop():
                break
        return WarmReport(
            self.forecast,
            self.computed_pages * self.prefixes.page_tokens,
            time.perf_counter() - started,
            self.done,
            self.left_out,
        )

    def _groups(self) -> Iterator[list[tuple[Prefix, list[bytes]]]]:
        """Prefixes that are not wholly stored, each with the keys that no earlier one has; the others are done."""
        allowance, group = Allowance(self.room), list[tuple[Prefix, list[bytes]]]()
        for at, text in enumerate(self.order):
            if self.should_stop():
                return
            if allowance.spent:
                self.left_out += len(self.order) - at
                break
            prefix = self.prefixes.of(text)
            if prefix is None:
                if text in self.prefixes.too_long:
                    self.left_out += 1
                else:  # shorter than a page
                    self._tell(1)
                continue
            num_bytes = self.sizes.of(sum(key not in self._seen for key in prefix.keys))
            if not allowance.admit(num_bytes):
                self.left_out += 1
                continue
            missing = [key for key in prefix.keys[self.store.look_up(prefix.keys) :] if key not in self._seen]
            self._seen.update(prefix.keys)
            self.store.pin(prefix.keys)
            if not missing:
                self._tell(1)
                continue
            group.append((prefix, missing))
            if len(group) == self.at_once:
                yield group
                group = []
        if group:
            yield group

    def _compute(self, group: list[tuple[Prefix, list[bytes]]]) -> None:
        """Compute *group*; what gives way to a question is asked again."""
        while group and not self.should_stop():
            requests = self.submit([prefix.token_ids for prefix, _ in group])
            if requests is None:
                self.wait_for_turn()
                continue
            self.requests = requests
            again = []
            try:
                for request, item in zip(requests, group, strict=True):
                    if request.result().finish_reason == "cancelled":
                        again.append(item)
                        continue
                    self._tell(1)
            except BaseException:
                for request in requests:
                    request.cancel()
                raise
            finally:
                self.requests = []
                self.store.flush()
            self._count([item for item in group if not any(item is other for other in again)])
            group = again
        if group:
            self._count(group)  # it was stopped: some of their pages may be there

    def _count(self, group: list[tuple[Prefix, list[bytes]]]) -> None:
        for prefix, missing in group:
            stored = set(prefix.keys[: self.store.look_up(prefix.keys)])
            self.computed_pages += sum(key in stored for key in missing)

    def _tell(self, num: int) -> None:
        self.done += num
        self.on_document(self.done, max(self.done, self.forecast.chosen))
