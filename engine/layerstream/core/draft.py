"""A :class:`DraftTree`: guessed continuations of a sequence, to be verified in the sweep that carries them.

Lossless by construction: at each node the next token is drawn from the model's own distribution, exactly as without a
draft; if it is one of the node's children its row has been computed already, and the walk goes on there. What a tree
says can make a sweep bring more tokens, never other ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

ROOT = -1
"""Stands for the sequence's newest token, which the tree hangs from."""


@dataclass(frozen=True)
class DraftTree:
    """Node *i* guesses that ``token_ids[i]`` follows node ``parents[i]``.

    Attributes:
        token_ids: one per node, in depth-first order: a node's subtree is what follows it.
        parents: :data:`ROOT`, or a smaller number than the node's own.
        sources: which drafter guessed it.
    """

    token_ids: tuple[int, ...]
    parents: tuple[int, ...]
    sources: tuple[str, ...]

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.parents) == len(self.sources)
        assert all(ROOT <= parent < node for node, parent in enumerate(self.parents)), "a parent comes first"

    def __len__(self) -> int:
        return len(self.token_ids)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """How many tokens each node is past the root."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """For each node the nodes from the root's child to itself."""
        paths: list[tuple[int, ...]] = []
        for node, parent in enumerate(self.parents):
            paths.append((node,) if parent == ROOT else (*paths[parent], node))
        return tuple(paths)

    @cached_property
    def last_children(self) -> dict[int, int]:
        """The last child of each node that has one; the root is among them."""
        return {parent: node for node, parent in enumerate(self.parents)}

    @cached_property
    def _children(self) -> dict[tuple[int, int], int]:
        return {(parent, token): node for node, (parent, token) in enumerate(zip(self.parents, self.token_ids))}  # noqa: B905

    def child(self, node: int, token_id: int) -> int | None:
        """The child of *node* that guesses *token_id*."""
        return self._children.get((node, token_id))

    def along(self, token_ids: Iterable[int]) -> list[int]:
        """The nodes that guess *token_ids*, one after the other, as far as there are any."""
        found: list[int] = []
        node = ROOT
        for token in token_ids:
            child = self.child(node, token)
            if child is None:
                break
            found.append(child)
            node = child
        return found
