"""What is tried: a model, an engine, prompts, and what happens around them. Pure: it follows from a seed and an index.

Every draw is of the kind that once was wrong somewhere: lengths one beside a multiple of a chunk, prefixes that end
inside of a page, windows smaller than a chunk, vocabularies that are no whole vectors, budgets at the very minimum.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tests.models import FAMILIES, VOCAB_SIZE

Budget: TypeAlias = Literal["minimum", "between", "roomy"]
Store: TypeAlias = Literal["none", "warm", "reopened", "evicting", "damaged"]

CHUNKS = (32, 64, 128, 256)
LONGEST = 900
CONTEXT = 1280
WINDOWS = (1, 2, 5, 17, 32, 33, 40, 127, 128, 129, 300)
ATTENTION_CHUNKS = (3, 31, 32, 48, 128, 130)
TIEABLE = ("llama", "qwen3", "olmo2", "gemma", "phi3")
ORDINARY = (3, 300)  # token ids that every vocabulary here has, none of them special


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt and how it is answered; *temperature* 0: greedily. *cancel_after* seconds it is given up."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0
    n: int = 1
    cancel_after: float | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One model, one engine after the other, the same asks again and again.

    Attributes:
        sizes: of the model's config, where they are not the usual ones.
        is_shrunk: units, chunks and row blocks are those of tests, so that a small model streams in many units.
        dtype, quantization: as the engine has them; where it is not fp32, answers are compared among themselves only.
        share: of the minimum, added to it where the budget is between.
        asks: each has to get the same bits every time.
        neighbours: who comes and goes beside them.
        orders: of the asks, round by round.
    """

    seed: int
    index: int
    family: str
    sizes: tuple[tuple[str, int | bool], ...]
    is_shrunk: bool
    dtype: str
    quantization: str | None
    budget: Budget
    share: float
    chunk_tokens: int | None
    speculation: str
    store: Store
    load: str
    asks: tuple[Ask, ...]
    neighbours: tuple[Ask, ...]
    orders: tuple[tuple[int, ...], ...]

    @property
    def is_exact(self) -> bool:
        """Whether transformers computes the same to within rounding in fp32."""
        return self.dtype == "float32" and self.quantization is None

    def __str__(self) -> str:
        number = f"{self.quantization or self.dtype}{', shrunk' if self.is_shrunk else ''}"
        sizes = "".join(f", {name}={value}" for name, value in self.sizes if name != "max_position_embeddings")
        lengths = " ".join(str(len(ask.prompt)) for ask in self.asks)
        return (
            f"{self.family}{sizes}, {number}, {self.budget} budget, chunks of {self.chunk_tokens or 'any size'}, "
            f"speculation {self.speculation}, store {self.store}, prompts of {lengths}"
        )


def draw_case(seed: int, index: int, *, is_small: bool = False) -> Case:
    """Case *index* of *seed*; *is_small*: one of a second or two."""
    rng = random.Random(f"{seed}:{index}:{is_small}")
    family = rng.choice(list(FAMILIES))
    quantization = None if is_small or rng.random() < 0.85 else rng.choice(["int4", "int8", "nf4"])
    dtype = "bfloat16" if quantization or rng.random() < 0.15 else "float32"
    chunk_tokens = rng.choice([None, None, *CHUNKS])
    asks = _draw_asks(rng, is_small)
    neighbours = tuple(_draw_neighbour(rng, is_small) for _ in range(rng.choice([0, 1, 3])))
    return Case(
        seed=seed,
        index=index,
        family=family,
        sizes=_draw_sizes(rng, family),
        is_shrunk=is_small or rng.random() < 0.5,
        dtype=dtype,
        quantization=quantization,
        budget=rng.choice(["minimum", "between", "roomy"]),
        share=rng.uniform(0.02, 0.9),
        chunk_tokens=32 if is_small else chunk_tokens,
        speculation=rng.choice(["auto", "off"]),
        store=rng.choice(["none", "warm", "reopened", "evicting", "damaged"]),
        load=rng.choice(["always", "auto"]),
        asks=asks,
        neighbours=neighbours,
        orders=tuple(tuple(rng.sample(range(len(asks)), len(asks))) for _ in range(3)),
    )


def _draw_sizes(rng: random.Random, family: str) -> tuple[tuple[str, int | bool], ...]:
    changes = FAMILIES[family].changes
    sizes: dict[str, int | bool] = {"max_position_embeddings": CONTEXT}
    if "sliding_window" in changes:
        sizes["sliding_window"] = rng.choice(WINDOWS)
    if "attention_chunk_size" in changes:
        sizes["attention_chunk_size"] = rng.choice(ATTENTION_CHUNKS)
    if family in TIEABLE:
        sizes["tie_word_embeddings"] = rng.random() < 0.4
    if rng.random() < 0.3:
        sizes["vocab_size"] = rng.choice([307, VOCAB_SIZE + 1, 999])
    return tuple(sizes.items())


def _draw_asks(rng: random.Random, is_small: bool) -> tuple[Ask, ...]:
    common = _draw_tokens(rng, LONGEST)
    max_tokens = 3 if is_small else rng.choice([3, 12, 40])
    return tuple(_draw_ask(rng, common, max_tokens, is_small) for _ in range(3 if is_small else 6))


def _draw_ask(rng: random.Random, common: tuple[int, ...], max_tokens: int, is_small: bool) -> Ask:
    length = _draw_length(rng, is_small)
    shared = min(length, rng.choice([0, 1, 30, 33, 64, 128, 130, 256, 640]))
    prompt = common[:shared] + _draw_tokens(rng, length - shared)
    if rng.random() < 0.3:  # what repeats itself is guessed
        prompt = (prompt[:7] * length)[:length]
    temperature = rng.choice([0.0, 0.0, 0.0, 0.7, 1.5])
    n = rng.choice([1, 1, 1, 3]) if temperature else 1
    return Ask(prompt, max_tokens, temperature, rng.randrange(2**31), n)


def _draw_neighbour(rng: random.Random, is_small: bool) -> Ask:
    prompt = _draw_tokens(rng, _draw_length(rng, is_small))
    cancel_after = rng.choice([None, 0.0, rng.random() * 0.05])
    return Ask(prompt, 8 if is_small else 30, 1.0, rng.randrange(2**31), rng.choice([1, 2]), cancel_after)


def _draw_length(rng: random.Random, is_small: bool) -> int:
    """Around a boundary more often than not."""
    longest = 140 if is_small else LONGEST
    kind = rng.random()
    if kind < 0.15:
        return rng.randint(1, 5)
    if kind < 0.8:
        step = rng.choice(CHUNKS)
        return min(longest, max(1, step * rng.randint(1, max(1, longest // step)) + rng.choice([-1, 0, 1])))
    return rng.randint(1, longest)


def _draw_tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(*ORDINARY) for _ in range(count))
