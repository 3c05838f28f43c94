"""Which weights stream together, and which never leave: pure decisions over a tree of sizes.

A *unit* is the smallest module whose weights stream together. Units are cut as coarse as the ring allows: a whole
decoder layer where it fits, else its attention and its MLP, else single Linears, else row slices of a Linear. What
is too small to be worth a place in the stream (norms, sinks, biases of a module that had to be cut) is pinned.

Residents are a *fixed* set: a cyclic scan through an LRU cache hits about 0 %, a fixed set hits exactly its share.
The head comes first: only sampled rows pass it, so it has the least compute for a read to hide behind. The others are
spread evenly over the sweep, so that the reader has something to hide behind everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from layerstream.core.sizes import PAGE

PIN_BELOW = 32 * 1024  # smaller units cost more in requests than they save in memory
UNIT_OVERHEAD = 4 * PAGE  # page alignment at both ends of a run of tensors; a unit is one run or two


@dataclass(frozen=True, slots=True)
class WeightNode:
    """Sizes of one module and of what is below it.

    Attributes:
        name: path of the module in the model, ``""`` for the root.
        own_bytes: stored bytes of the parameters and persistent buffers that the module itself owns.
        compute_bytes: the same in the dtype they are computed in.
        num_rows: output rows if the module is a Linear, which may be split by rows; else 0.
        row_step: it is split at multiples of so many; 0: it is never split.
        decode_bytes: what decoding takes if the module is a quantised Linear; its weights stay quantised. Such a Linear
            is a unit of its own.
        value_bytes: of such a Linear, decoded in the compute dtype.
        codec: how such a Linear is stored.
        kernel: that could multiply by it undecoded; ``""``: none.
        experts: path of the experts below it whose weights are not counted: they come as they are routed to. Such a
            block is a unit of its own.
        is_list: never runs itself; what is below it does.
        layer: its number among the decoder's layers; ``None``: it is none of them.
        children: modules below, in the order in which they run.
    """

    name: str
    own_bytes: int = 0
    compute_bytes: int = 0
    num_rows: int = 0
    row_step: int = 1
    decode_bytes: int = 0
    value_bytes: int = 0
    codec: str = ""
    kernel: str = ""
    experts: str = ""
    is_list: bool = False
    layer: int | None = None
    children: tuple[WeightNode, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Stored bytes of the whole subtree."""
        return self.own_bytes + sum(child.total_bytes for child in self.children)

    @property
    def total_compute_bytes(self) -> int:
        """Bytes of the whole subtree in the compute dtype."""
        return self.compute_bytes + sum(child.total_compute_bytes for child in self.children)

    @property
    def routes(self) -> bool:
        """Whether experts come as they are routed to, somewhere in the subtree."""
        return bool(self.experts) or any(child.routes for child in self.children)

    @property
    def most_decode_bytes(self) -> int:
        """What decoding takes at most, in the whole subtree; 0: nothing in it is quantised."""
        return max((child.most_decode_bytes for child in self.children), default=self.decode_bytes)


@dataclass(frozen=True, slots=True)
class ExpertsNode:
    """The experts of one block, of which a sweep needs those that its rows are routed to.

    Attributes:
        name: path of their module.
        num_experts: how many there are; *top_k*: how many of them a row is routed to.
        expert_bytes: one of them as it is stored.
        slot_bytes: room that it takes in memory at most.
        scratch_bytes: what computing with it takes beside it: converted or decoded.
        num_values: weights of one of them.
        codec: how its matrices are stored, if they are quantised; *kernel*: that multiplies by them as they are.
    """

    name: str
    num_experts: int
    top_k: int
    expert_bytes: int
    slot_bytes: int
    scratch_bytes: int
    num_values: int
    codec: str = ""
    kernel: str = ""


@dataclass(frozen=True, slots=True)
class PlannedUnit:
    """One unit: a module with all below it, its own weights alone (``own_only``), or rows of a Linear.

    ``stays_decoded``: quantised on disk, and resident in the compute dtype. ``experts``: path of the experts in the
    module that are not in the unit.
    """

    module: str
    num_bytes: int
    compute_bytes: int
    rows: tuple[int, int] | None = None
    own_only: bool = False
    pinned: bool = False
    decode_bytes: int = 0
    stays_decoded: bool = False
    experts: str = ""

    @property
    def name(self) -> str:
        """The module's path, with the row range if it is a slice."""
        return self.module if self.rows is None else f"{self.module}[{self.rows[0]}:{self.rows[1]}]"

    @property
    def converts(self) -> bool:
        """Whether the weights are stored in another dtype than they are computed in."""
        return not self.decode_bytes and self.num_bytes != self.compute_bytes

    @property
    def scratch_bytes(self) -> int:
        """What computing with it takes beside it."""
        return max(self.decode_bytes, self.compute_bytes if self.converts else 0)

    @property
    def ring_bytes(self) -> int:
        """Room that the unit takes in the ring at most."""
        return -(-(self.num_bytes + UNIT_OVERHEAD) // PAGE) * PAGE


@dataclass(frozen=True, slots=True)
class UnitPlan:
    """The units of body and head in the order a sweep passes them, and which of them stay.

    Attributes:
        body, head: planned units.
        residents: indices into ``units`` of those that never leave.
        ring_bytes: capacity of the ring; 0 if nothing streams.
        host_residents: for an accelerator, indices of those that never leave host memory.
        host_ring_bytes: capacity of the ring that the others pass through on their way from disk to it.
        expert_slots: experts that there is room for at a time, where they come as they are routed to.
        host_expert_slots: for an accelerator, as many in host memory, behind those.
        slot_bytes: room for one of them.
    """

    body: tuple[PlannedUnit, ...]
    head: tuple[PlannedUnit, ...]
    residents: frozenset[int]
    ring_bytes: int
    host_residents: frozenset[int] = frozenset()
    host_ring_bytes: int = 0
    expert_slots: int = 0
    host_expert_slots: int = 0
    slot_bytes: int = 0

    @property
    def units(self) -> tuple[PlannedUnit, ...]:
        """Body, then head."""
        return self.body + self.head

    @property
    def num_streamed(self) -> int:
        """Units that stream."""
        return len(self.units) - len(self.residents)

    @property
    def resident_bytes(self) -> int:
        """Weights that stay, in the compute dtype."""
        return sum(self.units[index].compute_bytes for index in self.residents)

    @property
    def expert_bytes(self) -> int:
        """Room for experts that come as they are routed to, and stay while it lasts."""
        return self.expert_slots * self.slot_bytes

    @property
    def streamed_bytes(self) -> int:
        """Weights that one sampling sweep moves to where they are computed with."""
        return sum(unit.num_bytes for index, unit in enumerate(self.units) if index not in self.residents)

    @property
    def disk_bytes(self) -> int:
        """Weights that one sampling sweep reads from disk."""
        staying = self.residents | self.host_residents
        return sum(unit.num_bytes for index, unit in enumerate(self.units) if index not in staying)


def cut_units(node: WeightNode, limit: int) -> list[PlannedUnit]:
    """Cut the subtree of *node* into units of at most *limit* bytes, as coarse as possible, in module order.

    A unit may still exceed *limit* where nothing is left to cut (fused experts); the caller compares
    :func:`largest_unit` with its ring and refuses.
    """
    return list(_cut(node, limit))


def largest_unit(units: Sequence[PlannedUnit]) -> int:
    """Ring bytes of the largest unit that is not pinned; 0 if there is none."""
    return max((unit.ring_bytes for unit in units if not unit.pinned), default=0)


def linears(node: WeightNode) -> Iterator[WeightNode]:
    """The quantised Linears in the subtree of *node*."""
    if node.value_bytes:
        yield node
    for child in node.children:
        yield from linears(child)


def _cut(node: WeightNode, limit: int) -> Iterator[PlannedUnit]:
    total, compute = node.total_bytes, node.total_compute_bytes
    if not total and not node.routes:
        return
    can_cut = node.children or (node.num_rows and node.row_step)
    is_whole = node.num_rows or not (node.most_decode_bytes or node.routes or node.is_list)
    if not can_cut or (total <= limit and is_whole):
        pinned, decode_bytes, experts = total < PIN_BELOW, node.decode_bytes, node.experts
        yield PlannedUnit(node.name, total, compute, pinned=pinned, decode_bytes=decode_bytes, experts=experts)
    elif node.children:
        if node.own_bytes:
            yield PlannedUnit(node.name, node.own_bytes, node.compute_bytes, own_only=True, pinned=True)
        for child in node.children:
            yield from _cut(child, limit)
    else:
        yield from slice_rows(node, limit)


def slice_rows(node: WeightNode, limit: int) -> Iterator[PlannedUnit]:
    """Slices of a Linear's output rows, of nearly equal size, each at most *limit* bytes (one row at least); the whole
    where it is never split."""
    if not node.row_step:
        yield PlannedUnit(node.name, node.own_bytes, node.compute_bytes, decode_bytes=node.decode_bytes)
        return
    row_bytes = -(-node.own_bytes // node.num_rows)
    most = max(1, limit // row_bytes)
    step = math.lcm(16, node.row_step)  # whole vector registers, where the limit allows it
    step = step if most >= step else node.row_step
    most = max(most, step)
    num_slices = -(-node.num_rows // (most // step * step))
    rows_each = -(-node.num_rows // (num_slices * step)) * step
    for first in range(0, node.num_rows, rows_each):
        last = min(first + rows_each, node.num_rows)
        share = (last - first) / node.num_rows
        yield PlannedUnit(
            node.name,
            round(node.own_bytes * share),
            round(node.compute_bytes * share),
            rows=(first, last),
            decode_bytes=node.decode_bytes,
        )


def choose_residents(sizes: Sequence[int], available_bytes: int, first: Sequence[int] = ()) -> frozenset[int]:
    """Indices of the units that stay, their sizes summing to at most *available_bytes*.

    All of them if they fit; else those of *first*, in order, and then the others in the van der Corput order, which
    spreads any number of picks evenly.
    """
    if sum(sizes) <= available_bytes:
        return frozenset(range(len(sizes)))
    chosen: set[int] = set()
    left, ahead = available_bytes, set(first)
    for index in [*first, *(index for index in _spread_order(len(sizes)) if index not in ahead)]:
        if sizes[index] <= left:
            chosen.add(index)
            left -= sizes[index]
    return frozenset(chosen)


def _spread_order(count: int) -> Iterator[int]:
    """0…count-1 in bit-reversed order: every prefix is spread evenly over the range."""
    bits = max(count - 1, 0).bit_length()
    for index in range(1 << bits):
        reversed_index = int(format(index, f"0{bits}b")[::-1], 2) if bits else 0
        if reversed_index < count:
            yield reversed_index
