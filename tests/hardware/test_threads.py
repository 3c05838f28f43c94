"""What computes before the engine starts does it on a thread that ends."""

from __future__ import annotations

import threading
import time

import pytest
from layerstream.hardware.threads import run_apart


def test_the_result_comes_from_a_thread_that_has_ended() -> None:
    threads: list[threading.Thread] = []

    def make() -> str:
        threads.append(threading.current_thread())
        return "made"

    assert run_apart(make, lambda _: pytest.fail("discarded")) == "made"
    assert threads[0] is not threading.current_thread()
    assert not threads[0].is_alive()


def test_errors_are_raised_to_the_caller() -> None:
    def make() -> None:
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        run_apart(make, lambda _: pytest.fail("discarded"))


@pytest.mark.parametrize("is_done_first", [False, True])
def test_what_nobody_waits_for_any_more_is_discarded(is_done_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    may_end, discarded = threading.Event(), threading.Event()
    join = threading.Thread.join

    def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        if is_done_first:
            may_end.set()
            join(thread)
        raise KeyboardInterrupt

    def make() -> int:
        may_end.wait(10)
        return 7

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_apart(make, lambda made: discarded.set() if made == 7 else None)
    assert discarded.is_set() == is_done_first
    may_end.set()
    started = time.monotonic()
    while not discarded.is_set():
        assert time.monotonic() - started < 10
        time.sleep(0.01)
