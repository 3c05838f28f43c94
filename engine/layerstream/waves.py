"""Many prompts, a wave after the other: :class:`Waves`.

The next wave is handed in while the last is computed, so that sweeps stay full, a hundred thousand texts are no queue
of a hundred thousand, and no more wait than an engine lets wait. If one fails, or whoever waits gives up, nothing of
the rest stays behind: not even what another thread is just handing in.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:  # whoever imports a wrapper pays for no torch
    from layerstream.api.request import Request
    from layerstream.text.prompt import Prompt

WAVE = 128  # texts: more than a sweep has room for, as a rule

Submit: TypeAlias = "Callable[[Sequence[Prompt]], list[Request]]"


class Waves:
    """Hands prompts in, a wave after the other, and gives their requests in order.

    Args:
        submit: hands several in.
        most: that may wait at a time; ``None``: any number.
        size: of a wave; ``None``: :data:`WAVE`.
    """

    def __init__(
        self, submit: Submit, prompts: Iterable[Prompt], most: int | None = None, size: int | None = None
    ) -> None:
        self._submit = submit
        self._rest = iter(prompts)
        self._most = most
        size = WAVE if size is None else size
        self._size = max(1, size if most is None else min(size, most))
        self._running: deque[Request] = deque()  # the first of them was given out last
        self._has_rest = True
        self._is_over = False

    def __enter__(self) -> Waves:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._is_over = True
            self._cancel()

    @property
    def is_due(self) -> bool:
        """Whether :meth:`hand_in` has something to do."""
        count = len(self._running)
        has_room = self._most is None or count + self._size <= self._most or not count
        return self._has_rest and count <= self._size and has_room

    def hand_in(self) -> None:
        """Hand in what there is room for beside those that run. Any thread may, one at a time."""
        while self.is_due:
            wave = list(itertools.islice(self._rest, self._size))
            self._has_rest = len(wave) == self._size
            if wave:
                self._running.extend(self._submit(wave))
        if self._is_over:
            self._cancel()

    def next(self) -> Request | None:
        """The next request, the one before being done; ``None``: that was the last."""
        self.step()
        self.hand_in()
        return self.first

    def step(self) -> None:
        """The request that was given out last is done."""
        if self._running:
            self._running.popleft()

    @property
    def first(self) -> Request | None:
        """The request to wait for; ``None``: there is none."""
        return self._running[0] if self._running else None

    def _cancel(self) -> None:
        for request in list(self._running):
            request.cancel()
