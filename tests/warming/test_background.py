"""Warming in the background: it gives way to questions, ends with the engine, and never ends it."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layerstream import EngineClosed, KVStoreConfig, LayerStream, RequestTimeout, SamplingParams, StorageFull
from layerstream.api.events import SweepStarted
from layerstream.warming import Warming

CHUNK = 32
DOCUMENTS = [f"The {name} of the house has {number} doors. " * 12 for number, name in enumerate("abcdefghijkl")]
PARAMS = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


def make(tmp_path: Path, progress: Any = False, **options: Any) -> LayerStream:
    store = KVStoreConfig(tmp_path / "kv", load="always", max_bytes="1GiB", min_free_bytes=0)
    return LayerStream("demo", kv_store=store, chunk_tokens=CHUNK, progress=progress, **options)


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_it_does_what_warming_does(tmp_path: Path) -> None:
    with make(tmp_path) as engine:
        warming = engine.warm(DOCUMENTS, background=True)
        report = warming.wait(60)
        assert (report.warmed, report.left_out) == (len(DOCUMENTS), 0)
        assert report.computed_tokens == report.forecast.missing_tokens > 0
        assert warming.done()
        assert warming.exception() is None
        assert warming.progress.state == "done"
        assert warming.progress.done == warming.progress.documents == len(DOCUMENTS)
        assert engine.forecast_warm(DOCUMENTS).missing_tokens == 0
        assert engine.warm(DOCUMENTS, background=True).wait(60).computed_tokens == 0


def test_no_sweep_carries_a_question_and_warming(tmp_path: Path) -> None:
    """Whenever questions come: sweeps with rows of both would hold more sequences than questions."""
    sweeps: list[int] = []

    def listen(event: Any) -> None:
        if isinstance(event, SweepStarted):
            sweeps.append(event.num_sequences)
            time.sleep(0.002)

    with make(tmp_path, listen) as engine:
        warming = engine.warm(DOCUMENTS, background=True)
        for number in range(4):
            before = len(sweeps)
            until(lambda before=before: warming.done() or len(sweeps) > before)  # it goes on between questions
            request = engine.submit(f"Question {number} about something else", PARAMS)
            # the sweep under way may be warming's; from the next one on it is the question's alone
            begun = len(sweeps)
            request.result(60)
            assert set(sweeps[begun + 1 :]) == {1}
        assert warming.wait(60).warmed == len(DOCUMENTS)
        assert engine.forecast_warm(DOCUMENTS).missing_tokens == 0


def test_it_waits_while_somebody_asks(tmp_path: Path) -> None:
    with make(tmp_path) as engine:
        request = engine.submit("A long story:", SamplingParams(max_tokens=2000, temperature=0.0, ignore_eos=True))
        warming = engine.warm(DOCUMENTS, background=True)
        until(lambda: warming.progress.state == "paused")
        assert not request.done()
        assert warming.progress.done == 0
        with pytest.raises(RequestTimeout, match="it goes on"):
            warming.wait(0.01)
        request.cancel()
        assert warming.wait(60).warmed == len(DOCUMENTS)


def test_an_open_gang_is_somebody_who_asks(tmp_path: Path) -> None:
    with make(tmp_path) as engine:
        with engine.gang(2, 60):
            warming = engine.warm(DOCUMENTS, background=True)
            until(lambda: warming.progress.state == "paused")
            assert warming.progress.done == 0
        assert warming.wait(60).warmed == len(DOCUMENTS)


def test_answers_are_the_same_as_without(tmp_path: Path) -> None:
    def answers(engine: LayerStream) -> list[list[int]]:
        return [
            list(engine.submit(f"Question {number} about {DOCUMENTS[number]}", PARAMS).result(60).token_ids)
            for number in range(4)
        ]

    with make(tmp_path / "alone") as engine:
        alone = answers(engine)
    with make(tmp_path / "beside") as engine:
        warming = engine.warm(DOCUMENTS, background=True)
        assert answers(engine) == alone
        warming.wait(60)


def test_cancelled_it_keeps_what_is_stored_and_goes_on_later(tmp_path: Path) -> None:
    with make(tmp_path) as engine:
        reached = threading.Event()
        warming = engine.warm(DOCUMENTS, background=True, on_document=lambda done, _: done >= 2 and reached.set())
        assert reached.wait(60)
        warming.cancel()
        warming.cancel()
        report = warming.wait(60)
        assert warming.progress.state in ("cancelled", "done")
        left = engine.forecast_warm(DOCUMENTS)
        assert left.missing_tokens <= report.forecast.missing_tokens - report.computed_tokens
        assert engine.warm(DOCUMENTS).computed_tokens == left.missing_tokens


@pytest.mark.parametrize("at", [0, 1, 3])
def test_closing_the_engine_ends_it(tmp_path: Path, at: int) -> None:
    engine = make(tmp_path)
    reached = threading.Event()
    warming = engine.warm(DOCUMENTS, background=True, on_document=lambda done, _: done >= at and reached.set())
    assert reached.wait(60)
    engine.close()
    assert warming.done()
    assert not any(thread.name == "layerstream-warming" for thread in threading.enumerate())
    try:
        warming.wait(0)
    except EngineClosed:
        assert warming.progress.state == "cancelled"
    with pytest.raises(EngineClosed):
        engine.warm(DOCUMENTS, background=True)


def test_it_may_close_the_engine_itself(tmp_path: Path) -> None:
    engine = make(tmp_path)
    warming = engine.warm(DOCUMENTS, background=True, on_document=lambda done, _: done and engine.close())
    with pytest.raises(EngineClosed):
        warming.wait(60)


def test_an_error_in_it_is_its_own(tmp_path: Path) -> None:
    def fail(done: int, count: int) -> None:
        if done:
            raise RuntimeError("mine")

    with make(tmp_path) as engine:
        warming = engine.warm(DOCUMENTS, background=True, on_document=fail)
        with pytest.raises(RuntimeError, match="mine"):
            warming.wait(60)
        assert isinstance(warming.exception(), RuntimeError)
        assert warming.progress.state == "failed"
        assert engine.generate(["And now?"], PARAMS)[0].token_ids
        assert engine.warm(DOCUMENTS).warmed == len(DOCUMENTS)


def test_where_nothing_fits_it_does_not_begin(tmp_path: Path) -> None:
    with make(tmp_path) as engine, pytest.raises(StorageFull, match="raise the budget"):
        engine.warm(DOCUMENTS, background=True, budget=1000)


def test_a_short_queue_is_no_reason_to_fail(tmp_path: Path) -> None:
    with make(tmp_path, max_queued=2) as engine:
        assert engine.warm(DOCUMENTS, background=True).wait(60).warmed == len(DOCUMENTS)


def end(engine: LayerStream, how: str) -> Warming:
    """Warming with *engine* that has ended."""
    reached = threading.Event()

    def on_document(done: int, count: int) -> None:
        reached.set()
        if how == "failed" and done and engine:  # what a caller is told of may know the engine
            raise RuntimeError("mine")

    warming = engine.warm(DOCUMENTS, background=True, on_document=on_document)
    assert reached.wait(60)
    if how == "cancelled":
        warming.cancel()
    elif how == "closed":
        engine.close()
    until(warming.done)
    return warming


@pytest.mark.parametrize("how", ["done", "cancelled", "failed", "closed"])
def test_once_it_is_over_its_handle_keeps_no_engine(tmp_path: Path, how: str) -> None:
    engine = make(tmp_path)
    try:
        warming = end(engine, how)
        assert warming.progress.documents == len(DOCUMENTS)
        if how == "failed":
            error = warming.exception()
            assert error is not None
            assert "in on_document" in error.__notes__[0], "where it was raised"
        said = repr(warming)
    finally:
        engine.close()
    kept = [weakref.ref(engine), weakref.ref(engine._parts.scheduler)]
    del engine
    gc.collect()
    assert [ref() for ref in kept] == [None, None]
    assert repr(warming) == said
    warming.cancel()
