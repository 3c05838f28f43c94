"""What is sampled follows the model's distribution exactly, guesses or not: total variation on a tiny vocabulary."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence as Seq

import numpy as np
import pytest
import torch
from layerstream.api.params import SamplingParams
from layerstream.core.draft import ROOT, DraftTree
from layerstream.core.sequence import Sequence
from layerstream.scheduling.sampler import processed_distribution, sample
from layerstream.scheduling.verify import verify

from tests.crossing import by_turns

VOCAB = 5
LENGTH = 3
DRAWS = 6000
PROMPT = [1, 2]


class OddSum:
    """A grammar over token numbers: no token twice in a row, and never 4 first."""

    def __init__(self, last: int | None = None) -> None:
        self._last = last

    is_over = False

    def mask(self) -> np.ndarray:
        mask = np.ones(VOCAB, dtype=bool)
        mask[4 if self._last is None else self._last] = False
        return mask

    def accept(self, token_id: int) -> None:
        assert self.mask()[token_id]
        self._last = token_id

    def forced(self) -> list[int]:
        return []

    def admits(self, token_ids: Seq[int]) -> bool:
        return all(a != b for a, b in itertools.pairwise(token_ids))

    def fork(self) -> OddSum:
        return OddSum(self._last)


def logits_after(tokens: Seq[int]) -> torch.Tensor:
    """The model: logits that depend on the last two tokens."""
    generator = torch.Generator().manual_seed(17 * tokens[-1] + tokens[-2])
    return 1.5 * torch.randn(VOCAB, generator=generator)


def make(params: SamplingParams, output: Seq[int] = (), *, grammar: bool = False) -> Sequence:
    sequence = Sequence(0, [*PROMPT], len(PROMPT), params, constraint=OddSum() if grammar else None)
    for token in output:
        append(sequence, token)
    return sequence


def append(sequence: Sequence, token: int) -> None:
    sequence.token_ids.append(token)
    if sequence.constraint is not None:
        sequence.constraint.accept(token)


def exact(params: SamplingParams, *, grammar: bool) -> dict[tuple[int, ...], float]:
    """The probability of every answer, from the distribution of each step."""
    found = {}
    for answer in itertools.product(range(VOCAB), repeat=LENGTH):
        probability = 1.0
        for at, token in enumerate(answer):
            if probability == 0.0:
                break
            sequence = make(params, answer[:at], grammar=grammar)
            probability *= processed_distribution(logits_after(sequence.token_ids), sequence)[token]
        found[answer] = probability
    return found


def draw_tree(rng: random.Random) -> DraftTree:
    """Guesses that cover most of what may come, in an order of their own."""
    tokens, parents, depths = [], [], []
    for parent, depth in [(ROOT, 1)] + [(node, 2) for node in range(3)]:
        for token in rng.sample(range(VOCAB), 3 if parent == ROOT else 2):
            tokens.append(token)
            parents.append(parent)
            depths.append(depth)
    return DraftTree(tuple(tokens), tuple(parents), ("test",) * len(tokens))


def draw_answer(params: SamplingParams, seed: int, rng: random.Random, *, grammar: bool, drafts: bool) -> list[int]:
    own = SamplingParams(**{**{f: getattr(params, f) for f in params.__dataclass_fields__}, "seed": seed})
    sequence = make(own, grammar=grammar)
    while sequence.num_output_tokens < LENGTH:
        tree = draw_tree(rng) if drafts else None
        root = list(sequence.token_ids)

        def draw(node: int, root: list[int] = root, tree: DraftTree | None = tree) -> tuple[list[int], bool]:
            path = [] if node == ROOT or tree is None else [tree.token_ids[step] for step in tree.paths[node]]
            assert [*root, *path] == sequence.token_ids, "a row of the path that was taken"
            token = sample(logits_after([*root, *path]), sequence).token_id
            append(sequence, token)
            return [token], sequence.num_output_tokens < LENGTH

        verify(tree, draw)
    return sequence.output_ids


@pytest.mark.parametrize(
    ("options", "grammar"),
    by_turns(
        [
            {},
            {"temperature": 0.7, "top_p": 0.8},
            {"top_k": 3, "min_p": 0.05},
            {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4},
        ],
        [False, True],
    ),
)
def test_total_variation(options: dict[str, float], grammar: bool) -> None:
    params = SamplingParams(**{"temperature": 1.0, "max_tokens": LENGTH, **options})  # type: ignore[arg-type]
    expected = exact(params, grammar=grammar)
    assert sum(expected.values()) == pytest.approx(1.0)
    rng = random.Random(5)
    found = Counter(tuple(draw_answer(params, seed, rng, grammar=grammar, drafts=True)) for seed in range(DRAWS))
    variation = sum(abs(found[answer] / DRAWS - probability) for answer, probability in expected.items()) / 2
    num_likely = sum(probability > 0 for probability in expected.values())
    assert variation < 1.5 * np.sqrt(num_likely / (2 * np.pi * DRAWS)), "more than chance explains"
    assert all(expected[answer] > 0 for answer in found)


def test_each_draw_is_the_same_with_and_without() -> None:
    params = SamplingParams(temperature=0.9, max_tokens=LENGTH, frequency_penalty=0.5)
    rng = random.Random(3)
    for seed in range(200):
        plain = draw_answer(params, seed, rng, grammar=False, drafts=False)
        assert draw_answer(params, seed, rng, grammar=False, drafts=True) == plain
