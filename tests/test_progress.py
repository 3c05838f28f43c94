"""The progress line, with a clock that the test turns and a terminal that the test reads."""

from __future__ import annotations

import io
import re
import sys
import threading

import pytest
from layerstream.api.events import EngineIdle, Event, LoadProgress, SweepFinished, SweepStarted, UnitFinished
from layerstream.progress import COLUMNS, ProgressLine, make_listener

GB = 10**9


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """What a VT100 of a given height shows: enough of it for text, rows, erasing and a remembered cursor."""

    encoding = "utf-8"

    def __init__(self, height: int = 6) -> None:
        super().__init__()
        self.rows = [""] * height
        self.row = self.column = 0
        self.saved = (0, 0)
        self.widest = 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for token in re.findall(r"\x1b\[[0-9]*[A-Z]|\x1b.|[^\x1b]", text, re.DOTALL):
            self._take(token)
        self.widest = max(self.widest, *map(len, self.rows))
        return len(text)

    @property
    def shown(self) -> list[str]:
        """The rows down to the last one with text."""
        rows = [row.rstrip() for row in self.rows]
        while rows and not rows[-1]:
            rows.pop()
        return rows

    def _take(self, token: str) -> None:
        match token:
            case "\r":
                self.column = 0
            case "\n" | "\x1bD":
                self.row += 1
                self.column = 0 if token == "\n" else self.column
                if self.row == len(self.rows):
                    self.rows = [*self.rows[1:], ""]
                    self.row -= 1
            case "\x1b[A":
                self.row = max(0, self.row - 1)
            case "\x1b[B":
                self.row = min(len(self.rows) - 1, self.row + 1)
            case "\x1b7":
                self.saved = (self.row, self.column)
            case "\x1b8":
                self.row, self.column = self.saved
            case "\x1b[J":
                self.rows[self.row] = self.rows[self.row][: self.column]
                self.rows[self.row + 1 :] = [""] * (len(self.rows) - self.row - 1)
            case _:
                assert len(token) == 1, f"an escape that this terminal does not know: {token!r}"
                row = self.rows[self.row].ljust(self.column)
                self.rows[self.row] = row[: self.column] + token + row[self.column + 1 :]
                self.column += 1


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


@pytest.fixture
def line(terminal: Terminal, clock: Clock) -> ProgressLine:
    return ProgressLine(terminal, clock=clock)


def sweep(line: ProgressLine, clock: Clock, *, index: int = 0, units: int = 28, until: int | None = None) -> None:
    """A sweep of 6 GB in 1/8 s a unit, up to and including unit *until*."""
    line(SweepStarted(index, units, 1, 1, 6 * GB))
    for unit in range(units if until is None else until + 1):
        clock.now += 0.125
        line(UnitFinished(unit, units, 0))
    if until is None:
        line(SweepFinished(index, 0.125 * units, 1, 6 * GB))


def test_says_where_the_sweep_is(line: ProgressLine, clock: Clock, terminal: Terminal) -> None:
    sweep(line, clock)
    sweep(line, clock, index=1)
    sweep(line, clock, index=2, until=11)
    assert terminal.shown == ["", "sweep 3 · unit 12/28 · 1.7 GB/s · 2 tokens · next in 2.0 s"]


def test_waits_two_seconds(line: ProgressLine, clock: Clock, terminal: Terminal) -> None:
    sweep(line, clock, until=14)
    assert terminal.shown == []
    clock.now += 0.125
    line(UnitFinished(15, 28, 0))
    assert terminal.shown[-1].startswith("sweep 1 · unit 16/28")


def test_is_gone_when_the_engine_is_idle(line: ProgressLine, clock: Clock, terminal: Terminal) -> None:
    sweep(line, clock)
    line(EngineIdle())
    assert terminal.shown == []
    sweep(line, clock, index=1, until=22)
    assert terminal.shown[-1].startswith("sweep 1 · unit 23/28 · 1.7 GB/s · 0 tokens")  # it counts from the start again
    line.close()
    line.close()
    assert terminal.shown == []


def test_leaves_streamed_text_whole(line: ProgressLine, clock: Clock, terminal: Terminal) -> None:
    terminal.write("$ ask\nThe answer")
    sweep(line, clock)
    terminal.write(" is streamed")
    sweep(line, clock, index=1)
    assert terminal.shown[:2] == ["$ ask", "The answer is streamed"]
    assert terminal.shown[2].startswith("sweep 2 · unit 28/28")
    terminal.write(",\nrow by row.")
    sweep(line, clock, index=2, until=3)
    line.close()
    assert terminal.shown == ["$ ask", "The answer is streamed,", "row by row."]


def test_scrolls_on_the_last_row(line: ProgressLine, clock: Clock, terminal: Terminal) -> None:
    terminal.write("1\n2\n3\n4\n5\n6")
    sweep(line, clock)
    assert terminal.shown[:5] == ["2", "3", "4", "5", "6"]
    assert terminal.shown[5].startswith("sweep 1")
    line.close()
    assert terminal.shown == ["2", "3", "4", "5", "6"]


def test_fits_eighty_columns(line: ProgressLine, clock: Clock, terminal: Terminal) -> None:
    line(SweepStarted(10**7, 10**9, 1, 1, 10**15))
    clock.now += 10**6
    line(UnitFinished(10**8, 10**9, 0))
    assert terminal.shown[-1].startswith("sweep 1 · unit 100000001/1000000000 · ")
    assert terminal.widest <= COLUMNS < 80


def test_without_streaming_no_rate_is_claimed(line: ProgressLine, clock: Clock, terminal: Terminal) -> None:
    line(SweepStarted(0, 4, 1, 1, 0))
    clock.now += 3
    line(UnitFinished(2, 4, 0))
    assert terminal.shown[-1] == "sweep 1 · unit 3/4 · 0 tokens · next in 1.0 s"


def test_loading_has_a_line_too(line: ProgressLine, clock: Clock, terminal: Terminal) -> None:
    line(LoadProgress(0, 4 * 2**30))
    clock.now += 4
    line(LoadProgress(2 * 2**30, 4 * 2**30))
    assert terminal.shown[-1] == "loading · 2.0 GiB of 4.0 GiB · 537 MB/s · 4.0 s left"
    line(LoadProgress(4 * 2**30, 4 * 2**30))
    assert terminal.shown == []


def test_starts_no_thread(line: ProgressLine, clock: Clock) -> None:
    before = threading.active_count()
    sweep(line, clock)
    assert threading.active_count() == before


def test_events_from_several_threads(line: ProgressLine, clock: Clock, terminal: Terminal) -> None:
    clock.now += 5
    threads = [threading.Thread(target=sweep, args=(line, clock)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    line.close()
    assert terminal.shown == []


def test_auto_is_silent_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert make_listener("auto") is None
    assert make_listener(False) is None
    assert make_listener(True) is not None
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert make_listener("auto") is not None


def test_a_function_gets_the_events() -> None:
    seen: list[Event] = []
    listener = make_listener(seen.append)
    assert listener is not None
    listener(EngineIdle())
    assert seen == [EngineIdle()]


def test_a_listener_that_raises_is_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[Event] = []

    def broken(event: Event) -> None:
        calls.append(event)
        raise RuntimeError("no")

    listener = make_listener(broken)
    assert listener is not None
    listener(EngineIdle())
    listener(EngineIdle())
    assert calls == [EngineIdle()]
    assert [record.message for record in caplog.records] == ["the progress listener failed; it is switched off"]


def test_a_closed_stream_does_not_raise(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = Terminal()
    monkeypatch.setattr(sys, "stderr", closed)
    listener = make_listener("auto")
    assert listener is not None
    closed.close()
    closed.write = io.StringIO.write.__get__(closed)  # type: ignore[method-assign]  # raises: the file is closed
    listener(LoadProgress(0, 2))
    listener(EngineIdle())
