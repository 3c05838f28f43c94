"""KV on accelerators: pages have their place in host memory, and what is being computed with is on the device, too.

Where weights stream, a device holds the pages of the layers in hand, which take turns; where they do not, those of all
its layers stay. Host memory always has everything: the store, suspended sequences and accepted guesses know nothing of
devices.

A sweep, layer by layer (``inward``, ``compute`` and ``outward`` are lanes of the layer's device):

| when | what is queued |
|---|---|
| ``begin`` | pages of layer 0 that the sweep reads: inward |
| ``reach(i)`` | new rows of layer i - 1: outward; compute waits for layer i's pages; pages of layer i + 1: inward |
| ``end`` | new rows of the last layer: outward; the host waits for all of it |

Invariants:

* pages of layer i come in after compute and outward copies of the layer that had their place before;
* rows go out after the compute that made them, and the host reads none before ``end`` returned;
* a page on the device is used without being copied only if it was copied or computed there since the host's last
  change of it;
* layers are reached in order, one sweep at a time, on one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from layerstream.core.sweep import Span, Sweep
from layerstream.hardware.device import Device, Mark, Placement
from layerstream.kv.pages import LAYERS_IN_HAND
from layerstream.kv.shape import PageShape
from layerstream.kv.state import LayerState, PagedRows, runs

Wait: TypeAlias = Callable[[int], None]  # until the stored pages of this layer are on the host


@dataclass(frozen=True, slots=True)
class _Home:
    """Where a layer's pages are: a place on a device, its own or shared with other layers (``rides``)."""

    device: Device
    place: tuple[int, int]
    rides: bool


class DeviceKV:
    """The pages of *states* on the devices that compute them.

    Args:
        layers: those that cache; *states*: their KV in host memory, pinned.
        num_pages: how many pages there are.
        rides: for each device, keep the layers in hand only.
        lasting: positions in *layers* of those that later ones attend to as well; they do not take turns.
    """

    def __init__(
        self,
        placement: Placement,
        layers: Sequence[int],
        states: Sequence[LayerState],
        num_pages: int,
        page_tokens: int,
        rides: Sequence[bool],
        lasting: Collection[int] = (),
    ) -> None:
        self._devices = placement.devices
        self._page_tokens = page_tokens
        self._homes: list[_Home] = []
        places = [placement.layers[layer] for layer in layers]
        for number, at in enumerate(places):
            before = places[:number].count(at)
            takes_turns = rides[at] and number not in lasting
            place = at, before % LAYERS_IN_HAND if takes_turns else LAYERS_IN_HAND + before
            self._homes.append(_Home(placement.devices[at], place, takes_turns))
        self._memory: dict[tuple[int, int], torch.Tensor] = {}
        self.layers = [DeviceLayer(self, layer, state, num_pages, page_tokens) for layer, state in enumerate(states)]
        self._free: dict[tuple[int, int], Mark] = {}  # by place: nothing queued before touches it
        self._wait: Wait | None = None
        self._pages: list[int] = []
        self._spans: list[Span] = []
        self._arrived: dict[int, Mark] = {}
        self._reached = -1

    def begin(self, sweep: Sweep, wait: Wait | None) -> None:
        """Start a sweep; *wait* returns when the stored pages of a layer are on the host, if it has any.

        Raises:
            PagesLost: *wait* did.
        """
        self._wait = wait
        self._spans = [span for _, span in sweep.known_spans()]
        self._pages = sorted(_past_pages(self._spans, self._page_tokens))
        self._arrived.clear()
        self._reached = -1
        self._bring(0)

    def reach(self, layer: int) -> None:
        """The compute has come to *layer*.

        Raises:
            PagesLost: as in :meth:`begin`.
        """
        if layer <= self._reached:
            return
        if self._reached >= 0:
            self._send(self._reached)
        for skipped in range(self._reached + 1, layer + 1):  # layers that keep nothing of their own
            if skipped not in self._arrived:
                self._bring(skipped)
        self._reached = layer
        self._homes[layer].device.compute.after(self._arrived[layer])
        if layer + 1 < len(self.layers):
            self._bring(layer + 1)

    def end(self) -> None:
        """The sweep is over, and all that it computed is on the host when this returns."""
        if self._reached >= 0:
            self._send(self._reached)
        self._settle()

    def abort(self) -> None:
        """The sweep died: what it wrote is past what anybody reads, and nothing is under way any more."""
        self._settle()
        for layer in self.layers:
            layer.valid.clear()

    def place(self, layer: int, num_bytes: int) -> torch.Tensor:
        """Memory for *num_bytes* of *layer*, shared with the layers that take turns with it."""
        home = self._homes[layer]
        memory = self._memory.get(home.place)
        if memory is None or len(memory) < num_bytes:
            if memory is not None:
                self._settle()
            self._memory.pop(home.place, None)
            memory = self._memory[home.place] = home.device.allocate(num_bytes)
            home.device.inward.after(home.device.compute.mark())  # what was computed there before it was freed
        return memory

    def _settle(self) -> None:
        for device in self._devices:
            for lane in (device.inward, device.compute, device.outward):
                lane.mark().wait()
        self._reached = -1
        self._wait = None

    def _bring(self, layer: int) -> None:
        """Queue the pages of *layer* that the sweep reads and the device does not have."""
        if self._wait is not None:
            self._wait(layer)
        target, home = self.layers[layer], self._homes[layer]
        inward = home.device.inward
        if home.place in self._free:
            inward.after(self._free[home.place])
        if home.rides:
            target.valid.clear()
        state = target.host
        if state.shape is not None and self._pages:
            target.reserve(state.shape)
            missing = [page for page in self._pages if page not in target.valid]
            for first, count in runs(missing, -1):
                for there, here in zip(target.rows(first, count), state.rows(first, count), strict=True):
                    inward.copy(there, here)
            target.valid.update(missing)
        self._arrived[layer] = inward.mark()

    def _send(self, layer: int) -> None:
        """Queue the rows of *layer* that the sweep made."""
        source, home = self.layers[layer], self._homes[layer]
        state, outward = source.host, home.device.outward
        outward.after(home.device.compute.mark())
        if state.shape is not None:
            for span in self._spans:
                for page, rows, _ in source.pieces(span):
                    for there, here in zip(source.rows(page, 1), state.rows(page, 1), strict=True):
                        outward.copy(here[rows], there[rows])
                    source.valid.add(page)
        self._free[home.place] = outward.mark()


class DeviceLayer(PagedRows):
    """Keys and values of one layer on the device.

    Attributes:
        host: the same in host memory.
        valid: pages that are the same there and here.
    """

    def __init__(self, owner: DeviceKV, layer: int, host: LayerState, num_pages: int, page_tokens: int) -> None:
        super().__init__(page_tokens, num_pages)
        self.host = host
        self.valid: set[int] = set()
        host.on_change = self.valid.discard
        self._owner = owner
        self._layer = layer
        self._num_rows = num_pages * page_tokens
        self._tensors: tuple[torch.Tensor, torch.Tensor] | None = None

    def reserve(self, shape: PageShape) -> None:
        """Make room here and on the host."""
        self.host.reserve(shape)
        key_bytes, value_bytes = self._num_rows * shape.key_bytes, self._num_rows * shape.value_bytes
        memory = self._owner.place(self._layer, key_bytes + value_bytes)
        dtype = getattr(torch, shape.dtype)
        keys, values = memory[:key_bytes], memory[key_bytes : key_bytes + value_bytes]
        self._tensors = (
            keys.view(dtype).view(self._num_rows, shape.key_heads, shape.key_width),
            values.view(dtype).view(self._num_rows, shape.value_heads, shape.value_width),
        )
        self._has_room = True

    def rows(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of *count* neighbouring pages."""
        rows, (keys, values) = self._locate(first, count)
        return keys[rows], values[rows]

    def pieces(self, span: Span) -> Iterable[tuple[int, slice, slice]]:
        """The pages of *span*'s tokens, and their rows in each."""
        return self._pieces(span.sequence.pages, span.start, span.stop)

    def _locate(self, first: int, count: int) -> tuple[slice, tuple[torch.Tensor, torch.Tensor]]:
        assert self._tensors is not None, "no page was written yet"
        return slice(first * self._page_tokens, (first + count) * self._page_tokens), self._tensors


def _past_pages(spans: Iterable[Span], page_tokens: int) -> set[int]:
    """Pages with tokens before the first of their sequence in *spans*."""
    first: dict[int, Span] = {}
    for span in spans:
        known = first.get(id(span.sequence))
        if known is None or span.start < known.start:
            first[id(span.sequence)] = span
    return {page for span in first.values() for page in span.sequence.pages[: -(-span.start // page_tokens)]}
