"""An accelerator where there is none: memory of its own, lanes that are late at random, and no mixing with the host.

``PretendDevice`` implements the engine's device out of threads. Its lanes do their work later, each after a random
pause, so that an order that nobody asked for shows as wrong bytes. ``PretendCuda`` does the same and hands out tensors
that say ``cuda`` and refuse to be computed with beside tensors of the host, or of another pretended device, so that
whatever the engine and transformers do on the device is checked operation by operation. As on a real one, a function of
single values gives each the same bits wherever it lies.
"""

from __future__ import annotations

import contextlib
import queue
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from layerstream.errors import ConfigurationError
from layerstream.hardware.accelerators import ACCELERATORS
from layerstream.hardware.arena import Arena
from layerstream.hardware.device import Accelerator
from layerstream.model import elementwise, ragged_kernels
from layerstream.planner import facts as assumed
from layerstream.planner import on_device
from layerstream.setup import plan_model as sizing
from torch.overrides import TorchFunctionMode

from tests import counting, pretend_bits, pretend_kernels
from tests.tape import Tape, refuse_waits


class PretendMark:
    def __init__(self) -> None:
        self._reached = threading.Event()
        self.time = 0.0

    def reach(self) -> None:
        self.time = time.perf_counter()
        self._reached.set()

    def wait(self) -> None:
        assert self._reached.wait(20), "a mark that nobody reaches"

    def is_reached(self) -> bool:
        return self._reached.is_set()

    def seconds_since(self, earlier: PretendMark) -> float:
        return self.time - earlier.time


class LateLane:
    """Work in order, on a thread, each piece after a pause."""

    def __init__(self, name: str, pause: float, seed: int) -> None:
        self._random = random.Random(seed)
        self._pause = pause
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], None]) -> None:
        self._queue.put(work)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target, source = _inner(target), _inner(source)
        assert target.numel() == source.numel()

        def work() -> None:
            time.sleep(self._random.random() * self._pause)
            target.copy_(source)

        self.run(work)

    def mark(self, *, timed: bool = False) -> PretendMark:
        mark = PretendMark()
        self.run(mark.reach)
        return mark

    def after(self, mark: PretendMark) -> None:
        self.run(mark.wait)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    @torch.inference_mode()  # as the thread that queued it
    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001  # the test looks at it
                self.error = error


class PromptLane:
    """The compute: done by the time that a call returns."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        _inner(target).copy_(_inner(source))

    def mark(self, *, timed: bool = False) -> PretendMark:
        mark = PretendMark()
        mark.reach()
        return mark

    def after(self, mark: PretendMark) -> None:
        mark.wait()


class PretendDevice:
    """Tensors of the host, and three lanes. *pinned_bytes* is the most that may be pinned."""

    def __init__(self, *, late_compute: bool, pause: float = 0.002, seed: int = 0, pinned_bytes: int = 2**40) -> None:
        self.torch_device = torch.device("cpu")
        self.inward = LateLane("inward", pause, seed)
        self.outward = LateLane("outward", pause, seed + 1)
        self.compute = LateLane("compute", pause, seed + 2) if late_compute else PromptLane()
        self.name = "pretended"
        self.allocated: list[int] = []
        self.pinned: dict[int, int] = {}
        self.ceiling: int | None = None
        self._pinned_bytes = pinned_bytes

    def use(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def allocate(self, num_bytes: int) -> torch.Tensor:
        self.allocated.append(num_bytes)
        return torch.full((num_bytes,), 0xA5, dtype=torch.uint8, device=self.torch_device)

    def pin(self, arena: Arena) -> None:
        if sum(self.pinned.values()) + arena.num_bytes > self._pinned_bytes:
            raise ConfigurationError("the system does not let so much memory be pinned: pass a smaller host_memory")
        self.pinned[id(arena)] = arena.num_bytes

    def unpin(self, arena: Arena) -> None:
        del self.pinned[id(arena)]

    def limit(self, num_bytes: int) -> None:
        self.ceiling = num_bytes

    def peak_bytes(self) -> int:
        return sum(self.allocated)

    def free_unused(self) -> None:
        pass

    def is_lost(self, error: BaseException) -> bool:
        return "device lost" in str(error)

    def close(self) -> None:
        lanes = [lane for lane in (self.inward, self.outward, self.compute) if isinstance(lane, LateLane)]
        for lane in lanes:
            lane.close()
        errors = [lane.error for lane in lanes if lane.error is not None]
        assert not errors, f"what a lane was to do it could not: {errors}"


class PretendCuda(PretendDevice):
    """``cuda:index``; threads that use it can make tensors there. Past the ceiling it is out of memory.

    Attributes:
        live_bytes, most_bytes: of storages that tensors there have.
    """

    def __init__(self, index: int = 0, **options: Any) -> None:
        super().__init__(late_compute=False, **options)
        self.torch_device = torch.device("cuda", index)
        self.live_bytes = self.most_bytes = 0
        _DEVICES[self.torch_device] = self

    def peak_bytes(self) -> int:
        return self.most_bytes

    def took(self, num_bytes: int) -> None:
        """A storage was made."""
        self.live_bytes += num_bytes
        self.most_bytes = max(self.most_bytes, self.live_bytes)
        if self.ceiling is not None and self.live_bytes > self.ceiling and self.is_strict:
            raise torch.OutOfMemoryError(f"pretended: {self.live_bytes} bytes of {self.ceiling}")

    is_strict = False

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]] | None:
        """*run* is called as the real one calls it; then what it did is done again, operator by operator, on the same
        tensors and into the same, and no Python of the model runs."""
        try:
            _PRETENDING.capture = Tape()
            run()
            tape = _PRETENDING.capture = Tape()
            found = run()
        finally:
            _PRETENDING.capture = None
        return found, tape.replay

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        if getattr(_PRETENDING, "depth", 0):
            yield
            return
        _PRETENDING.depth = 1
        try:
            with _Pretence():
                yield
        finally:
            _PRETENDING.depth = 0


class Pretended(Accelerator):
    """As many CUDA devices as *devices*, which ``device="auto"`` leaves alone."""

    name = "cuda"
    has_numbers = True
    packages = frozenset({"flash_attn", "bitsandbytes", "flash", "efficient"})

    def __init__(self, devices: list[PretendCuda]) -> None:
        self._devices = devices

    def num_devices(self) -> int:
        return len(self._devices)

    def check(self, device: torch.device) -> None:
        assert (device.index or 0) < len(self._devices), f"{device} is not pretended"

    def open(self, device: torch.device) -> PretendCuda:
        return self._devices[device.index or 0]

    def free_bytes(self, device: torch.device) -> int:
        return 2**40

    def synchronize(self, device: torch.device) -> None:
        """Its compute is done by the time that a call returns."""

    def name_of(self, device: torch.device) -> str:
        return self.open(device).name


_PRETENDING = threading.local()
_DEVICES: dict[torch.device, PretendCuda] = {}
_STORAGES: dict[tuple[torch.device, int], int] = {}  # tensors on each


def _count(tensor: torch.Tensor, inner: torch.Tensor, device: torch.device) -> None:
    """The device holds the storage of *inner* as long as a tensor like *tensor* has it."""
    holder, storage = _DEVICES.get(device), inner.untyped_storage()
    if holder is None:
        return
    key, num_bytes = (device, storage._cdata), storage.nbytes()
    _STORAGES[key] = _STORAGES.get(key, 0) + 1
    weakref.finalize(tensor, _let_go, key, num_bytes, holder)
    if _STORAGES[key] == 1:
        holder.took(num_bytes)


def _let_go(key: tuple[torch.device, int], num_bytes: int, holder: PretendCuda) -> None:
    _STORAGES[key] -= 1
    if not _STORAGES[key]:
        del _STORAGES[key]
        holder.live_bytes -= num_bytes


class _OnDevice(torch.Tensor):
    """A tensor of the host that says it is on *device*."""

    inner: torch.Tensor
    place: torch.device  # as ``device``, which torch asks this class's function for

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> _OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner = inner
        made.place = device
        _count(made, inner, device)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} reached a pretended tensor from below")


class _Pretence(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_MOVES = {"to", "cuda", "cpu"}
_CROSSES = {"copy_"}  # between host and device, as torch allows it
_READS = {"__repr__", "size", "dim", "stride", "numel", "is_contiguous", "storage_offset"}


def _inner(tensor: Any) -> Any:
    return tensor.inner if isinstance(tensor, _OnDevice) else tensor


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(func.__self__, "__name__", "")
        if name in {"device", "is_cuda", "is_cpu", "shape", "dtype", "ndim", "requires_grad", "layout", "is_meta"}:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
    if name in _READS:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if name in _MOVES and args and isinstance(args[0], torch.Tensor):
        return _move(name, args[0], args[1:], kwargs)
    wanted = kwargs.get("device")
    if wanted is not None:
        wanted = torch.device(wanted)
        if wanted.type != "cuda":
            wanted = None
        else:
            kwargs = {**kwargs, "device": "cpu"}
    tensors: list[torch.Tensor] = []
    args, kwargs = _unwrap(args, tensors), _unwrap(kwargs, tensors)
    there = [tensor for tensor in tensors if isinstance(tensor, _OnDevice)]
    is_crossing = name in _CROSSES
    if there and not is_crossing:
        _check_one_device(name, tensors, there)
    capture = getattr(_PRETENDING, "capture", None)
    if capture is not None and there:
        refuse_waits("copy_across" if is_crossing and len(there) < len(tensors) else name, args)
    device = wanted or (there[0].place if there else None)
    with _kernels(func, name, is_crossing and not all(isinstance(t, _OnDevice) for t in tensors), device is not None):
        found = func(*args, **kwargs)
    if capture is not None and (there or wanted):
        capture.note(func, args, kwargs, found)
    if device is None or (is_crossing and not isinstance(tensors[0], _OnDevice)):
        return found
    return _wrap(found, device, {id(tensor.inner): tensor for tensor in there})


@contextlib.contextmanager
def _kernels(func: Any, name: str, is_crossing: bool, is_there: bool) -> Iterator[None]:
    """*func* is called within, as a device computes it, and is counted as what a device is asked for."""
    if not is_there:
        yield
        return
    if is_crossing:
        counting.crossed()
    is_one = is_crossing or func in elementwise._STEADIED
    with elementwise.steady(), counting.one_launch(None if is_crossing else name) if is_one else counting.on_device():
        yield


def _unwrap(value: Any, tensors: list[torch.Tensor]) -> Any:
    """*value* with the host's tensors in place of pretended ones; all that it had are added to *tensors*."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _inner(value)
    if isinstance(value, dict):
        return {key: _unwrap(entry, tensors) for key, entry in value.items()}
    if type(value) in (tuple, list):
        return type(value)([_unwrap(entry, tensors) for entry in value])
    return value


def _wrap(value: Any, device: torch.device, known: dict[int, _OnDevice]) -> Any:
    """*value* with its tensors on *device*: those *known* by their inner one's id, the others anew."""
    if isinstance(value, torch.Tensor):
        return known[id(value)] if id(value) in known else _OnDevice(value, device)
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):  # a named one takes a sequence, too
        return type(value)([_wrap(entry, device, known) for entry in value])
    return value


def _check_one_device(name: str, tensors: list[torch.Tensor], there: list[_OnDevice]) -> None:
    if name in {"__getitem__", "__setitem__"} and isinstance(tensors[0], _OnDevice):
        tensors = [t for t in tensors if isinstance(t, _OnDevice) or t.dtype.is_floating_point]  # indices may be here
    places = {tensor.place for tensor in there}
    places |= {tensor.device for tensor in tensors if not isinstance(tensor, _OnDevice) and tensor.dim()}
    assert len(places) == 1, f"{name} with tensors on {sorted(map(str, places))}"


def _move(name: str, tensor: torch.Tensor, args: Any, kwargs: Any) -> torch.Tensor:
    device = torch.device("cpu") if name == "cpu" else tensor.device
    rest = []
    for value in (*args, kwargs.get("device")):
        if isinstance(value, str | torch.device):
            device = torch.device(value)
        elif isinstance(value, torch.Tensor):
            device = value.device
            rest.append(value.dtype)
        elif value is not None:
            rest.append(value)
    others = {key: value for key, value in kwargs.items() if key not in {"device", "non_blocking"}}
    inner = _inner(tensor)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    with counting.on_device() if isinstance(tensor, _OnDevice) else contextlib.nullcontext():
        found = inner.to(*rest, **others) if rest or others else inner
    if (capture := getattr(_PRETENDING, "capture", None)) is not None:
        if device != tensor.device:
            raise RuntimeError(f"a copy to {device}: operation not permitted when stream is capturing")
        capture.note(torch.Tensor.to, (inner, *rest), others, found)
    if device == tensor.device:
        if found is inner:
            return tensor
        return _OnDevice(found, device) if isinstance(tensor, _OnDevice) else found
    counting.crossed()
    found = found.clone() if found is inner else found
    return _OnDevice(found, device) if device.type == "cuda" else found


@contextlib.contextmanager
def pretend_cudas(monkeypatch: pytest.MonkeyPatch, count: int) -> Iterator[list[PretendCuda]]:
    """Engines with ``device="cuda"`` or a ``device_map`` compute on *count* pretended ones; small models stream to them
    as if they were large."""
    devices = [PretendCuda(index, pause=0.0005, seed=index) for index in range(count)]
    monkeypatch.setitem(ACCELERATORS, "cuda", Pretended(devices))
    monkeypatch.setattr(ragged_kernels, "_agrees", {})
    for name in ragged_kernels.KERNELS:
        monkeypatch.setitem(ragged_kernels.KERNELS, name, getattr(pretend_kernels, name))
    monkeypatch.setattr(sizing, "DEVICE_WORKSPACE_BYTES", 0)
    monkeypatch.setattr(on_device, "HOST_WORKSPACE_BYTES", 0)
    monkeypatch.setattr(assumed, "DEVICE_PROMPT_ROWS", 64)
    monkeypatch.setattr(assumed, "DEVICE_SWEEP_TOKENS", 96)
    monkeypatch.setattr(assumed, "DEVICE_ROWS", 32)
    pretend_bits.install(monkeypatch)
    yield devices
    for device in devices:
        device.close()


@contextlib.contextmanager
def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendCuda]:
    """The one of :func:`pretend_cudas`."""
    with pretend_cudas(monkeypatch, 1) as (device,):
        yield device
