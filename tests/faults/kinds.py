"""What may go wrong, and who may suffer from it.

| who | may fail, each with a typed error |
|---|---|
| nobody | all answers come, to the bit |
| one | for every operation that was hit, one request |
| present | whoever was there when the fault struck |
| named | those that the fault is about |

Later requests are answered rightly in any case (but for an engine that was closed).
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pytest
import torch
from layerstream import LayerStream, LayerStreamError, SamplingParams
from layerstream.api.events import Event
from layerstream.api.request import Request
from layerstream.store import maintenance
from layerstream.store.tiers.folder import StoreFolder

from tests.faults import wires
from tests.faults.trials import Trial
from tests.faults.wires import Planted, Tripwire
from tests.faults.world import PROMPTS, World, bits_of, params_of

Who: TypeAlias = Literal["nobody", "one", "present", "named"]


@dataclass(eq=False)
class Scene:
    """A trial under way.

    Attributes:
        store: the folder of the engine's store.
        requests: those submitted so far, in order.
        named: those that the fault is about.
        hooks: called with every event, on the engine's thread, until the fault is over.
        undo: called when the fault is over.
        wrong: what should not have been, a line each.
    """

    trial: Trial
    world: World
    store: Path
    patch: pytest.MonkeyPatch
    wire: Tripwire
    chance: random.Random
    requests: list[Request] = field(default_factory=list)
    named: set[Request] = field(default_factory=set)
    hooks: list[Callable[[Event], None]] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    _engine: LayerStream | None = None

    @property
    def engine(self) -> LayerStream:
        """The engine, once it is there."""
        assert self._engine is not None
        return self._engine

    @engine.setter
    def engine(self, engine: LayerStream) -> None:
        self._engine = engine

    def submit(self, number: int) -> Request:
        """Ask for prompt *number*."""
        request = self.engine.submit(PROMPTS[number], params_of(number))
        self.requests.append(request)
        return request

    def listen(self, event: Event) -> None:
        """The engine's listener."""
        for hook in list(self.hooks):
            hook(event)

    def at_event(self, act: Callable[[], None]) -> None:
        """*act* on the engine's thread, at the events that are hit."""

        def hook(event: Event) -> None:
            if self.wire.is_hit():
                act()

        self.hooks.append(hook)


@dataclass(frozen=True, slots=True)
class Kind:
    """A fault: *prepare* sets it up before the engine opens, *strike* brings it about while requests run.

    Attributes:
        closes: the engine is closed by it.
        kills: it is the process that dies, another one (:mod:`tests.faults.dying`).
    """

    who: Who
    prepare: Callable[[Scene], None] = lambda scene: None
    strike: Callable[[Scene], None] = lambda scene: None
    closes: bool = False
    kills: bool = False


def _is_weights(path: str) -> bool:
    return path.endswith(".safetensors")


def _is_segment(path: str) -> bool:
    return path.endswith(".kv")


def _reads(wanted: Callable[[str], bool], effect: wires.ReadEffect) -> Callable[[Scene], None]:
    return lambda scene: wires.on_reads(scene.patch, wanted, scene.wire, effect)


def _writes(act: Callable[[], None]) -> Callable[[Scene], None]:
    return lambda scene: wires.on_writes(scene.patch, scene.store, scene.wire, act)


def _statements(name: str) -> Callable[[Scene], None]:
    return lambda scene: wires.on_statements(scene.patch, scene.wire, wires.database_fails(name))


def _space_unknown(scene: Scene) -> None:
    wires.on_calls(scene.patch, shutil, "disk_usage", scene.wire, OSError(errno.EIO, "cannot be told"))


def _locked(scene: Scene) -> None:
    """Another process stops in the middle of a transaction."""
    connection = sqlite3.connect(scene.store / "index.sqlite", isolation_level=None, check_same_thread=False)
    connection.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(scene.chance.choice((0.05, 0.5)), _close, [connection])
    timer.start()
    scene.undo += [timer.join]


def _close(connection: sqlite3.Connection) -> None:
    with contextlib.suppress(sqlite3.Error):
        connection.close()


def _files(scene: Scene, pattern: str) -> list[Path]:
    return sorted(scene.store.glob(pattern))


def _delete_store(scene: Scene) -> None:
    shutil.rmtree(scene.store, ignore_errors=True)


def _delete_namespaces(scene: Scene) -> None:
    for path in _files(scene, "*/"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _delete_index(scene: Scene) -> None:
    for path in _files(scene, "index.sqlite*"):
        path.unlink(missing_ok=True)


def _index_files(scene: Scene, act: Callable[[Path], None]) -> None:
    for path in _files(scene, "index.sqlite*"):
        if not path.name.endswith("-shm"):  # cutting a file that is mapped ends the process, whoever mapped it
            with contextlib.suppress(FileNotFoundError):
                act(path)


def _empty_index(scene: Scene) -> None:
    _index_files(scene, lambda path: os.truncate(path, 0))


def _spoil_index(scene: Scene) -> None:
    _index_files(scene, lambda path: _overwrite(path, scene.chance.randbytes(path.stat().st_size)))


def _overwrite(path: Path, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.write(data)


def _drop_tables(scene: Scene) -> None:
    with contextlib.suppress(sqlite3.Error), contextlib.closing(_database(scene)) as connection:
        for table in ("answers", "pages", "leases", "segments", "namespaces", "clock"):
            if scene.chance.random() < 0.5:
                connection.execute(f"DROP TABLE IF EXISTS {table}")


def _database(scene: Scene) -> sqlite3.Connection:
    return sqlite3.connect(scene.store / "index.sqlite", isolation_level=None, timeout=1)


def _some_segments(act: Callable[[Scene, Path], None]) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        for path in _files(scene, "*/*.kv"):
            if scene.chance.random() < 0.5:
                with contextlib.suppress(FileNotFoundError):
                    act(scene, path)

    return strike


def _cut(scene: Scene, path: Path) -> None:
    os.truncate(path, scene.chance.randrange(path.stat().st_size))


def _turn_a_bit(scene: Scene, path: Path) -> None:
    with open(path, "r+b") as file:
        at = scene.chance.randrange(path.stat().st_size)
        file.seek(at)
        value = file.read(1)[0]
        file.seek(at)
        file.write(bytes([value ^ (1 << scene.chance.randrange(8))]))


def _clear_store(scene: Scene) -> None:
    with contextlib.closing(StoreFolder(scene.store)) as folder:
        for namespace in maintenance.summarise(folder):
            maintenance.clear(folder, namespace)


def _prune_store(scene: Scene) -> None:
    with contextlib.closing(StoreFolder(scene.store)) as folder:
        maintenance.prune(folder, 1)


def _share_store(scene: Scene) -> None:
    """Another engine uses the same store meanwhile, and goes."""
    mode, numbers = scene.trial.mode, (*scene.trial.late, *scene.trial.early)

    def live() -> None:
        with scene.world.engine(mode, scene.store, progress=False) as engine:
            for number in numbers:
                if bits_of(engine.generate([PROMPTS[number]], params_of(number))) != scene.world.right[mode][number]:
                    scene.wrong.append(f"the other engine answered prompt {number} wrongly")

    thread = threading.Thread(target=live)
    thread.start()
    scene.undo.append(thread.join)


def _clock_jumps(scene: Scene) -> None:
    original, jump = time.time, scene.chance.choice((-1e9, -1e5, -20.0, 20.0, 1e5, 1e9))
    scene.patch.setattr(time, "time", lambda: original() + jump)


def _listener_raises(scene: Scene) -> None:
    def act() -> None:
        raise Planted("a listener")

    scene.at_event(act)


def _callbacks_raise(scene: Scene) -> None:
    def callback(request: Request) -> None:
        raise Planted("a callback")

    for request in scene.requests:
        request.add_done_callback(callback)


def _cancel(scene: Scene) -> None:
    """Some are cancelled at an event, on the engine's thread or on another."""
    some = [request for request in scene.requests if scene.chance.random() < 0.6]
    scene.named.update(some)
    other = scene.chance.random() < 0.5

    def act() -> None:
        for request in some:
            if other:
                threading.Thread(target=request.cancel).start()
            else:
                request.cancel()

    scene.at_event(act)


def _time_out(scene: Scene) -> None:
    seconds = scene.chance.choice((1e-6, 1e-3, 0.01, 0.05))
    scene.named.add(request := scene.engine.submit(PROMPTS[8], SamplingParams(max_tokens=50), timeout=seconds))
    scene.requests.append(request)


def _leave(scene: Scene) -> None:
    """Whoever reads an answer as it comes walks away."""
    for _, text in zip(range(3), scene.engine.stream(PROMPTS[0], SamplingParams(max_tokens=200)), strict=False):
        assert text is not None


def _close_engine(scene: Scene) -> None:
    """From the caller's thread, from several, from the engine's own."""
    scene.named.update(scene.requests)
    where = scene.chance.choice(("here", "threads", "event", "callback"))
    if where == "here":
        time.sleep(scene.chance.choice((0, 0.005, 0.02)))
        scene.engine.close()
    elif where == "threads":
        threads = [threading.Thread(target=scene.engine.close) for _ in range(4)]
        for thread in threads:
            thread.start()
        scene.undo += [thread.join for thread in threads]
    elif where == "event":
        scene.at_event(scene.engine.close)
    else:
        for request in scene.requests:
            request.add_done_callback(lambda request: scene.engine.close())


HOSTILE: tuple[Callable[[LayerStream], Any], ...] = (
    lambda engine: engine.submit(PROMPTS[0], priority="high"),  # type: ignore[arg-type]
    lambda engine: engine.submit(PROMPTS[0], priority=None),  # type: ignore[arg-type]
    lambda engine: engine.submit(PROMPTS[0], priority=float("nan")),  # type: ignore[arg-type]
    lambda engine: engine.submit(PROMPTS[0], client=["alice"]),  # type: ignore[arg-type]
    lambda engine: engine.submit(PROMPTS[0], client={"id": 1}),  # type: ignore[arg-type]
    lambda engine: engine.submit(PROMPTS[0], client=None),  # type: ignore[arg-type]
    lambda engine: engine.submit(PROMPTS[0], timeout="soon"),  # type: ignore[arg-type]
    lambda engine: engine.submit(PROMPTS[0], timeout=float("nan")),
    lambda engine: engine.submit(PROMPTS[0], timeout=-1),
    lambda engine: engine.gang("2").__enter__(),  # type: ignore[arg-type]
    lambda engine: engine.gang(None).__enter__(),  # type: ignore[arg-type]
    lambda engine: engine.gang(0).__enter__(),
    lambda engine: engine.gang(2, float("nan")).__enter__(),
    lambda engine: engine.gang(2, "long").__enter__(),  # type: ignore[arg-type]
    lambda engine: engine.submit([5, -1, 6]),
    lambda engine: engine.submit([5, 10**9]),
    lambda engine: engine.submit([]),
    lambda engine: engine.submit(None),  # type: ignore[arg-type]
    lambda engine: engine.submit([[5], [6]]),  # type: ignore[list-item]
    lambda engine: engine.submit(PROMPTS[0], SamplingParams(max_tokens="many")),  # type: ignore[arg-type]
    lambda engine: engine.submit(PROMPTS[0], SamplingParams(temperature=float("nan"))),
    lambda engine: engine.submit(PROMPTS[0], SamplingParams(stop=[5])),  # type: ignore[list-item]
    lambda engine: engine.submit(PROMPTS[0], SamplingParams(stop_token_ids=["x"])),  # type: ignore[list-item]
    lambda engine: engine.submit(PROMPTS[0], SamplingParams(seed="s")),  # type: ignore[arg-type]
    lambda engine: engine.submit(PROMPTS[0], SamplingParams(response_format={"type": "json_schema", "schema": 5})),
    lambda engine: engine.submit(PROMPTS[0], "greedy"),  # type: ignore[arg-type]
    lambda engine: engine.submit(PROMPTS[7] * 50),
)
"""What no engine can do: each is refused where it enters."""


def _hostile(scene: Scene) -> None:
    for number in scene.chance.sample(range(len(HOSTILE)), 5):
        try:
            HOSTILE[number](scene.engine)
        except LayerStreamError:
            continue
        except Exception as error:  # noqa: BLE001  # whatever it is, it is no typed error
            scene.wrong.append(f"HOSTILE[{number}] was refused with {type(error).__name__}: {error}")
        else:
            scene.wrong.append(f"HOSTILE[{number}] was not refused")


def _planted(module: str, owner: str, name: str, error: Callable[[], BaseException]) -> Callable[[Scene], None]:
    """*owner*'s *name* breaks, in *module*."""

    def prepare(scene: Scene) -> None:
        found: Any = __import__(module, fromlist=["_"])
        found = getattr(found, owner) if owner else found
        wires.on_calls(scene.patch, found, name, scene.wire, error())

    return prepare


def _bug() -> BaseException:
    return Planted("a fault of the engine's own")


KINDS: dict[str, Kind] = {
    "weights: a read fails": Kind("present", _reads(_is_weights, wires.fails(errno.EIO))),
    "weights: the file ends": Kind("present", _reads(_is_weights, wires.ends)),
    "pages: a read fails": Kind("nobody", _reads(_is_segment, wires.fails(errno.EIO))),
    "pages: the file ends": Kind("nobody", _reads(_is_segment, wires.ends)),
    "pages: a bit is turned": Kind("nobody", _reads(_is_segment, wires.lies)),
    "store: the disk is full": Kind("nobody", _writes(wires.no_space)),
    "store: the disk is read-only": Kind("nobody", _writes(wires.read_only)),
    "store: free space unknown": Kind("nobody", _space_unknown),
    **{f"index: {name}": Kind("nobody", _statements(name)) for name in wires.DATABASE_ERRORS},
    "index: locked by another": Kind("nobody", strike=_locked),
    "index: deleted": Kind("nobody", strike=_delete_index),
    "index: emptied": Kind("nobody", strike=_empty_index),
    "index: overwritten": Kind("nobody", strike=_spoil_index),
    "index: tables dropped": Kind("nobody", strike=_drop_tables),
    "store: deleted": Kind("nobody", strike=_delete_store),
    "store: namespaces deleted": Kind("nobody", strike=_delete_namespaces),
    "segments: deleted": Kind("nobody", strike=_some_segments(lambda scene, path: path.unlink())),
    "segments: cut": Kind("nobody", strike=_some_segments(_cut)),
    "segments: a bit is turned": Kind("nobody", strike=_some_segments(_turn_a_bit)),
    "store: cleared by another": Kind("nobody", strike=_clear_store),
    "store: pruned by another": Kind("nobody", strike=_prune_store),
    "store: shared": Kind("nobody", strike=_share_store),
    "process: killed": Kind("nobody", kills=True),
    "clock: jumps": Kind("nobody", strike=_clock_jumps),
    "suspended answers: the disk fails": Kind("nobody", lambda scene: wires.on_swap(scene.patch, scene.wire)),
    "caller: a listener raises": Kind("nobody", strike=_listener_raises),
    "caller: callbacks raise": Kind("nobody", strike=_callbacks_raise),
    "caller: cancels": Kind("named", strike=_cancel),
    "caller: times out": Kind("named", strike=_time_out),
    "caller: walks away": Kind("nobody", strike=_leave),
    "caller: closes": Kind("named", strike=_close_engine, closes=True),
    "caller: asks for the impossible": Kind("nobody", strike=_hostile),
    "bug: sampling": Kind("one", _planted("layerstream.runtime.loop", "", "sample", _bug)),
    "bug: text": Kind("one", _planted("layerstream.text.detokenizer", "Detokenizer", "push", _bug)),
    "bug: the model": Kind("present", _planted("layerstream.model.runner", "SweepRunner", "run", _bug)),
    "bug: scheduling": Kind("present", _planted("layerstream.scheduling.scheduler", "Scheduler", "schedule", _bug)),
    "bug: committing": Kind("present", _planted("layerstream.scheduling.scheduler", "Scheduler", "commit", _bug)),
    "bug: guessing": Kind("nobody", _planted("layerstream.scheduling.drafting.trees", "TreeDrafting", "propose", _bug)),
    "memory: none left": Kind(
        "present",
        _planted("layerstream.model.runner", "SweepRunner", "run", lambda: torch.OutOfMemoryError("out of memory")),
    ),
}
