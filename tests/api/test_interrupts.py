"""Ctrl-C wherever a caller's thread is: it is raised, and nothing else; no lock stays behind."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from layerstream.api.bell import Bell
from layerstream.api.completion import Delta
from layerstream.api.home import Home
from layerstream.api.request import Request
from layerstream.errors import EngineClosed
from layerstream.runtime.inbox import Inbox
from layerstream.runtime.reception import Reception

ROUNDS = 400
LONGEST_SECONDS = 0.001
in_main_thread = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread alone"
)


def test_a_ring_before_the_wait_is_not_missed_and_counts_once() -> None:
    bell = Bell()
    assert not bell.wait(0.0)
    bell.ring()
    bell.ring()
    assert bell.wait(0.0)
    assert not bell.wait(0.0)
    bell.ring()
    bell.still()
    assert not bell.wait(0.0)


def test_whoever_waits_is_woken_by_others() -> None:
    bell, there = Bell(), threading.Event()
    waiting = threading.Thread(target=lambda: (there.set(), bell.wait(), there.clear()))
    waiting.start()
    assert there.wait(10)
    bell.ring()
    waiting.join(10)
    assert not there.is_set()


@contextmanager
def interrupts() -> Iterator[random.Random]:
    """Ctrl-C at any time within."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        yield random.Random(0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interrupt_after(seconds: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))


def no_more() -> None:
    """No interrupt comes after it; within it one may."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def answer(request: Request, stop: threading.Event) -> None:
    for _ in range(20_000):
        if stop.is_set():
            return
        request.push(Delta("a", (1,), None, 0, None))
    request.fail(EngineClosed("the interrupt was lost"))


@in_main_thread
def test_reading_an_answer() -> None:
    num_interrupted = 0
    with interrupts() as chance:
        for _ in range(ROUNDS):
            request, stop = Request(1, lambda _: None), threading.Event()
            answering = threading.Thread(target=answer, args=(request, stop))
            answering.start()
            try:
                interrupt_after(chance.uniform(0, LONGEST_SECONDS))
                with suppress(EngineClosed):  # Python loses an interrupt that comes while an object dies
                    for _ in request:
                        pass
                no_more()
            except KeyboardInterrupt:
                num_interrupted += 1
            stop.set()
            answering.join(10)
            assert not answering.is_alive(), "it waits for a lock that nobody will release"
            assert request._lock.acquire(timeout=1)
    assert num_interrupted > 0.9 * ROUNDS


@in_main_thread
def test_handing_in_and_giving_up() -> None:
    with interrupts() as chance:
        for _ in range(ROUNDS):
            reception = Reception(Home(), Inbox(lambda: 0.0))
            request = Request(1, reception.cancel)
            taking = threading.Thread(target=lambda r=reception: r.wait(10))
            taking.start()
            try:
                interrupt_after(chance.uniform(0, LONGEST_SECONDS / 4))
                for _ in range(1000):
                    reception.cancel(request)
                    with reception.gang(2, 0.1):
                        pass
                no_more()
            except KeyboardInterrupt:
                pass
            reception.wake()
            taking.join(10)
            assert not taking.is_alive()
            assert reception._lock.acquire(timeout=1)
