"""What a model does with its cache, its masks and its modules, as :mod:`layerstream.model.trace` finds it out. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from layerstream.core.sight import Sight
from layerstream.kv.shape import PageShape, StateShape
from layerstream.model.turning import Turn


@dataclass(frozen=True, slots=True)
class Recurrent:
    """The mixer of a layer: its path, and the state that it keeps for a sequence."""

    path: str
    shape: StateShape


@dataclass(frozen=True, slots=True)
class LayerTrace:
    """What attention does in one layer, and its mixer.

    Attributes:
        path: of the module that attends; ``""``: none does.
        kept: what it caches for a token; ``None``: nothing, it reads what another layer cached, or does not attend.
        state: of the layers that cache, the number of the one that it attends to; -1: it does not attend.
        recurrent: its mixer; ``None``: it has none.
        window: it sees as many positions, its own included; ``None``: all before it.
        chunk: it sees positions of its own chunk of so many; ``None``: of all.
        expands: what it attends to is made of what is cached, of past rows too: one sequence at a time.
        counts: it asks the cache where its rows are: one sequence at a time.
        turn: how the keys that it caches are rotated to their positions; ``None``: they are not.
        is_movable: whether that is known.
    """

    path: str = ""
    kept: PageShape | None = None
    state: int = -1
    window: int | None = None
    chunk: int | None = None
    expands: bool = False
    counts: bool = False
    recurrent: Recurrent | None = None
    turn: Turn | None = None
    is_movable: bool = True

    @property
    def is_alone(self) -> bool:
        """Whether it runs for one sequence at a time."""
        return self.expands or self.counts

    @property
    def sight(self) -> Sight:
        """What a row sees."""
        return Sight(self.window, self.chunk)

    @property
    def values(self) -> int:
        """Numbers that it caches for a token."""
        kept = self.kept
        return 0 if kept is None else kept.key_heads * kept.key_width + kept.value_heads * kept.value_width


@dataclass(frozen=True, slots=True)
class Trace:
    """What a decoder does.

    Attributes:
        layers: what attention does in each.
        order: the place of each of its modules, by path, in the order in which they run.
        lists: paths of modules that never run themselves, and whose parts do: lists of modules.
        mingled: paths of modules that call other methods of their parts than ``forward``, so that they compute between
            the parts of their parts.
        top_k: by path of a module of experts, how many of them a row is routed to.
        copies: hidden states that are kept apart for a row.
        paths: of the layers, each with all that it computes.
        idle: paths of modules that never run, because the mixer that they are parts of uses their weights itself.
    """

    layers: tuple[LayerTrace, ...]
    order: Mapping[str, int]
    lists: frozenset[str]
    mingled: frozenset[str]
    top_k: Mapping[str, int]
    copies: int = 1
    paths: tuple[str, ...] = ()
    idle: frozenset[str] = frozenset()

    def layer_at(self, path: str) -> int | None:
        """Number of the layer that the module *path* is; ``None``: it is none."""
        return next((at for at, layer in enumerate(self.paths) if layer == path), None)

    def attends_in(self, path: str) -> bool:
        """Whether attention, or a mixer, is below the module *path*."""
        inside = f"{path}."
        return any(
            layer.path.startswith(inside) or (layer.recurrent is not None and layer.recurrent.path.startswith(inside))
            for layer in self.layers
        )

    @property
    def mixers(self) -> frozenset[str]:
        """Paths of the mixers."""
        return frozenset(layer.recurrent.path for layer in self.layers if layer.recurrent is not None)

    @property
    def recurrent(self) -> list[int]:
        """The layers with a mixer, in order: numbers of their slots' memory are positions in it."""
        return [number for number, layer in enumerate(self.layers) if layer.recurrent is not None]

    @property
    def keepers(self) -> list[int]:
        """The layers that cache, in order: numbers of states are positions in it."""
        return [number for number, layer in enumerate(self.layers) if layer.kept is not None]

    @property
    def lasting(self) -> frozenset[int]:
        """States that later layers attend to as well."""
        return frozenset(layer.state for layer in self.layers if layer.path and layer.kept is None)

    @property
    def is_alone(self) -> bool:
        """Whether a row block may have rows of one sequence only."""
        return any(layer.is_alone for layer in self.layers)
