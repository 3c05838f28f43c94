"""Arrivals meet: a moment for an idle engine, gangs, and nothing held for ever."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from layerstream.errors import QueueFull
from layerstream.runtime.inbox import Inbox


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(moment: float = 0.5) -> tuple[Inbox, Clock]:
    clock = Clock()
    return Inbox(lambda: moment, clock=clock), clock


@dataclass(eq=False)
class Waiting:
    request: object
    deadline: float = float("inf")


_answers: dict[str, Any] = {}


def answer(name: str) -> Any:
    """The answer of that name; each is of a request of its own."""
    return _answers.setdefault(name, Waiting(object()))


def take(inbox: Inbox, *, is_idle: bool) -> tuple[list[str], float | None]:
    answers, seconds = inbox.take(is_idle=is_idle)
    return named(answers), seconds


def named(answers: list[Any]) -> list[str]:
    return [name for one in answers for name, known in _answers.items() if known is one]


def test_an_idle_engine_waits_a_moment_and_a_busy_one_does_not() -> None:
    inbox, clock = make()
    assert inbox.take(is_idle=True) == ([], None)
    inbox.put([answer("a")], 1)
    assert inbox.take(is_idle=True) == ([], 0.5)
    clock.now += 0.25
    inbox.put([answer("b")], 1)
    assert inbox.take(is_idle=True) == ([], 0.25), "counted from the first"
    clock.now += 0.25
    assert take(inbox, is_idle=True) == (["a", "b"], None)
    inbox.put([answer("c")], 1)
    assert take(inbox, is_idle=False) == (["c"], None)


def test_a_gang_holds_until_it_is_complete() -> None:
    inbox, clock = make(moment=0.0)
    gang = inbox.open_gang(3, seconds=2.0)
    inbox.put([answer("a"), answer("a2")], 1)
    assert inbox.take(is_idle=False) == ([], 2.0)
    clock.now += 0.5
    inbox.put([answer("b")], 1)
    assert inbox.take(is_idle=True) == ([], 1.5)
    inbox.put([answer("c")], 1)
    assert take(inbox, is_idle=True) == (["a", "a2", "b", "c"], None)
    inbox.close_gang(gang)


def test_a_gang_that_is_late_or_closed_holds_nobody() -> None:
    inbox, clock = make(moment=0.0)
    gang = inbox.open_gang(2, seconds=1.0)
    inbox.put([answer("a")], 1)
    clock.now += 1.0
    assert take(inbox, is_idle=True) == (["a"], None)
    gang = inbox.open_gang(2, seconds=1.0)
    inbox.put([answer("b")], 1)
    assert inbox.take(is_idle=True)[0] == []
    inbox.close_gang(gang)
    inbox.close_gang(gang)
    assert take(inbox, is_idle=True) == (["b"], None)


def test_who_is_held_can_leave() -> None:
    inbox, _ = make()
    inbox.put([answer("a"), answer("b")], 2)
    assert inbox.roster.of(answer("a").request) == [answer("a")]
    inbox.roster.remove(answer("a"))
    assert named(inbox.roster.drain()) == ["b"]
    assert not len(inbox)
    assert inbox.take(is_idle=True) == ([], None)


def test_no_more_wait_than_may() -> None:
    inbox = Inbox(lambda: 0.0, most=3)
    inbox.put([answer("a")], 1)
    with pytest.raises(QueueFull, match="1 answers wait already and 3 more") as full:
        inbox.put([answer("b"), answer("c"), answer("d")], 1)
    assert (full.value.num_waiting, full.value.max_queued) == (1, 3)
    with pytest.raises(QueueFull):
        inbox.put([answer("b"), answer("c")], 1, num_waiting=1)
    inbox.put([answer("b"), answer("c")], 1)
    assert take(inbox, is_idle=False) == (["a", "b", "c"], None), "all of those that were let in, none of the others"


def test_a_gang_does_not_wait_for_who_left() -> None:
    inbox, _ = make(moment=0.0)
    gang = inbox.open_gang(3, seconds=9.0)
    inbox.put([answer("a")], 1)
    inbox.put([answer("b")], 1)
    assert inbox.take(is_idle=True) == ([], 9.0)
    inbox.leave_gang(gang)
    assert take(inbox, is_idle=True) == (["a", "b"], None)
