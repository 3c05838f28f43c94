"""The trace: spans of threads and of devices on one clock."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

from layerstream.hardware.timeline import Timeline

from tests.pretend import PretendMark


def test_spans_of_threads_and_of_a_device_are_on_one_clock(tmp_path: Path) -> None:
    timeline = Timeline()
    began = time.perf_counter()
    base, start, stop = PretendMark(), PretendMark(), PretendMark()
    base.reach()
    timeline.set_base(base)
    timeline.set_base(PretendMark())  # the first one counts
    time.sleep(0.01)
    start.reach()
    time.sleep(0.02)
    stop.reach()
    timeline.add_marks("copy", "unit 1", start, stop, 100)
    timeline.add("compute", "unit 0", began, time.perf_counter(), 50)
    first, second = timeline.spans()
    assert (first.track, second.track) == ("compute", "copy")
    assert first.start <= second.start
    assert 0.015 < second.stop - second.start < 0.2
    assert second.stop <= first.stop + 0.01
    timeline.write_chrome(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"compute", "copy"}
    assert [event["args"]["bytes"] for event in events if event["ph"] == "X"] == [50, 100]


def test_many_threads_may_add() -> None:
    timeline = Timeline()
    threads = [
        threading.Thread(target=lambda: [timeline.add("t", "x", 0.0, 1.0) for _ in range(200)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(timeline.spans()) == 800
