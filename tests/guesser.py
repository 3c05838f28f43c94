"""A drafter that knows the answers and says them now and then, among other things."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from layerstream.core.draft import ROOT, DraftTree
from layerstream.core.sequence import Sequence as TokenSequence

from tests.models import VOCAB_SIZE


class Guesser:
    """Trees of random tokens, with the right continuation somewhere in most of them."""

    def __init__(self, answers: Sequence[Sequence[int]], seed: int, num_nodes: int = 9) -> None:
        self._answers = answers
        self._rng = random.Random(seed)
        self._num_nodes = num_nodes
        self.num_guessed = 0

    def propose(
        self, sequences: Sequence[TokenSequence], num_decoded: int, num_prompt_tokens: int
    ) -> Mapping[TokenSequence, DraftTree]:
        trees = {}
        for sequence in sequences:
            room = min(sequence.tenancy.capacity, sequence.max_num_tokens - 1) - sequence.num_tokens
            if room > 0 and self._rng.random() < 0.8:
                trees[sequence] = self._draw(self._answers[sequence.sequence_id][sequence.num_output_tokens :], room)
                self.num_guessed += len(trees[sequence])
        return trees

    def _draw(self, right: Sequence[int], room: int) -> DraftTree:
        """Depth first; the path of right tokens is begun now and then, and left now and then."""
        tokens: list[int] = []
        parents: list[int] = []
        depths: list[int] = []
        path, is_right = [ROOT], [True]
        while len(tokens) < self._num_nodes:
            depth = self._rng.randint(0, min(len(path) - 1, room - 1))
            path, is_right = path[: depth + 1], is_right[: depth + 1]
            guess = self._rng.randrange(3, VOCAB_SIZE)
            if is_right[-1] and depth < len(right) and self._rng.random() < 0.7:
                guess = right[depth]
            if any(p == path[-1] and t == guess for p, t in zip(parents, tokens, strict=True)):
                guess = self._rng.randrange(3, VOCAB_SIZE)
                if any(p == path[-1] and t == guess for p, t in zip(parents, tokens, strict=True)):
                    continue
            tokens.append(guess)
            parents.append(path[-1])
            depths.append(depth + 1)
            is_right.append(is_right[-1] and depth < len(right) and guess == right[depth])
            path.append(len(tokens) - 1)
        return DraftTree(tuple(tokens), tuple(parents), ("test",) * len(tokens))
