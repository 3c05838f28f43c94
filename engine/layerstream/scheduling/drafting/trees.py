"""Grows draft trees: the most probable guesses of all drafters over all sequences, as many as a sweep has room for.

A node's probability is that of its path: each step is how often its drafter is right at such a place, as measured,
times the guess's share. Growing takes the most probable node next, so parents come first, and a tree is as deep or as
wide as its probabilities say. Where drafters guess the same token, the surer one counts, and both go on from there.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from layerstream.core.draft import ROOT, DraftTree
from layerstream.core.sequence import Sequence
from layerstream.scheduling.budget import SweepBudget
from layerstream.scheduling.drafting.acceptance import Acceptance
from layerstream.scheduling.drafting.base import Drafter

LEAST_PROBABILITY = 0.004


@dataclass(slots=True)
class _Node:
    """A guess on its way into a tree, or the sequence's newest token, where a tree begins.

    Attributes:
        path: the tokens from the root to here.
        states: of the drafters that made the guess.
        is_chosen: whether it is worth a row; ``number`` is then its place in the tree.
        places: what each drafter guessed here: its name, the kind of place, the tokens.
    """

    sequence: Sequence
    parent: _Node | None
    token_id: int
    probability: float
    source: str
    states: list[tuple[Drafter, Any]]
    path: tuple[int, ...]
    children: list[_Node] = field(default_factory=list)
    places: list[tuple[str, str, frozenset[int]]] = field(default_factory=list)
    is_chosen: bool = False
    number: int = ROOT


@dataclass(slots=True)
class DrafterCounters:
    """Guesses of one drafter that were verified, and those that were right."""

    drafted: int = 0
    accepted: int = 0


class TreeDrafting:
    """The drafters of an engine. What a sequence's grammar rules out enters no tree.

    Attributes:
        num_declined: times that guesses were there and no more of them were worth what they would take.
    """

    def __init__(self, drafters: Seq[Drafter], budget: SweepBudget) -> None:
        self.counters = {drafter.name: DrafterCounters() for drafter in drafters}
        self.num_declined = 0
        self._drafters = drafters
        self._budget = budget
        self._acceptance = Acceptance()
        self._numbers = itertools.count()
        self._places: dict[Sequence, dict[int, list[tuple[str, str, frozenset[int]]]]] = {}

    def propose(self, sequences: Seq[Sequence], num_decoded: int, num_prompt_tokens: int) -> dict[Sequence, DraftTree]:
        """Trees for some of *sequences*, beside *num_decoded* decode rows and *num_prompt_tokens* of prompts."""
        growing = [s for s in sequences if s.group is None and s.max_num_tokens - s.num_tokens > 1]
        for drafter in self._drafters:
            drafter.prepare(growing)
        roots = [root for sequence in growing if (root := self._root(sequence)) is not None]
        if not roots:
            return {}
        self._choose(roots, len(sequences), num_decoded, num_prompt_tokens)
        self._places = {}
        trees = {}
        for root in roots:
            if nodes := _number(root):
                trees[root.sequence] = DraftTree(
                    tuple(node.token_id for node in nodes),
                    tuple(node.parent.number if node.parent else ROOT for node in nodes),
                    tuple(node.source for node in nodes),
                )
                self._places[root.sequence] = {node.number: node.places for node in (root, *nodes)}
        return trees

    def learn(self, sequence: Sequence, tree: DraftTree, right: Seq[int], drawn: Seq[int]) -> None:
        """The sweep is over: nodes *right* of *tree* were right; *drawn* came after the root and after each of them."""
        accepted = set(right)
        for node, source in enumerate(tree.sources):
            self.counters[source].drafted += 1
            self.counters[source].accepted += node in accepted
        places = self._places.pop(sequence, {})
        for node, token in zip((ROOT, *right), drawn, strict=False):
            for drafter, kind, tokens in places.get(node, ()):
                self._acceptance.record(drafter, kind, token in tokens)

    def finish(self, sequence: Sequence) -> None:
        """*sequence* is a whole answer."""
        for drafter in self._drafters:
            drafter.finish(sequence)

    def forget(self, sequence: Sequence) -> None:
        """*sequence* is gone."""
        for drafter in self._drafters:
            drafter.forget(sequence)
        self._places.pop(sequence, None)

    def _root(self, sequence: Sequence) -> _Node | None:
        states = [(drafter, state) for drafter in self._drafters if (state := drafter.begin(sequence)) is not None]
        return _Node(sequence, None, ROOT, 1.0, "", states, ()) if states else None

    def _choose(self, roots: Seq[_Node], num_sequences: int, num_decoded: int, num_prompt_tokens: int) -> None:
        """Choose the nodes that are worth their rows, block by block; room in the last block costs nothing, unless
        every row brings weights of its own: then node by node."""
        budget, num_rows = self._budget, num_decoded
        step = 1 if budget.rows_read else budget.per_block
        room = 0 if budget.rows_read else budget.blocks_for(num_decoded) * step - num_decoded
        tokens = float(num_sequences)
        waiting: list[tuple[float, int, _Node]] = []
        for root in roots:
            self._expand(root, waiting)
        block: list[_Node] = []
        for left in range(budget.max_draft_rows - 1, -1, -1):
            if not waiting:
                return
            _, _, node = heapq.heappop(waiting)
            block.append(node)
            self._expand(node, waiting)
            if len(block) < (room or step) and waiting and left:
                continue
            more = sum(node.probability for node in block)
            if not room and not budget.is_worth(num_rows, len(block), num_prompt_tokens, tokens, more):
                self.num_declined += 1
                return
            tokens += more
            num_rows += len(block)
            for node in block:
                node.is_chosen = True
            block, room = [], 0

    def _expand(self, node: _Node, waiting: list[tuple[float, int, _Node]]) -> None:
        """Put the children of *node* among those *waiting*."""
        sequence = node.sequence
        if sequence.num_tokens + len(node.path) + 1 > min(sequence.tenancy.capacity, sequence.max_num_tokens - 1):
            return
        children: dict[int, _Node] = {}
        for drafter, state in node.states:
            found = drafter.expand(state)
            if not found.guesses:
                continue
            tokens = frozenset(guess.token_id for guess in found.guesses)
            node.places.append((drafter.name, found.kind, tokens))
            rate = self._acceptance.rate(drafter.name, found.kind, found.prior)
            for guess in found.guesses:
                probability = node.probability * rate * guess.share
                child = children.get(guess.token_id)
                if child is None:
                    path = (*node.path, guess.token_id)
                    child = _Node(sequence, node, guess.token_id, probability, drafter.name, [], path)
                    children[guess.token_id] = child
                elif probability > child.probability:
                    child.probability, child.source = probability, drafter.name
                child.states.append((drafter, guess.state))
        for child in children.values():
            if child.probability >= LEAST_PROBABILITY and _is_allowed(sequence, child.path):
                node.children.append(child)
                heapq.heappush(waiting, (-child.probability, next(self._numbers), child))


def _is_allowed(sequence: Sequence, path: tuple[int, ...]) -> bool:
    return sequence.constraint is None or sequence.constraint.admits(path)


def _number(root: _Node) -> list[_Node]:
    """The chosen descendants of *root*, depth first, the most probable first."""
    nodes: list[_Node] = []
    stack = [root]
    while stack:
        node = stack.pop()
        if node is not root:
            node.number = len(nodes)
            nodes.append(node)
        stack.extend(sorted((child for child in node.children if child.is_chosen), key=lambda c: c.probability))
    return nodes
