"""Processes that die, disks that fill, clocks that jump: nothing wrong is served, nothing good is lost."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from layerstream import KVStoreConfig, LayerStream, SamplingParams
from layerstream.store import leases
from layerstream.store.index import Index
from layerstream.store.leases import LEASE_SECONDS
from layerstream.store.tiers.folder import Bounds

from tests.harness import draw_prompt
from tests.programs import Program, run_program
from tests.store.pages import chain, expected, new_pages, open_tier, read_back

ROOT = Path(__file__).parents[2]
PROMPT = draw_prompt(300)
CACHED = 288


def test_killed_at_every_step_of_writing(tmp_path: Path) -> None:
    done = run_program(ROOT / "tests" / "store" / "kill_at_every_step.py", tmp_path / "kv", cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 30, "steps"


def program(model: Path, store: Path, before: str = "") -> str:
    return f"""
import json, sys
from layerstream import KVStoreConfig, LayerStream, SamplingParams
{before}
store = KVStoreConfig({str(store)!r}, load="always", max_bytes="1GiB", min_free_bytes=0)
with LayerStream({str(model)!r}, kv_store=store, dtype="float32", progress=False) as engine:
    print("ready", flush=True)
    sys.stdin.readline()
    answer = engine.generate([{PROMPT!r}], SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))[0]
    engine._parts.store.flush()
    stats = engine.stats().kv
    print(json.dumps([answer.usage.cached_tokens, answer.token_ids, stats.written_pages, stats.skipped_pages]))
"""


def test_eight_processes_prefill_once(model: Path, tmp_path: Path) -> None:
    one_thread = "import torch; torch.set_num_threads(1)"
    processes = [Program(program(model, tmp_path / "kv", one_thread)) for _ in range(8)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [json.loads(process.finish().stdout) for process in processes]
    assert sorted(answer[0] for answer in answers) == [0] + [CACHED] * 7
    assert len({tuple(answer[1]) for answer in answers}) == 1
    assert sum(answer[2] for answer in answers) == CACHED // 16


def test_two_engines_of_one_process_prefill_once(model: Path, tmp_path: Path) -> None:
    store = KVStoreConfig(tmp_path / "kv", load="always", min_free_bytes=0)
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    with LayerStream(model, kv_store=store) as one, LayerStream(model, kv_store=store) as two:
        found: list[int] = []

        def ask(engine: LayerStream) -> None:
            found.append(engine.generate([PROMPT], params)[0].usage.cached_tokens)

        threads = [threading.Thread(target=ask, args=(engine,)) for engine in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert sorted(found) == [0, CACHED]


def test_the_owner_of_a_lease_is_killed(model: Path, tmp_path: Path) -> None:
    """Whoever waits for it goes on alone."""
    claim = """
import os, signal
from layerstream.store.store import PrefixStore
PrefixStore.publish = lambda self, published, seconds: os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run_program(program(model, tmp_path / "kv", claim), said="go\n").returncode == -9
    done = run_program(program(model, tmp_path / "kv"), said="go\n")
    assert json.loads(done.stdout.splitlines()[-1])[0] == 0


def test_files_cannot_grow(model: Path, tmp_path: Path) -> None:
    """The kernel refuses to write (as on a full disk): the answer comes, nothing half-written stays."""
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))"
    (tmp_path / "kv").mkdir(mode=0o700)
    done = run_program(program(model, tmp_path / "kv", limited), said="go\n")
    assert done.returncode == 0, done.stderr[-2000:]
    cached, tokens, written, _ = json.loads(done.stdout.splitlines()[-1])
    assert (cached, written) == (0, 0)
    assert not [*(tmp_path / "kv").glob("*/*.kv"), *(tmp_path / "kv").glob("*/*.tmp")]
    again = run_program(program(model, tmp_path / "kv"), said="go\n")
    assert json.loads(again.stdout.splitlines()[-1])[1] == tokens


def test_too_little_free_space_stores_nothing(tmp_path: Path) -> None:
    tier = open_tier(tmp_path / "kv", bounds=Bounds(2**40, 2**60))
    assert tier.put(new_pages(chain(1, 2))) == 0
    assert not tier.contains(chain(1))
    assert not [*tmp_path.rglob("*.kv")]


def test_room_is_made_for_what_is_new(tmp_path: Path) -> None:
    size = open_tier(tmp_path / "a").put(new_pages(chain(1)))
    tier = open_tier(tmp_path / "b", bounds=Bounds(2 * size + 64 * 1024, 0))
    for number in range(5):
        assert tier.put(new_pages(chain(number))) > 0
    assert [len(tier.contains(chain(number))) for number in range(5)] == [0, 0, 0, 1, 1]
    tier.pin(chain(3))
    tier.put(new_pages(chain(9)))
    tier.put(new_pages(chain(10)))
    assert len(tier.contains(chain(3))) == 1, "pinned"


def test_what_is_used_stays(tmp_path: Path) -> None:
    size = open_tier(tmp_path / "a").put(new_pages(chain(1)))
    tier = open_tier(tmp_path / "b", bounds=Bounds(2 * size + 64 * 1024, 0))
    tier.put(new_pages(chain(1)))
    tier.put(new_pages(chain(2)))
    read_back(tier, chain(1))
    tier.tick()
    tier.put(new_pages(chain(3)))
    assert (len(tier.contains(chain(1))), len(tier.contains(chain(2)))) == (1, 0)


def test_a_segment_that_is_being_read_stays(tmp_path: Path) -> None:
    """Another process evicts; the reader's lock keeps the file."""
    size = open_tier(tmp_path / "a").put(new_pages(chain(1)))
    reader = open_tier(tmp_path / "b")
    reader.put(new_pages(chain(1)))
    runs = reader.open(chain(1))
    other = f"""
from tests.store.pages import *
tier = open_tier(Path({str(tmp_path / "b")!r}), bounds=Bounds({size + 64 * 1024}, 0))
print(tier.put(new_pages(chain(2))))
"""
    done = run_program(other, cwd=ROOT)
    assert done.stdout == "0\n", "there was nothing that it could evict"
    data = runs[0]._segment.path.read_bytes()  # type: ignore[attr-defined]
    assert data.startswith(expected(chain(1)[0], 0))


class TestLeases:
    """Who computes what."""

    @pytest.fixture
    def pair(self, tmp_path: Path) -> tuple[Index, Index]:
        return Index(tmp_path / "i"), Index(tmp_path / "i")

    def test_one_at_a_time(self, pair: tuple[Index, Index]) -> None:
        one, two = pair
        keys = chain(1, 2, 3)
        assert one.leases.claim(1, keys)
        assert one.leases.claim(1, keys), "again, by the same"
        assert not two.leases.claim(1, keys)
        assert not two.leases.claim(1, keys[1:])
        assert two.leases.claim(2, keys), "another namespace"
        one.leases.unclaim(1, keys)
        assert two.leases.claim(1, keys)

    def test_an_owner_that_does_not_renew_loses_it(
        self, pair: tuple[Index, Index], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one, two = pair
        one.leases.claim(1, chain(1))
        now = time.time()
        monkeypatch.setattr(leases.time, "time", lambda: now + LEASE_SECONDS - 1)
        one.leases.renew()
        monkeypatch.setattr(leases.time, "time", lambda: now + LEASE_SECONDS + 5)
        assert not two.leases.claim(1, chain(1))
        monkeypatch.setattr(leases.time, "time", lambda: now + 2 * LEASE_SECONDS)
        assert two.leases.claim(1, chain(1))

    def test_a_clock_that_jumps_back(self, pair: tuple[Index, Index], monkeypatch: pytest.MonkeyPatch) -> None:
        one, two = pair
        one.leases.claim(1, chain(1))
        now = time.time()
        monkeypatch.setattr(leases.time, "time", lambda: now - 10**6)
        assert two.leases.claim(1, chain(1)), "a lease from the far future runs no more"

    def test_closing_gives_leases_back(self, pair: tuple[Index, Index]) -> None:
        one, two = pair
        one.leases.claim(1, chain(1))
        one.close()
        assert two.leases.claim(1, chain(1))


def test_a_clock_that_jumps_back_evicts_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = open_tier(tmp_path / "a").put(new_pages(chain(1)))
    tier = open_tier(tmp_path / "b", bounds=Bounds(2 * size + 64 * 1024, 0))
    now = time.time()
    for number in range(4):
        monkeypatch.setattr(leases.time, "time", lambda number=number: now - 10**6 * number)
        tier.put(new_pages(chain(number)))
    assert [len(tier.contains(chain(number))) for number in range(4)] == [0, 0, 1, 1], "the oldest went, all the same"
