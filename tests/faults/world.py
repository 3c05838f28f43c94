"""What trials share: a small model, prompts, and what a sound engine answers to them, to the bit."""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from layerstream import KVStoreConfig, LayerStream, SamplingParams
from layerstream.api.completion import Completion

from tests.faults.trials import MODES, NUM_PROMPTS, Mode
from tests.harness import budget_for, draw_prompt, shrink_units
from tests.models import make_model, make_tokenizer

Bits: TypeAlias = tuple[Any, ...]

_BEGINNING = draw_prompt(96)
_OTHER = draw_prompt(160, seed=11)
PROMPTS: tuple[list[int], ...] = (
    draw_prompt(5),
    draw_prompt(33),
    _BEGINNING + draw_prompt(8),
    _BEGINNING + draw_prompt(40),
    _BEGINNING + draw_prompt(33, seed=3),
    _OTHER,
    _OTHER[:129],
    _OTHER + draw_prompt(100),
    draw_prompt(300),
)
assert len(PROMPTS) == NUM_PROMPTS


def params_of(number: int) -> SamplingParams:
    """How prompt *number* is answered: most greedily, some by chance, one twice."""
    if number % 3 == 1:
        return SamplingParams(max_tokens=8, temperature=0.9, seed=number, ignore_eos=True, logprobs=1)
    return SamplingParams(
        max_tokens=4 + number, temperature=0.0, ignore_eos=True, logprobs=2, n=2 if number == 3 else 1
    )


def bits_of(completions: list[Completion]) -> Bits:
    """All that must not depend on what happens to others."""
    return tuple(
        (tuple(c.token_ids), tuple((entry.token_id, entry.logprob) for entry in c.logprobs or ())) for c in completions
    )


@dataclass(frozen=True)
class World:
    """A model's folder, a store that knows the prompts, and the right answers, per mode."""

    model: Path
    warm: dict[Mode, Path]
    right: dict[Mode, tuple[Bits, ...]]

    def engine(self, mode: Mode, store: Path | str | None, **options: Any) -> LayerStream:
        """An engine as trials have it."""
        with pytest.MonkeyPatch.context() as patch:
            shrink_units(patch)
            return LayerStream(
                self.model,
                device="cpu",
                dtype="float32",
                memory=_budget(self.model, mode),
                kv_store=None if store is None else store_at(store),
                **options,
            )


def store_at(folder: Path | str) -> KVStoreConfig:
    """A store that takes and loads whatever it can."""
    return KVStoreConfig(folder, load="always", max_bytes="1GiB", min_free_bytes=0)


@functools.cache
def _budget(model: Path, mode: Mode) -> int:
    return budget_for(model, "layers" if mode == "streams" else mode)


def make_world(folder: Path) -> World:
    """Make the model, and answer every prompt alone, without a store and without a fault."""
    model = folder / "model"
    make_model("llama", model)
    make_tokenizer().save_pretrained(model)
    world = World(model, {}, {})
    for mode in MODES:
        with world.engine(mode, None, progress=False) as engine:
            world.right[mode] = tuple(
                bits_of(engine.generate([prompt], params_of(number))) for number, prompt in enumerate(PROMPTS)
            )
        world.warm[mode] = folder / f"warm-{mode}"
        with world.engine(mode, world.warm[mode], progress=False) as engine:
            for number, prompt in enumerate(PROMPTS):
                assert bits_of(engine.generate([prompt], params_of(number))) == world.right[mode][number]
    return world


def copy_store(world: World, mode: Mode, folder: Path) -> None:
    """Have *folder* hold what an earlier process left there."""
    shutil.copytree(world.warm[mode], folder)
    folder.chmod(0o700)
