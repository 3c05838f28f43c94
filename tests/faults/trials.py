"""What a trial is: drawn from a seed and an index, so that one line says it again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Mode: TypeAlias = Literal["resident", "streams", "tight"]
MODES: tuple[Mode, ...] = ("resident", "streams", "tight")
NUM_PROMPTS = 9
FIRST_OPERATIONS = 40  # a fault begins with one of so many operations that could be hit


@dataclass(frozen=True, slots=True)
class Trial:
    """One fault and what it meets.

    Attributes:
        kind: a row of :data:`tests.faults.kinds.KINDS`.
        mode: resident, streaming, or resident with so little memory for KV that answers are suspended.
        is_warm: whether the store has the prompts' pages from an earlier process.
        early, late: prompts of the world, submitted before the fault is armed, and after.
        at: which of the operations that could be hit is, counted from 0.
        times: how many after it are hit too.
        salt: for what the kind draws itself.
    """

    seed: int
    index: int
    kind: str
    mode: Mode
    is_warm: bool
    early: tuple[int, ...]
    late: tuple[int, ...]
    at: int
    times: int
    salt: int

    @property
    def line(self) -> str:
        """What runs exactly this trial again."""
        return f"python -m tests.faults --trial {self.seed}:{self.index}"


def draw(seed: int, index: int, kinds: Sequence[str]) -> Trial:
    """Trial *index* of the campaign *seed*; kinds take turns."""
    chance = random.Random(f"{seed}:{index}")
    prompts = chance.sample(range(NUM_PROMPTS), chance.randint(3, 6))
    cut = chance.randint(1, len(prompts) - 1)
    return Trial(
        seed=seed,
        index=index,
        kind=kinds[index % len(kinds)],
        mode=chance.choice(MODES),
        is_warm=chance.random() < 0.5,
        early=tuple(prompts[:cut]),
        late=tuple(prompts[cut:]),
        at=int(FIRST_OPERATIONS ** chance.random()) - 1,  # early ones more often: later ones may not come
        times=chance.choice((1, 1, 2, 10**9)),
        salt=chance.getrandbits(32),
    )
