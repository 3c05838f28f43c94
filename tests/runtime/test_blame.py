"""Whose an error is: the rule alone, then in a running engine with neighbours."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layerstream import EngineClosed, LayerStream, QueueFull, Request, SamplingParams, WaitsForItself
from layerstream.api.events import SweepStarted
from layerstream.runtime.answer import Answer
from layerstream.runtime.blame import Doing, Victims, blame
from layerstream.runtime.step import SweepStep
from layerstream.scheduling.scheduler import Scheduler

from tests.harness import draw_prompt

PARAMS = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.mark.parametrize(
    ("doing", "victims"),
    [
        (Doing.REQUEST, Victims.REQUESTS),
        (Doing.SWEEP, Victims.REQUESTS),
        (Doing.GUESSES, Victims.NOBODY),
        (Doing.BOOKS, Victims.ALL_REQUESTS),
        (Doing.NEW_BOOKS, Victims.ENGINE),
    ],
)
def test_the_rule(doing: Doing, victims: Victims) -> None:
    assert blame(doing, is_device_lost=False, is_ending=False) is victims
    assert blame(doing, is_device_lost=True, is_ending=False) is Victims.ENGINE
    assert blame(doing, is_device_lost=False, is_ending=True) is Victims.ENGINE


class Poison(Exception):
    pass


def poisoned(owner: type, name: str, is_meant: Callable[[Any], bool], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Method *name* raises, once, when it is called with what *is_meant*."""
    work, raised = getattr(owner, name), []

    def method(self: Any, *args: Any, **options: Any) -> Any:
        if not raised and is_meant((self, *args)):
            raised.append(1)
            raise Poison(name)
        return work(self, *args, **options)

    monkeypatch.setattr(owner, name, method)
    return raised


def is_of(prompt: list[int]) -> Callable[[Any], bool]:
    def is_meant(args: Any) -> bool:
        return any(getattr(arg, "sequence", arg).token_ids[: len(prompt)] == prompt for arg in args if has_tokens(arg))

    return is_meant


def has_tokens(arg: Any) -> bool:
    return hasattr(getattr(arg, "sequence", arg), "token_ids")


@pytest.mark.parametrize(
    ("owner", "name"),
    [(Answer, "accept"), (Answer, "force"), (Answer, "deliver"), (Scheduler, "add"), (SweepStep, "accept")],
)
def test_what_is_one_requests_own_ends_that_one(
    engine: LayerStream, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    guilty, innocent = draw_prompt(20), draw_prompt(33)
    alone = engine.generate([innocent], PARAMS)[0].token_ids
    raised = poisoned(owner, name, is_of(guilty), monkeypatch)
    requests = engine.submit_many([guilty, innocent], PARAMS)
    with pytest.raises(Poison):
        requests[0].result(60)
    assert raised
    assert requests[1].result(60).token_ids == alone
    assert engine.generate([innocent], PARAMS)[0].token_ids == alone
    assert engine._parts.scheduler.num_running == engine._parts.scheduler.num_waiting == 0
    engine._parts.scheduler.check_integrity()


@pytest.mark.parametrize("name", ["schedule", "commit", "remove"])
def test_an_error_in_everybodys_books_ends_who_was_taken_in_and_nobody_later(
    engine: LayerStream, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    prompts = [draw_prompt(40), draw_prompt(33)]
    alone = [c.token_ids for c in engine.generate(prompts, PARAMS)]
    assert poisoned(Scheduler, name, lambda args: True, monkeypatch) == []
    for request in engine.submit_many(prompts, PARAMS):
        with pytest.raises(Poison):
            request.result(60)
    assert [c.token_ids for c in engine.generate(prompts, PARAMS)] == alone
    engine._parts.scheduler.check_integrity()


def test_what_cannot_begin_anew_ends_the_engine_and_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LayerStream(folder, progress=False) as engine:
        poisoned(Scheduler, "schedule", lambda args: True, monkeypatch)
        poisoned(Scheduler, "reset", lambda args: True, monkeypatch)
        with pytest.raises(Poison):
            engine.submit([5, 6], PARAMS).result(60)
        engine._loop._thread.join(60)
        for _ in range(2):
            with pytest.raises(EngineClosed, match="came to an end because of Poison: reset"):
                engine.generate([[5, 6]], PARAMS)


def test_guesses_that_fail_are_given_up(engine: LayerStream, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = draw_prompt(4) * 10
    alone = engine.generate([prompt], PARAMS)[0].token_ids
    assert poisoned(type(engine._parts.drafting), "propose", lambda args: True, monkeypatch) == []
    for _ in range(2):
        assert engine.generate([prompt], PARAMS)[0].token_ids == alone


def test_callbacks_cannot_hurt_the_engine(engine: LayerStream) -> None:
    found: list[BaseException] = []

    def waits(request: Request) -> None:
        try:
            engine.generate([[5, 6]], PARAMS)
        except WaitsForItself as error:
            found.append(error)

    for callback in (waits, lambda request: exit(3), lambda request: 1 / 0):
        request = engine.submit(draw_prompt(9), PARAMS)
        request.add_done_callback(callback)
        request.result(60)
    assert len(engine.generate([draw_prompt(9)], PARAMS)[0].token_ids) == 12
    assert "another thread" in str(found[0])
    with pytest.raises(ValueError, match="callback is 5"):
        request.add_done_callback(5)  # type: ignore[arg-type]


def test_a_listener_that_exits_is_not_called_again(folder: Path) -> None:
    def listener(event: object) -> None:
        if isinstance(event, SweepStarted):
            raise SystemExit(3)

    with LayerStream(folder, progress=listener) as engine:
        assert len(engine.generate([[5, 6]], PARAMS)[0].token_ids) == 12


def test_one_that_fails_takes_its_other_answers_along(engine: LayerStream, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(Answer, "accept", lambda args: args[0].index == 1, monkeypatch)
    long = SamplingParams(max_tokens=400, temperature=1.0, n=3, ignore_eos=True)
    with pytest.raises(Poison):
        engine.submit(draw_prompt(20), long).result(60)
    engine.generate([[5, 6]], SamplingParams(max_tokens=1))
    assert engine._parts.scheduler.num_running == 0


def test_close_from_everywhere_leaves_no_thread(folder: Path) -> None:
    before = threading.active_count()
    engine = LayerStream(folder, progress=False)
    request = engine.submit(draw_prompt(20), SamplingParams(max_tokens=900, ignore_eos=True))
    closers = [threading.Thread(target=engine.close) for _ in range(4)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(60)
        assert not closer.is_alive()
    with pytest.raises(EngineClosed):
        request.result(60)
    with pytest.raises(EngineClosed):
        engine.gang(2)
    engine.close()
    assert threading.active_count() == before

    engine = LayerStream(folder, progress=False)
    request = engine.submit(draw_prompt(20), PARAMS)
    request.add_done_callback(lambda request: engine.close())
    request.result(60)
    engine._loop._thread.join(60)
    assert threading.active_count() == before


def test_close_does_not_raise_whatever_is_broken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    engine = LayerStream(folder, progress=False)
    for part in (engine._parts.kv.swap, engine._parts.step, engine._parts.kv.memory):
        poisoned(type(part), "close", lambda args: True, monkeypatch)
    engine.close()
    engine.close()
    assert threading.active_count() == before


def test_a_constructor_that_fails_leaves_no_thread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from layerstream.front import opened as module

    before = threading.active_count()
    poisoned(module.Intake, "__init__", lambda args: True, monkeypatch)
    with pytest.raises(Poison):
        LayerStream(folder, progress=False)
    assert threading.active_count() == before


def test_more_than_may_wait(folder: Path) -> None:
    with LayerStream(folder, progress=False, max_queued=3) as engine, engine.gang(9, 30.0) as gang:
        first = engine.submit_many([[5, 6], [7, 8]], PARAMS)
        with pytest.raises(QueueFull, match="2 answers wait already and 2 more were asked for, and 3 may wait"):
            engine.submit([9], SamplingParams(n=2))
        first[0].cancel()
        assert first[0].result(60).finish_reason == "cancelled", "even while the gang holds it"
        last = engine.submit_many([[5], [6]], PARAMS)
        for _ in range(9):
            gang.leave()
        assert all(len(request.result(60).token_ids) == 12 for request in (first[1], *last))
