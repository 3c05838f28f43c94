"""Work that runs only while nobody asks."""

from __future__ import annotations

from layerstream.api.request import Request
from layerstream.runtime.idle_work import IdleWork


class Clock:
    now = 0.0


def work() -> IdleWork:
    return IdleWork(lambda: 2.0, lambda: Clock.now)


def request() -> Request:
    return Request(1, lambda request: None)


def end(*requests: Request) -> None:
    for one in requests:
        one.fail(ValueError("over"))


def test_it_begins_at_once_where_nobody_has_asked() -> None:
    assert work().may_begin()


def test_a_question_makes_it_leave_once() -> None:
    idle, given = work(), [request(), request(), request()]
    idle.begin(given)
    assert not idle.may_begin(), "one group at a time"
    end(given[0])
    first, second = request(), request()
    assert set(idle.ask([first])) == set(given[1:]), "what is done need not leave"
    assert idle.ask([second]) == []
    assert not idle.may_begin()


def test_it_begins_again_a_while_after_the_last_question() -> None:
    Clock.now = 10.0
    idle, asked = work(), [request(), request()]
    idle.ask(asked)
    end(asked[0])
    Clock.now = 20.0
    assert not idle.may_begin(), "one is still being answered"
    end(asked[1])
    Clock.now = 21.0
    assert not idle.may_begin(), "who was just answered may ask again"
    Clock.now = 22.1
    assert idle.may_begin()


def test_a_request_that_nobody_holds_is_over() -> None:
    Clock.now = 0.0
    idle = work()
    idle.ask([request()])
    Clock.now = 3.0
    assert idle.may_begin()
