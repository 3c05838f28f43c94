"""Drafters and the trees that grow from them; no model runs."""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Seq

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layerstream.api.params import SamplingParams
from layerstream.core.draft import ROOT, DraftTree
from layerstream.core.sequence import Sequence
from layerstream.core.tenancy import Tenancy
from layerstream.scheduling.budget import SweepBudget
from layerstream.scheduling.drafting.acceptance import Acceptance
from layerstream.scheduling.drafting.answers import AnswerDrafter
from layerstream.scheduling.drafting.suffix import SuffixDrafter
from layerstream.scheduling.drafting.trees import TreeDrafting
from layerstream.scheduling.verify import verify

ENDLESS = 1e9  # seconds that a read takes: rows are free


def make(prompt: Seq[int], answer: Seq[int] = (), max_tokens: int = 50, number: int = 0) -> Sequence:
    tokens = [*prompt, *answer]
    params = SamplingParams(max_tokens=max_tokens)
    tenancy = Tenancy(num_computed=len(tokens) - 1, capacity=10_000)
    return Sequence(number, tokens, len(prompt), params, tenancy=tenancy)


def make_budget(rows: int = 64, read_seconds: float = ENDLESS, per_block: int = 16) -> SweepBudget:
    return SweepBudget(per_block, per_block, rows, lambda: read_seconds)


def grow(sequence: Sequence, rows: int = 64) -> DraftTree:
    return TreeDrafting([SuffixDrafter()], make_budget(rows)).propose([sequence], 1, 0)[sequence]


def chains(tree: DraftTree) -> set[tuple[int, ...]]:
    """The tokens of every path from the root's child to a node."""
    return {tuple(tree.token_ids[node] for node in path) for path in tree.paths}


def test_what_followed_before_is_guessed() -> None:
    tree = grow(make([1, 2, 3, 4, 5, 6, 7, 8, 9, 20, 21], [3, 4, 5]))
    assert (6, 7, 8, 9, 20, 21) in chains(tree)


def test_several_continuations_are_branches() -> None:
    tree = grow(make([5, 6, 1, 9, 9, 5, 6, 2, 9, 9, 5, 6, 3, 8, 8], [5, 6]))
    assert {(1,), (2,), (3,)} <= chains(tree)
    assert len({(parent, token) for parent, token in zip(tree.parents, tree.token_ids, strict=True)}) == len(tree)


def test_a_longer_agreement_comes_first() -> None:
    tree = grow(make([1, 2, 3, 70, 9, 8, 3, 71, 4, 3, 72, 9], [1, 2, 3]), rows=1)
    assert tree.token_ids == (70,)


def test_the_first_token_is_guessed_near_the_words_of_the_question() -> None:
    """31 32 33 stand for the entity that the question names; what follows it in the context is 500."""
    filler = list(range(100, 180))
    context = [*filler[:40], 31, 32, 33, 90, 500, 501, 502, *filler[40:]]
    tree = grow(make([*context, 7, 7, 31, 32, 33, 8]), rows=16)
    assert (500,) in chains(tree)


def test_nothing_to_repeat_guesses_nothing() -> None:
    assert not TreeDrafting([SuffixDrafter()], make_budget()).propose([make([1, 2, 3], [4])], 1, 0)


class Remembered:
    """A memory with one answer in it."""

    def __init__(self) -> None:
        self.kept: list[tuple[list[int], list[int]]] = []

    def recall(self, keys: Seq[bytes], num_prompt_tokens: int, tenant: str = "") -> list[list[int]]:
        return [[40, 41, 42, 900, 901, 902], [60, 61, 62, 800, 801]]

    def remember(self, keys: Seq[bytes], prompt: Seq[int], answer: Seq[int], tenant: str = "") -> None:
        self.kept.append((list(prompt), list(answer)))


def test_the_same_question_gets_its_answer_as_the_guess() -> None:
    memory = Remembered()
    drafting = TreeDrafting([SuffixDrafter(), AnswerDrafter(memory)], make_budget())
    sequence = make([1, 2, 3, 40, 41, 42])
    tree = drafting.propose([sequence], 0, 6)[sequence]
    assert (900, 901, 902) in chains(tree)
    assert "answers" in tree.sources
    sequence.token_ids += [900, 901]
    drafting.finish(sequence)
    assert memory.kept == [([1, 2, 3, 40, 41, 42], [900, 901])]


@given(
    st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=60), min_size=1, max_size=4),
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(1, 30),
)
def test_trees_keep_to_their_bounds(prompts: list[list[int]], rows: int, max_tokens: int, room: int) -> None:
    sequences = [make(prompt, [1], max_tokens, number) for number, prompt in enumerate(prompts)]
    for sequence in sequences:
        sequence.tenancy.capacity = sequence.num_tokens + room
    trees = TreeDrafting([SuffixDrafter()], make_budget(rows)).propose(sequences, len(sequences), 0)
    assert sum(map(len, trees.values())) <= rows
    for sequence, tree in trees.items():
        assert max(tree.depths) <= min(room, sequence.max_num_tokens - sequence.num_tokens - 1)
        assert len(tree._children) == len(tree), "no guess twice at one place"
        for node in range(1, len(tree)):  # depth first: a parent is the node before, or one of its ancestors
            before = tree.paths[node - 1]
            assert tree.parents[node] in (ROOT, *before)


@given(st.randoms(use_true_random=False))
def test_the_walk_takes_exactly_what_was_drawn(rng: random.Random) -> None:
    parents = [rng.randint(ROOT, node - 1) for node in range(12)]
    tokens, seen = [], set()
    for parent in parents:
        token = rng.choice([token for token in range(30) if (parent, token) not in seen])
        seen.add((parent, token))
        tokens.append(token)
    tree = DraftTree(tuple(tokens), tuple(parents), ("x",) * 12)
    drawn: list[int] = []
    asked: list[int] = []

    def draw(node: int) -> tuple[list[int], bool]:
        asked.append(node)
        children = [token for (parent, token) in seen if parent == node]
        own = rng.choice([*children, 99])
        drawn.append(own)
        return [own], True

    right = verify(tree, draw)
    assert [tree.token_ids[node] for node in right] == drawn[:-1], "the last one was no guess of the tree"
    assert asked == [ROOT, *right]


def test_rates_follow_what_is_seen() -> None:
    acceptance = Acceptance()
    assert acceptance.rate("context", "3", 0.5) == 0.5
    for _ in range(300):
        acceptance.record("context", "3", is_right=False)
    assert acceptance.rate("context", "3", 0.5) < 0.05
    for _ in range(600):
        acceptance.record("context", "3", is_right=True)
    assert acceptance.rate("context", "3", 0.5) > 0.9, "old trials fade"


class TestBudget:
    """What is free, and what is worth it."""

    def test_blocks_that_hide_behind_the_read_are_free(self) -> None:
        budget = make_budget(read_seconds=1.0)
        budget.observe(1, 0, 0.2)
        assert budget.is_worth(16, 16, 0, tokens=1.0, more_tokens=0.01)
        assert budget.is_worth(48, 16, 0, tokens=1.0, more_tokens=0.01)
        assert not budget.is_worth(64, 16, 0, tokens=1.0, more_tokens=0.01), "five blocks take longer than the read"

    def test_where_nothing_streams_a_block_has_to_pay(self) -> None:
        budget = make_budget(read_seconds=0.0)
        budget.observe(1, 0, 0.2)
        assert not budget.is_worth(16, 16, 0, tokens=1.0, more_tokens=0.9)
        assert budget.is_worth(16, 16, 0, tokens=1.0, more_tokens=1.1)

    def test_prompts_in_the_sweep_make_tokens_no_dearer(self) -> None:
        budget = make_budget(read_seconds=1.0)
        budget.observe(1, 0, 0.5)
        budget.observe(0, 100, 10.0)
        assert not budget.is_worth(16, 16, 100, tokens=4.0, more_tokens=2.0), (
            "half a sweep, for half of a sweep's tokens"
        )
        assert budget.is_worth(16, 16, 100, tokens=4.0, more_tokens=2.5)

    def test_prompts_take_what_decoding_leaves_free(self) -> None:
        budget = make_budget(read_seconds=1.0)
        assert budget.prompt_tokens(16, 512, 32) == 512, "nothing is known yet"
        budget.observe(1, 0, 0.1)
        budget.observe(0, 100, 0.5)
        assert budget.prompt_tokens(16, 512, 32) == 160
        assert budget.prompt_tokens(320, 512, 32) == 32
        assert budget.prompt_tokens(16, 96, 32) == 96

    def test_a_row_that_reads_experts_of_its_own_has_to_pay(self) -> None:
        budget = SweepBudget(16, 16, 64, lambda: 0.1, Load(lambda num_rows: 1.0 - 0.9**num_rows))
        budget.observe(1, 0, 0.01, 1)
        assert budget.seconds(1, 0) < budget.seconds(2, 0) < 2 * budget.seconds(1, 0)
        assert not budget.is_worth(1, 1, 0, tokens=1.0, more_tokens=0.4), "nine tenths of a sweep's experts"
        assert budget.is_worth(1, 1, 0, tokens=1.0, more_tokens=0.5), "but the rest of the sweep is shared"
        assert budget.is_worth(1, 1, 500, tokens=1.0, more_tokens=0.01), "a prompt reads all of them anyway"

    def test_experts_in_memory_compute_all_the_same(self) -> None:
        """What computing takes grows with the experts that are wanted, as seen in sweeps with few of them and many."""
        budget = SweepBudget(16, 16, 64, lambda: 0.0, Load(lambda num_rows: 0.0))
        for num_rows in (1, 4, 1, 4):
            budget.observe(1, 0, 0.1 + 0.05 * num_rows, num_rows)
        assert budget.seconds(8, 0) == pytest.approx(0.5)
        assert not budget.is_worth(1, 1, 0, tokens=1.0, more_tokens=0.3)
        assert budget.is_worth(1, 1, 0, tokens=1.0, more_tokens=0.4)

    def test_what_does_not_hide_behind_the_compute_counts(self) -> None:
        """A sweep waits for part of what it reads, though reading all of it takes less than computing."""
        budget = SweepBudget(16, 16, 64, lambda: 0.0, Load(lambda num_rows: 0.02 * num_rows))
        for num_rows in (1, 4, 1, 4):
            budget.observe(1, 0, 0.2, num_rows, wait_seconds=0.05 * num_rows)
        assert budget.seconds(8, 0) == pytest.approx(0.6)
        assert not budget.is_worth(1, 1, 0, tokens=1.0, more_tokens=0.2)

    def test_prompts_share_the_experts_that_they_read(self) -> None:
        budget = SweepBudget(16, 16, 64, lambda: 0.0, Load(lambda num_rows: min(1.0, num_rows / 8)))
        budget.observe(0, 100, 0.25)
        assert budget.prompt_tokens(0, 512, 32) == 360, "what computes while all experts are read"


class Load:
    """Every row wants one expert of its own."""

    def __init__(self, read_seconds: Callable[[int], float]) -> None:
        self.read_seconds = read_seconds

    def wanted(self, num_rows: int) -> float:
        return float(num_rows)


def test_guesses_are_weighed_one_by_one_where_rows_read() -> None:
    """As many as are worth their experts, and no row more because a block has room for it."""
    sequence = make([1, 2, 3, 4, 5, 6, 7, 8, 9, 20, 21], [3, 4, 5])
    free = grow(sequence)
    dear = TreeDrafting([SuffixDrafter()], SweepBudget(16, 16, 64, lambda: 0.0, Load(float)))
    assert dear.propose([sequence], 1, 0) == {}
    assert dear.num_declined == 1
    between = TreeDrafting([SuffixDrafter()], SweepBudget(16, 16, 64, lambda: 2.0, Load(float)))
    assert 0 < len(between.propose([sequence], 1, 0)[sequence]) < len(free)
