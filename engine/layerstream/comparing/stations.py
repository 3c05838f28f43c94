"""Where the two sides are laid side by side: between decoder layers, and where a mixture's rows are sent to experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerstream.comparing.recording import Taps
from layerstream.model.module_sizes import is_fused_experts
from layerstream.model.skeleton import Skeleton


@dataclass(frozen=True, slots=True)
class Mixture:
    """A module that sends its rows to experts: its path, and theirs."""

    path: str
    experts: str


@dataclass(frozen=True, slots=True)
class Stations:
    """The modules of a model that are compared, by their paths.

    Attributes:
        chain: what a sweep passes between embedding and head, in order: each is given what the one before it gave.
        layers: those of them that add to what they are given: decoder layers.
        mixtures: in which of them there are experts.
    """

    embedding: str
    chain: tuple[str, ...]
    layers: frozenset[str]
    mixtures: tuple[Mixture, ...]
    head: str

    def after(self, path: str) -> str:
        """The name in a record of what *path*, one of the chain, gave: what the next one was given."""
        following = self.chain[self.chain.index(path) + 1 :]
        return f"{following[0]}:in" if following else f"{path}:out"

    def within(self, path: str, modules: list[str]) -> list[str]:
        """Of the paths *modules* those within *path* that are called once for all rows."""
        inside = [f"{mixture.experts}." for mixture in self.mixtures]
        return [one for one in modules if one.startswith(f"{path}.") and not one.startswith(tuple(inside))]

    def mixture_in(self, path: str) -> Mixture | None:
        """The one within *path*."""
        return next((mixture for mixture in self.mixtures if mixture.path.startswith(f"{path}.")), None)

    def tap(self, taps: Taps) -> None:
        """Have all that is compared filed."""
        for path in self.chain:
            taps.on_input(path)
        taps.on_output(self.chain[-1])
        for mixture in self.mixtures:
            taps.on_input(mixture.path)
            taps.on_routes(mixture.experts)

    def tap_inside(self, taps: Taps, modules: Sequence[str]) -> None:
        """Have all that the *modules* within a layer are given and give filed."""
        experts = {mixture.experts for mixture in self.mixtures}
        for path in modules:
            taps.on_input(path)
            taps.on_output(path)
            if path in experts:
                taps.on_routes(path)


def find_stations(skeleton: Skeleton) -> Stations:
    """Those of a model."""
    above = skeleton.embedding_key.rpartition(".")[0].rpartition(".")[0]
    norms = (f"{above}.{name}" for name, _ in skeleton.decoder.named_children() if "norm" in name)
    chain = tuple(dict.fromkeys([*(node.name for node in skeleton.body), *norms]))  # OLMo's norm has no weights
    found = (path for path, module in skeleton.model.named_modules() if is_fused_experts(module))
    mixtures = (Mixture(path.rpartition(".")[0], path) for path in found)
    return Stations(
        embedding=skeleton.embedding_key.rpartition(".")[0],
        chain=chain,
        layers=frozenset(node.name for node in skeleton.body if node.layer is not None),
        mixtures=tuple(mixture for mixture in mixtures if mixture.path not in chain),
        head=skeleton.head.name,
    )
