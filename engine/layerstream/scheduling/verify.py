"""Which guesses were right: the walk down a draft tree along the tokens that are drawn."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

from layerstream.core.draft import ROOT, DraftTree

Draw = Callable[[int], tuple[Seq[int], bool]]


def verify(tree: DraftTree | None, draw: Draw) -> list[int]:
    """The nodes of *tree* that were right, a path from the root's child on.

    Args:
        draw: appends to the sequence what comes after a node (:data:`~layerstream.core.draft.ROOT`: its newest token):
            one token drawn from the model's own distribution there, and those that a grammar forces then. Returns them,
            and whether the sequence goes on.
    """
    right: list[int] = []
    node, goes_on = ROOT, True
    while goes_on:
        tokens, goes_on = draw(node)
        for token in tokens:
            child = None if tree is None else tree.child(node, token)
            if child is None:
                return right
            right.append(child)
            node = child
    return right
